"""The command `table`, on runs folders: what it prints, and the one line for each mistake."""

import argparse
import json
from pathlib import Path

import pytest

import results.table
from harness.spec import Metric, UserError
from harness.store import Result
from results.table import Table


def made(method: str, evaluator: str, **fields: str) -> Result:
    plain = {"protocol": "demo", "backbone": "tiny", "data": "generated", "key": method + evaluator, **fields}
    return Result(method=method, eval=evaluator, seed=0, eval_seed=0, metrics={"mIoU": 1.0}, columns=(Metric("mIoU"),), status="done", **plain)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Results that stand for those of the runs folders."""
    listed = [made("beit", "coco"), made("mae", "ade20k"), made("mae", "coco"), made("mae", "coco", protocol="paper", key="p")]
    monkeypatch.setattr(results.table, "collect", lambda folders: listed)
    return listed


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    Table.add_arguments(parser)
    return Table().run(parser.parse_args(words))


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[tuple[str, str, str]]:
    assert run("--format", "json", *words) == 0
    return [(r["protocol"], r["method"], r["eval"]) for r in json.loads(capsys.readouterr().out)]


def test_flags_choose_and_order(found: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--protocol", "demo", "--methods", "mae,beit", "--evals", "coco,ade20k") == [
        ("demo", m, e) for m in ("mae", "beit") for e in ("coco", "ade20k")]
    assert printed(capsys, "--protocol", "paper") == [("paper", "mae", "coco")]
    assert printed(capsys, "--methods", "beit") == [("demo", "beit", "coco")]


def test_a_group_stands_for_its_members_that_have_results(found: list[Result], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results.table.plugins, "group", lambda kind, name: ("ade20k", "lvis") if (kind, name) == ("evals", "dense") else None)
    assert printed(capsys, "--evals", "dense") == [("demo", "mae", "ade20k")]


def test_two_protocols_are_two_tables_and_it_is_said(found: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert out.startswith("2 tables: ") and out.count("| method") == 2


@pytest.mark.parametrize(("words", "line"), [
    (["--methods", "mea"], r"--methods: no result of 'mea' in these runs: did you mean mae\? valid: beit, mae"),
    (["--evals", "cocoo"], r"--evals: no result of 'cocoo' in these runs: did you mean coco\?"),
    (["--methods", ","], r"--methods: the list is empty: valid: beit, mae"),
    (["--protocol", "dmo"], r"--protocol: no result of 'dmo' in these runs: did you mean demo\?"),
    (["--backbone", "huge"], r"--backbone: no result of 'huge' in these runs: valid: tiny"),
])
def test_a_wrong_name_is_one_line(found: list[Result], words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        run(*words)
    assert "\n" not in str(error.value)


def test_a_folder_without_results_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results there") as error:
        run("--runs", str(tmp_path))
    assert str(tmp_path) in str(error.value) and "harness run" in str(error.value)


def test_runs_can_be_repeated_and_listed(found: list[Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(results.table, "collect", lambda folders: asked.extend(folders) or found)
    run("--runs", "a", "b", "--runs", "c", "a")
    assert asked == [Path("a"), Path("b"), Path("c")]
