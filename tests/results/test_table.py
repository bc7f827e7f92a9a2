"""The command `table`, on runs folders: what it prints, and the one line for each mistake."""

import argparse
import json
from pathlib import Path

import pytest

import results.table
from harness.jobs import Node
from harness.spec import Metric, UserError
from harness.store import RECORD_SCHEMA, Result, Store, record_validator, write_json
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


def test_records_on_disk_become_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The road from the files that jobs write to the table, copies of a job in two folders included.
    about = {"method": "mae", "eval": "ade20k", "protocol": "demo", "backbone": "tiny", "data": "generated data", "eval_seed": 0,
             "columns": [{"name": "mIoU", "unit": "%", "higher_is_better": True}], "deviations": [], "caption": "demo", "tuning": "published"}
    for root in (tmp_path / "a", tmp_path / "b"):
        Store(root).prepare()
        for seed, score in ((0, 10.0), (1, 20.0), (2, None)):
            node = Node("evaluate", "ade20k-mae", {"seed": seed}, about={**about, "seed": seed})
            folder = Store(root).folder(node)
            folder.mkdir()
            write_json(folder / "job.json", node.job(root))
            if score is None:
                write_json(folder / "failure.json", {"message": "loss is not finite"})
            else:
                whole = dict.fromkeys(record_validator().schema["required"]) | {"deviations_found": []}
                write_json(folder / "record.json", {**whole, "schema": RECORD_SCHEMA, "metrics": {"mIoU": score}, "start": f"2026-01-0{seed + 1}"})
    assert run("--format", "json", "--runs", str(tmp_path / "a"), str(tmp_path / "b")) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["value"], row["n"], row["status"], row["reason"]) == (15.0, 2, "failed", "seed 2: loss is not finite")


def test_runs_can_be_repeated_and_listed(found: list[Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(results.table, "collect", lambda folders: asked.extend(folders) or found)
    run("--runs", "a", "b", "--runs", "c", "a")
    assert asked == [Path("a"), Path("b"), Path("c")]
