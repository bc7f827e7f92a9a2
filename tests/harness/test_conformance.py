"""The conformance suite over everything that is installed here, a third party's plugins included, as a plugin author would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_every_installed_plugin_conforms(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--pyargs", "harness.testing", "-v", "-p", "no:cacheprovider", "-W", "error", "--basetemp", str(tmp_path / "t")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 40, done.stdout[-500:]
    for name in ("rotation", "nearest-mean", "beit", "mae", "supervised", "ade20k", "coco", "imagenet", "linear"):
        assert f"[{name}]" in done.stdout, name
