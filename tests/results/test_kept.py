"""Kept records: a small file that gives back all that tables, audits and the words of a report are made of."""

import gzip
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from folders import about, written

from evals.linear import Linear
from harness.collect import Result, collect
from harness.jobs import Node
from harness.spec import UserError
from harness.store import Store, write_json
from results.ancestry import Archive
from results.cells import sheets
from results.claims import Claim, main, of_records, read_plan
from results.kept import NAME, pack, read_kept
from results.selection import trials_of
from results.staleness import pinned
from results.table import Table

ROOT = Path(__file__).resolve().parents[2]
KEPT = sorted(p.parent for p in (ROOT / "results").glob(f"*/{NAME}"))
PLAN = """from harness.request import Request\ndef plan():\n    return Request(("mae", "beit"), ("linear", "coco"))\n"""
PLUGIN = {"class": "evals.linear:Linear"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods on an evaluator over two seeds, a second setting of one, a failure, and a score of another protocol that no table here is about."""
    root = tmp_path / "runs"
    Store(root).prepare()
    for method in ("mae", "beit"):
        for seed in (0, 1):
            training = Node("pretrain", method, {"seed": seed, "plugin": {"class": method}, "recipe": None}, about={"labels": False})
            folder = written(root, training, 1.0, flops=1e12, images_seen=100, packages={"numpy": pinned()["numpy"]})
            (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
            for lr in (1, 2) if method == "mae" else (1,):
                plain = {"seed": seed, "eval": "linear", "plugin": {**PLUGIN, "lr": lr}, "recipe": None, "data": {"imagenet": "ab" * 8}}
                told = about(method, "linear", seed, "top-1", settings=str(lr), lineage=[{"kind": "pretrain"}])
                written(root, Node("evaluate", "linear", plain, {"checkpoint": training}, told), 0.5, metrics={"top-1": 50.0 + seed},
                        start=f"2026-01-0{3 - lr}", plugin_version=Linear.version, hardware={"device": "cpu", "cpu": "x"})
    failed = Node("evaluate", "coco-mae", {"plugin": {}}, about=about("mae", "coco", 0, "AP_box"), where={"folders": {"coco": "somewhere"}})
    Store(root).folder(failed).mkdir()
    write_json(Store(root).folder(failed) / "job.json", failed.job(root))
    write_json(Store(root).folder(failed) / "failure.json", {"message": "no such\u2028thing"})  # U+2028 ends a line of text, and none of the file
    written(root, Node("evaluate", "other", {"plugin": {}, "seed": 7}, about={**about("mae", "linear"), "protocol": "smoke"}))
    return root


def asked(runs: Path) -> list[Result]:
    """What a plan would give: its own cells, one of them skipped."""
    found = [r for r in collect([runs]) if r.protocol == "demo" and r.settings != "2"]
    return [*found, replace(found[0], key="", metrics={}, lineage=(), facts={}, start="", method="beit", eval="coco", status="skipped", reason="cannot run")]


@pytest.fixture
def claim(tmp_path: Path, runs: Path) -> Claim:
    """A claim that is kept beside its plan."""
    folder = tmp_path / "claim"
    folder.mkdir()
    (folder / "plan.py").write_text(PLAN)
    found = read_plan(folder / "plan.py")
    assert NAME in found.keep(asked(runs), (runs,))
    return found


def test_results_and_nodes_come_back_as_they_were(runs: Path, claim: Claim) -> None:
    live, kept = Archive((runs,)), Archive((claim.folder,))
    assert kept.kept == asked(runs) and pack(kept.kept, kept) == pack(asked(runs), live) == (claim.folder / NAME).read_bytes()
    done = [r for r in asked(runs) if r.status == "done"]
    assert [[s.record for s in kept.steps(r)] for r in done] == [[s.record for s in live.steps(r)] for r in done]
    (sheet,) = sheets(done)
    assert trials_of(sheet, kept) == trials_of(sheet, live) and trials_of(sheet, kept)["mae", "linear"].count == 2  # the setting that is not shown
    text = gzip.decompress((claim.folder / NAME).read_bytes()).decode()
    assert "somewhere" not in text and "smoke" not in text, "a place of this machine, or what no table here is about"


def test_all_is_made_again_without_the_runs_folder(runs: Path, claim: Claim) -> None:
    before = {p.name: p.read_bytes() for p in claim.folder.iterdir()}
    shutil.rmtree(runs)
    assert main([str(claim.folder / "plan.py")]) == 0
    assert {p.name: p.read_bytes() for p in claim.folder.iterdir()} == before and b"<h3>Training curves" in before["report.html"]
    (claim.folder / "report.html").unlink()
    assert main([str(claim.folder / "plan.py")]) == 0
    again = (claim.folder / "report.html").read_text()
    assert "<h3>Training curves" not in again and of_records(again) == of_records(before["report.html"].decode())
    assert "Selected on test: several settings" in again and "skipped: cannot run" in again and "no such thing" in before["table.md"].decode()


def test_a_runs_folder_is_kept_as_it_is(runs: Path, claim: Claim, capsys: pytest.CaptureFixture[str]) -> None:
    (claim.folder / NAME).unlink()
    assert main([str(claim.folder / "plan.py")]) == 2 and "records.jsonl.gz: no such file" in capsys.readouterr().err
    (claim.folder / "plan.py").write_text(PLAN.replace('("linear", "coco"))', '("linear",))'))
    assert main([str(claim.folder / "plan.py"), "--runs", str(runs)]) == 0
    found = Archive((claim.folder,)).kept
    rows = [(r.method, r.seed, r.settings) for r in found]
    assert sorted(rows[:2]) == [("mae", 0, "1"), ("mae", 0, "2")] and rows[2:] == [("beit", 0, "1")], "the plan asks for seed 0, and for mae first"
    elsewhere = runs.parent / "elsewhere"
    Store(elsewhere).prepare()
    before = {p.name: p.read_bytes() for p in claim.folder.iterdir()}
    assert main([str(claim.folder / "plan.py"), "--runs", str(elsewhere)]) == 2 and "nothing there that the plan of" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in claim.folder.iterdir()} == before


def test_what_stops_in_the_middle_leaves_what_was_kept_before(runs: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    # Else records of one making lay beside tables of another, and `again` gave the new report the curves and pictures of the old one.
    before = {p.name: p.read_bytes() for p in claim.folder.iterdir()}
    monkeypatch.setattr("results.report.curves_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        claim.keep(asked(runs)[:1], (runs,))
    assert {p.name: p.read_bytes() for p in claim.folder.iterdir()} == before
    (claim.folder / "table.md").unlink()
    (claim.folder / "table.md").mkdir()
    monkeypatch.undo()
    assert main([str(claim.folder / "plan.py")]) == 1 and "table.md: Is a directory: mend that" in capsys.readouterr().err


def test_a_newer_evaluator_stars_what_is_kept(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the check of kept tables below must notice. Data and libraries of the machine that looks are not asked.
    assert "Starred" not in (claim.folder / "table.md").read_text()
    monkeypatch.setattr(Linear, "version", Linear.version + 1)
    table, page = claim.tables()["table.md"].decode(), claim.page()
    assert f"linear was version {Linear.version - 1}, is {Linear.version}" in table
    assert of_records(page) != of_records((claim.folder / "report.html").read_text())


def test_a_table_of_kept_records_is_that_of_the_runs(runs: Path, claim: Claim, capsys: pytest.CaptureFixture[str]) -> None:
    from harness import cli

    assert cli.main(["table", "--runs", str(claim.folder), "--methods", "mae,beit"]) == 0
    assert capsys.readouterr().out == Table.render(asked(runs), "markdown", ("mae", "beit"), folders=(runs,)) + "\n"


def test_a_page_without_runs_says_where_what_is(runs: Path, claim: Claim, capsys: pytest.CaptureFixture[str]) -> None:
    # Of a kept folder a page can link to the records alone. What lies elsewhere is named by its folder, without the place on the machine that made it.
    from harness import cli

    shutil.rmtree(runs)
    key = next(r.key for r in claim.archive.kept if r.status == "done")
    said = f'in <a href="{{}}">{NAME}</a>; log and checkpoint in <code>evaluate-linear-{key}</code> of the runs folder it was made in<!-- end -->'
    assert said.format(NAME) in claim.page() and str(runs) not in claim.page()
    earlier = re.sub(rf"(<!-- of files: {key} -->).*?(<!-- end -->)", rf"\1: its record is a line of {NAME}, as an older page said\2", claim.page())
    (claim.folder / "report.html").write_text(earlier)
    claim.again()
    assert said.format(NAME) in (claim.folder / "report.html").read_text()
    (elsewhere := runs.parent / "elsewhere").mkdir()
    assert cli.main(["report", "--runs", str(claim.folder), "--out", str(elsewhere / "page.html"), "--no-image-noise"]) == 0
    assert said.format(f"../claim/{NAME}") in (elsewhere / "page.html").read_text()


def test_status_of_kept_records_is_that_of_the_runs(runs: Path, claim: Claim, capsys: pytest.CaptureFixture[str]) -> None:
    from harness import cli

    def said(*words: str) -> tuple[str, ...]:
        found = []
        for folder in (runs, claim.folder):
            assert cli.main(["status", *words, "--runs", str(folder)]) == 0
            found.append(capsys.readouterr().out)
        return tuple(found)

    live, kept = said()
    assert kept.splitlines() == [line for line in live.splitlines() if " other " not in line]
    assert kept.count("done ") == 10 and "coco-mae seed 0: no such" in kept
    for folder in Archive((claim.folder,)).folders():
        live, kept = said(folder.name)
        assert kept == live or "failed: no such" in kept, "a job without a record is kept without the places of its data"
    mae = next(r.key for r in asked(runs) if r.method == "mae" and r.settings == "1")  # started a day after the other setting
    assert "\nkey: since evaluate-linear-" in said(mae)[1] and "changed: plugin.lr 2 -> 1\n" in said(mae)[1] and "\ndata: imagenet abab" in said(mae)[1]
    assert cli.main(["status", "evaluate-linear", "--runs", str(claim.folder)]) == 2
    assert "6 runs fit: did you mean evaluate-linear-" in capsys.readouterr().err
    assert cli.main(["status", mae[:-1] + "x", "--runs", str(claim.folder)]) == 2
    assert f"no such run: did you mean evaluate-linear-{mae}? " in capsys.readouterr().err


@pytest.mark.parametrize(("content", "line"), [
    (b"no gzip", r"records.jsonl.gz: damaged \(BadGzipFile"), (gzip.compress(b'{"schema": 9}\n'), "kept records of schema version 9, this harness reads 1"),
    (gzip.compress(b'{"schema": 1}\n{"cell": {}}\n'), r"damaged \(KeyError"), (gzip.compress(b"")[:10] + b"\xff" * 20, r"damaged \(error: Error -3"),
    (gzip.compress(b'{"schema": 1}\n{"folder": "a-b", "record": {"schema": 1, "key": "b"}}\n'), r"damaged \(ValueError: kind, name, identity of b missing"),
    (gzip.compress(b'{"schema": 1}\n{"folder": "a-b", "record": {"schema": 7}}\n'), "a record of schema version 7, this harness reads 1"),
], ids=["no gzip", "another version", "a cell without fields", "no deflate", "a record without fields", "another record's version"])
def test_a_damaged_file_is_one_line(content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match=line):
        read_kept(tmp_path)


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_what_is_kept_equals_what_the_records_say(folder: Path) -> None:
    """After a change of an evaluator's version or of how tables look: `python -m results.claims results/*/plan.py` writes all of it again."""
    claim = read_plan(folder / "plan.py")
    (request,) = claim.requests
    wanted = {(m, e, s) for m in request.methods for e in request.evals for s in request.seeds}
    assert {(r.method, r.eval, r.seed) for r in claim.archive.kept} == wanted and len(claim.archive.kept) == len(wanted)
    tables = claim.tables()
    assert {name: (folder / name).read_bytes() for name in tables} == tables
    assert of_records((folder / "report.html").read_text()) == of_records(claim.page())
