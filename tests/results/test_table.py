"""The command `table`, on runs folders: what it prints, and the one line for each mistake."""

import argparse
import json
from pathlib import Path

import pytest
from folders import written

import results.table
from harness.collect import Result, collect
from harness.jobs import Node
from harness.spec import Metric, UserError
from harness.store import Store, write_json
from results.beside import LAYOUTS
from results.table import Table


def made(method: str, evaluator: str, **fields: str) -> Result:
    plain = {"protocol": "demo", "backbone": "tiny", "data": "generated", "key": method + evaluator, **fields}
    return Result(method=method, eval=evaluator, seed=0, eval_seed=0, metrics={"mIoU": 1.0}, columns=(Metric("mIoU"),), status="done", **plain)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Results that stand for those of the runs folders."""
    listed = [made("beit", "coco"), made("mae", "ade20k"), made("mae", "coco"), made("mae", "coco", protocol="paper", key="p")]
    monkeypatch.setattr(results.table, "collect", lambda folders, read: listed)
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
            if score is not None:
                written(root, node, metrics={"mIoU": score}, start=f"2026-01-0{seed + 1}")
                continue
            folder = Store(root).folder(node)
            folder.mkdir()
            write_json(folder / "job.json", node.job(root))
            write_json(folder / "failure.json", {"message": "loss is not finite"})
    assert run("--format", "json", "--runs", str(tmp_path / "a"), str(tmp_path / "b")) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["value"], row["n"], row["status"], row["reason"]) == (15.0, 2, "failed", "seed 2: loss is not finite")


def test_a_record_tells_what_its_checkpoint_went_through(found_lineage: tuple[dict, ...]) -> None:
    # By these, and not by names alone, a score is put beside a published number; the pre-training's own folder may be gone.
    assert [n["kind"] for n in found_lineage] == ["evaluate", "pretrain"] and found_lineage[1]["recipe"] == {"epochs": 800}


@pytest.fixture
def found_lineage(tmp_path: Path) -> tuple[dict, ...]:
    """The lineage of a result that was read from a record, written as a job writes it."""
    tokenizer, store = Node("asset", "dvae", {}), Store(tmp_path)
    pretraining = Node("pretrain", "mae", {"seed": 0, "recipe": {"epochs": 800}}, {"tokenizer": tokenizer})
    about = {"method": "mae", "eval": "ade20k", "protocol": "paper", "backbone": "vit-b16", "data": "data", "seed": 0, "eval_seed": 0, "columns": []}
    store.prepare()
    written(tmp_path, Node("evaluate", "ade20k-mae", {"seed": 0}, {"checkpoint": pretraining}, about), metrics={"mIoU": 1.0})
    (result,) = collect([tmp_path])
    return result.lineage


def test_a_layout_needs_no_runs_folder_and_a_wrong_one_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--layout", "mae-table5") == 0
    assert "53.6" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--layout: unknown name 'mae-tabel5': did you mean mae-table5\? valid: beit-table1, ") as error:
        run("--layout", "mae-tabel5")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such folder"):
        run("--layout", "mae-table5", "--runs", "nowhere")


def test_the_help_names_all_layouts_unbroken() -> None:
    parser = argparse.ArgumentParser()
    Table.add_arguments(parser)
    assert set(LAYOUTS) <= set(parser.format_help().replace(",", " ").split())


def test_runs_can_be_repeated_and_listed(found: list[Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(results.table, "collect", lambda folders, read: asked.extend(folders) or found)
    run("--runs", "a", "b", "--runs", "c", "a")
    assert asked == [Path("a"), Path("b"), Path("c")]
