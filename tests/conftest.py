"""What tests share: smoke data made once, a third-party package installed as a user would, the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = Path(__file__).with_name("example_plugin")


@pytest.fixture(scope="session")
def example_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package and its metadata, as pip leaves them."""
    import shutil

    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for file in ("pyproject.toml", "harness_example.py"):
        shutil.copy(EXAMPLE / file, source / file)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return site


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, example_site: Path) -> dict[str, str]:
    """Environment of a user with the example package and a data cache of their own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HARNESS_")}
    cache = tmp_path_factory.mktemp("cache")
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), str(example_site)]), "HARNESS_DATA": str(cache), "XDG_CACHE_HOME": str(cache)}


@pytest.fixture
def harness(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`harness("run", ...)`: the command line in a process of its own, in an empty folder."""

    def call(*words: str, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "harness", *words]
        return subprocess.run(line, cwd=tmp_path, env={**environment, **extra}, capture_output=True, text=True, timeout=timeout)

    return call


@pytest.fixture
def here(
    environment: dict[str, str], example_site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `harness`, within this process, where nothing is to be imported again (5 of the 6 seconds of a refusal). Not for what starts jobs."""
    from harness import cli, plugins

    def call(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.syspath_prepend(str(example_site))
            for name in [n for n in os.environ if n.startswith("HARNESS_")]:
                patch.delenv(name)
            for name, value in {**environment, **extra}.items():
                patch.setenv(name, value)
            plugins.installed.cache_clear()  # the example's are found by these calls alone
            try:
                code = cli.main(words)
            except SystemExit as error:  # argparse's refusals
                code = int(error.code or 0)
            finally:
                plugins.installed.cache_clear()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def smoke_data(environment: dict[str, str]) -> Path:
    """Folder with the smoke protocol's data sets, made once."""
    from protocols.demo import smoke
    from protocols.layouts import COUNTS, generate

    root = Path(environment["HARNESS_DATA"]) / f"smoke-{smoke.data_version}"
    generate(root, list(COUNTS["smoke"]), "smoke", 2)
    return root
