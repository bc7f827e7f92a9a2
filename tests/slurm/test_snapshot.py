"""Jobs run the code as it was when they were submitted, whatever becomes of the tree meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.provenance import git_state
from harness.spec import UserError
from harness.store import Store
from slurm.snapshot import ROOT, python_path, snapshot

ASK = """
import json, sys
from harness import plugins
from harness.provenance import git_state
print(json.dumps({"harness": plugins.__file__, "methods": sorted(plugins.installed("methods")), "mae": plugins.load("methods", "mae").summary,
                  "probe": plugins.load("launchers", "methods.new:NAME"), "git": git_state()}))
"""


def git(tree: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(tree), *who, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of the code: one file tracked and changed, one new, one ignored."""
    tree = tmp_path / "tree"
    for name in ("harness", "methods"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / ".gitignore").write_text("__pycache__\nscratch*\n")
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "first")
    mae = tree / "methods" / "mae.py"
    mae.write_text(mae.read_text().replace("masked autoencoder: the ViT sees", "as it was when submitted: the ViT sees"))
    (tree / "methods" / "new.py").write_text("NAME = 'new'\n")
    (tree / "scratch.py").write_text("")
    return tree


def seen(code: Path, where: Path) -> dict[str, Any]:
    """What a job finds, started in a folder with the environment that its script sets."""
    environment = {**os.environ, "PYTHONPATH": python_path(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_editing_the_tree_changes_nothing_for_what_is_submitted(
    tree: Path, tmp_path: Path, example_site: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in the folder of the tree, where Python would look first; third parties' entry points are there too."""
    monkeypatch.setenv("PYTHONPATH", f"{tree}{os.pathsep}{example_site}")
    code = snapshot(Store(tmp_path / "runs"), tree)
    code.save()
    commit = git(tree, "rev-parse", "HEAD")
    shutil.rmtree(tree / "harness")
    (tree / "methods" / "mae.py").write_text("broken(")
    git(tree, "commit", "-q", "-a", "-m", "second")
    found = seen(code.tree, tree)
    assert found["harness"].startswith(str(code.tree)) and found["mae"].startswith("as it was when submitted") and found["probe"] == "new"
    assert {"mae", "beit", "rotation"} <= set(found["methods"]), "ours from the copy, rotation from the example package"
    assert (found["git"]["commit"], found["git"]["dirty"], found["git"]["snapshot"]) == (commit, True, code.name)
    assert "+    summary: ClassVar[str] = \"as it was" in found["git"]["diff"] and found["git"]["untracked"] == ["methods/new.py"]
    assert "+    summary: ClassVar[str] = \"as it was" in (code.tree.parent / "changes.diff").read_text()
    assert not (code.tree / "scratch.py").exists()


def test_equal_code_is_copied_once_and_whole(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "runs")
    first = snapshot(store, tree)

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
            first.save()
    assert list(first.tree.parents[1].iterdir()) == [], "there whole or not at all"
    first.save()
    made = (first.tree.parent / "snapshot.json").stat().st_mtime_ns
    again = snapshot(store, tree)
    again.save()
    assert again.tree == first.tree and (first.tree.parent / "snapshot.json").stat().st_mtime_ns == made
    (tree / "methods" / "new.py").write_text("NAME = 'newer'\n")
    other = snapshot(store, tree)
    other.save()
    assert other.tree != first.tree and len(list(first.tree.parents[1].iterdir())) == 2
    assert snapshot(store, first.tree).tree == first.tree, "a job that submits jobs hands its own copy on"


def test_an_installed_harness_is_copied_by_its_packages(tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree / ".git")
    (tree / "numpy").mkdir()
    (tree / "numpy" / "__init__.py").write_text("other people's")
    code = snapshot(Store(tmp_path / "runs"), tree)
    assert "methods/new.py" in code.files and "harness/record.schema.json" in code.files and "numpy/__init__.py" not in code.files
    assert code.git["commit"] is None and git_state().keys() == {"commit", "dirty"}
