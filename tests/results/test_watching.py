"""`status --watch`: redrawn on a terminal, plain lines in a log, and it ends by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import cli
from results import watching

LOOKS = [
    [("running", "running      aaa pretrain mae: step 1"), ("missing", "missing      bbb evaluate")],
    [("running", "running      aaa pretrain mae: step 2"), ("missing", "missing      bbb evaluate")],
    [("done", "done         aaa pretrain mae"), ("missing", "missing      bbb evaluate")],  # between two jobs
    [("done", "done         aaa pretrain mae"), ("running", "running      bbb evaluate")],
    [("done", "done         aaa pretrain mae"), ("done", "done         bbb evaluate")],
    [("done", "done         aaa pretrain mae"), ("done", "done         bbb evaluate")],
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LOOK_EVERY_S", 0.0)


def test_a_log_gets_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    looks = iter(LOOKS)
    assert watching.watch(lambda: next(looks)) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()] == [["running", "aaa"], ["missing", "bbb"], ["done", "aaa"], ["running", "bbb"], ["done", "bbb"]]
    assert "\033" not in out and next(looks, None) is None


def test_a_terminal_is_redrawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(LOOKS)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert watching.watch(lambda: next(looks)) == 0
    assert capsys.readouterr().out.count("\033[H\033[J") == len(LOOKS)


def test_ctrl_c_ends_it_without_a_failure() -> None:
    def look() -> list[tuple[str, str]]:
        raise KeyboardInterrupt

    assert watching.watch(look) == 0


def test_it_shows_all_runs_only(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "mae", "--watch", "--runs", str(tmp_path)]) == 2
    assert "--watch: shows all runs: leave RUN out" in capsys.readouterr().err
    assert cli.main(["status", "--watch", "--runs", str(tmp_path)]) == 0  # nothing there, nothing runs


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == f"{tmp_path}: no runs there yet: `run` with this --runs makes some\n"
