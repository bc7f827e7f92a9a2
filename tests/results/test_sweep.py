"""A sweep chooses on a held-out part of train, each method for itself, and never looks at the reported split before."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from folders import written

from harness.collect import collect
from harness.launch import write_job
from harness.plan import Planner
from harness.request import Plan, Request, resolve_precision
from harness.spec import UserError
from harness.store import Store, write_json
from results.ancestry import Archive
from results.audit import of_sheet
from results.audit_command import Audit, as_text, planned
from results.cells import sheets
from results.selection import trials_of
from results.sweep import Sweep, read_words
from results.table import Table


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "runs")
    found.prepare()
    return found


def asked(data: Path, methods: str, evals: str, settings: tuple[str, ...] = (), seeds: tuple[int, ...] = (0,)) -> Request:
    return Request(tuple(methods.split(",")), tuple(evals.split(",")), "smoke", data=str(data), settings=settings, seeds=seeds, precision="bf16")


def swept(store: Store, request: Request, *words: str, retry: bool = False, again: bool = False) -> Plan:
    return Sweep(request, argparse.Namespace(sweep=list(words), force=False, retry=retry), store, again).plan()


def score(store: Store, plan: Plan, **scores: float) -> None:
    """Records of a plan's nodes. A trial's score by METHOD and value ("mae_0.1"), or by METHOD, value and seed; without one the trial fails."""
    for node in plan.nodes:
        write_job(node, store)
        if "trial" not in node.about:
            written(store.root, node, metrics={"top-1": 50.0} if node.kind == "evaluate" else {})
            continue
        name = f"{node.about['method']}_{node.about['trial'].partition('=')[2]}"
        value = scores.get(f"{name}_{node.about['seed']}", scores.get(name))
        if value is None:
            write_json(store.folder(node) / "failure.json", {"message": "loss is nan"})
        else:
            written(store.root, node, metrics={"top-1": value})


def test_the_trials_hold_out_a_part_of_train_and_nothing_is_scored_on_val(smoke_data: Path, store: Store) -> None:
    plan = swept(store, asked(smoke_data, "scratch,mae", "linear,knn"), "linear.recipe.lr=0.05,0.2")
    trials = [n for n in plan.nodes if n.kind == "evaluate"]
    assert [(n.about["method"], n.recipe.lr, n.identity["plugin"]["holdout"]) for n in trials] == [
        ("scratch", 0.05, 0.2), ("mae", 0.05, 0.2), ("scratch", 0.2, 0.2), ("mae", 0.2, 0.2)]
    assert [len(nodes) for nodes in plan.later] == [6, 6] and len(plan.nodes) == 6  # the pre-trainings are shared
    assert len({n.about["title"] for n in trials}) == 4


def test_each_method_is_reported_with_the_value_that_was_best_for_it(smoke_data: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    request, words = asked(smoke_data, "scratch,mae", "linear,knn"), "linear.recipe.lr=0.05,0.2"
    score(store, swept(store, request, words), **{"scratch_0.05": 30.0, "scratch_0.2": 20.0, "mae_0.05": 40.0, "mae_0.2": 41.0})
    plan = swept(store, request, words)
    assert plan.later == () and capsys.readouterr().err.splitlines()[1] == (
        "--sweep linear.recipe.lr: 0.2 for mae (linear top-1 on 20% of train held out: 0.05: 40.00, 0.2: 41.00)")
    nodes = {(c.about["method"], c.about["eval"]): c.node for c in plan.cells}
    for method, value in (("scratch", "0.05"), ("mae", "0.2")):  # the very nodes that --set makes: a user who knows the value finds them done
        told = Planner(asked(smoke_data, method, "linear,knn", (f"linear.recipe.lr={value}",))).plan()
        assert [nodes[method, name].key for name in ("linear", "knn")] == [c.node.key for c in told.cells if c.node]
    assert nodes["mae", "linear"].about["sweep"] == {
        "key": "linear.recipe.lr", "trials": 2, "chosen": "0.2", "scores": {"0.05": 40.0, "0.2": 41.0}, "by": "linear top-1", "held_out": 0.2}
    assert "sweep" not in nodes["mae", "knn"].about and all(n in plan.nodes for n in nodes.values())


def test_a_key_of_a_method_is_chosen_by_the_first_evaluator_for_all(smoke_data: Path, store: Store) -> None:
    request, words = asked(smoke_data, "scratch,mae", "knn,linear"), "mae.mask_ratio=0.5,0.6,0.9"
    trials = swept(store, request, words)
    assert {n.about["eval"] for n in trials.nodes if n.kind == "evaluate"} == {"knn"} and {n.about["method"] for n in trials.nodes} == {"mae"}
    assert [n.about["title"] for n in trials.nodes if n.kind == "pretrain"] == [f"pretrain mae, mae.mask_ratio={v}" for v in (0.5, 0.6, 0.9)]
    score(store, trials, **{"mae_0.5": 1.0, "mae_0.6": 3.0, "mae_0.9": 2.0})
    plan = swept(store, request, words)
    chosen = [c.node for c in plan.cells if c.node and c.about["method"] == "mae"]
    assert [n.lineage[0]["plugin"]["mask_ratio"] for n in chosen] == [0.6, 0.6] and [n.about["sweep"]["trials"] for n in chosen] == [3, 3]


def test_one_value_for_all_seeds_by_their_mean(smoke_data: Path, store: Store) -> None:
    request, words = asked(smoke_data, "scratch", "linear", seeds=(0, 1)), "linear.recipe.lr=0.05,0.2"
    score(store, swept(store, request, words), **{"scratch_0.05_0": 50.0, "scratch_0.05_1": 10.0, "scratch_0.2_0": 40.0, "scratch_0.2_1": 40.0})
    assert [c.node.recipe.lr for c in swept(store, request, words).cells if c.node] == [0.2, 0.2]


def test_a_failed_trial_is_out_of_the_choice_until_it_is_retried(smoke_data: Path, store: Store) -> None:
    request, words = asked(smoke_data, "scratch,mae", "linear"), "linear.recipe.lr=0.05,100"
    score(store, swept(store, request, words), **{"scratch_0.05": 30.0})
    plan = swept(store, request, words)
    scratch, mae = (c.node for c in plan.cells)
    assert scratch.recipe.lr == 0.05 and scratch.about["sweep"]["scores"] == {"0.05": 30.0, "100": None} and scratch.about["sweep"]["trials"] == 2
    assert store.explain(store.folder(mae)).status == "failed" and mae in plan.nodes  # nothing came through: the table says why
    assert swept(store, request, words, retry=True).later and not swept(store, request, words, retry=True, again=True).later


def test_trials_stay_out_of_tables_and_count_in_the_audit(smoke_data: Path, store: Store) -> None:
    request, words = asked(smoke_data, "scratch", "linear"), "linear.recipe.lr=0.05,0.1,0.2"
    trials = swept(store, request, words)
    score(store, trials, **{"scratch_0.05": 30.0, "scratch_0.1": 31.0, "scratch_0.2": 20.0})
    assert collect([store.root]) == []
    score(store, swept(store, request, words))
    for gone in (False, True):  # the record itself says how many there were
        for node in trials.nodes if gone else ():
            shutil.rmtree(store.folder(node))
        (result,) = collect([store.root])
        (sheet,) = sheets([result])
        found = trials_of(sheet, Archive((store.root,)))["scratch", "linear"]
        assert result.metrics == {"top-1": 50.0} and (found.count, found.count_on_test) == (3, 1)
        assert "- Chosen on a held-out part of train: scratch on linear (linear.recipe.lr of 3 values)." in Table.render([result], folders=[store.root])
        said = as_text("t", of_sheet(sheet, Archive((store.root,))))  # of a single row too
        assert "3 on linear (linear.recipe.lr by a held-out part of train)" in said


def test_the_audit_of_a_plan_counts_the_trials_that_it_would_make(smoke_data: Path, store: Store) -> None:
    parser = argparse.ArgumentParser()
    Audit.add_arguments(parser)
    sweep = ("linear.recipe.lr=0.05,0.1,0.2", "mae.mask_ratio=0.5,0.6")
    line = ["--plan", "--methods", "scratch,mae", "--protocol", "smoke", "--data", str(smoke_data), "--runs", str(store.root)]

    def items(*words: str) -> dict[str, dict[str, str]]:
        return {i.name: dict(i.values) for i in planned(parser.parse_args([*line, *words]))}

    before = items("--evals", "linear", "--sweep", sweep[0])
    of_three = "3 on linear (linear.recipe.lr by a held-out part of train)"
    assert before["hyper-parameter trials"] == {"scratch": of_three, "mae": of_three}
    recipe = before["linear: fine-tuning recipe"]["mae"]
    assert recipe.startswith("not known before the trials: lr 0.05 at batch") and recipe.count(" or lr 0.") == 2
    assert before["linear: fine-tuning budget"] == items("--evals", "linear")["linear: fine-tuning budget"]
    swept_method = items("--evals", "knn,linear", "--sweep", sweep[1])["hyper-parameter trials"]
    assert swept_method["scratch"] == "1 for each evaluator" and swept_method["mae"].count("2 on ") == 2
    request = replace(asked(smoke_data, "scratch,mae", "linear"), precision=resolve_precision())  # as a plan has it that does not say
    score(store, swept(store, request, sweep[0]), **{"scratch_0.05": 30.0, "mae_0.1": 31.0})
    chosen = items("--evals", "linear", "--sweep", sweep[0])
    assert {m: v[:7] for m, v in chosen["linear: fine-tuning recipe"].items()} == {"scratch": "lr 0.05", "mae": "lr 0.1 "}
    score(store, swept(store, request, sweep[0]))
    (sheet,) = sheets(collect([store.root]))
    after = {i.name: dict(i.values) for i in of_sheet(sheet, Archive((store.root,)))}
    assert chosen["hyper-parameter trials"] == before["hyper-parameter trials"] == after["hyper-parameter trials"]
    more = items("--evals", "linear", "--set", "linear.recipe.lr=0.4")["hyper-parameter trials"]  # beside what the runs folder has
    assert more["mae"].startswith("4 on linear")


@pytest.mark.parametrize("words, said", [
    (("linear.recipe.lr=0.1",), "one value is no sweep: give two or more, or --set linear.recipe.lr=0.1"),
    (("linear=1,2",), "expected NAME.FIELD=V1,V2"),
    (("linear.recipe.lr=1,2", "linear.recipe.lr=3,4"), "--sweep linear.recipe.lr: given twice"),
    (("linear.recipe.lrr=1,2",), "--sweep linear.recipe.lrr: linear.recipe has no field 'lrr': did you mean lr?"),
    (("linear.recipe.lr=1,x",), "--sweep linear.recipe.lr=x: not a value of type float"),
    (("linear.recipe.lr=0.3,0.30",), "give values that differ"),
    (("coco.recipe.lr=1,2",), "--sweep coco.recipe.lr: no such method or evaluator in this run"),
    (("linear.holdout=0.1,0.2",), "holds out a part of train by itself"),
    (("linear.recipe.lr=1,2", "mae.mask_ratio=0.5,0.6"), "linear.recipe.lr and mae.mask_ratio both change linear on mae: sweep one"),
])
def test_what_cannot_be_swept_is_one_line(smoke_data: Path, store: Store, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=r"^--") as error:
        swept(store, asked(smoke_data, "mae", "linear,knn"), *words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_two_keys_that_do_not_meet_are_two_sweeps(smoke_data: Path, store: Store) -> None:
    request, words = asked(smoke_data, "scratch", "linear,knn"), ("linear.recipe.lr=0.05,0.2", "knn.k=3,5")
    trials = swept(store, request, *words)
    assert len(trials.nodes) == 5  # the pre-training and two trials each, no grid
    score(store, trials, **{"scratch_0.05": 1.0, "scratch_0.2": 2.0, "scratch_3": 1.0, "scratch_5": 2.0})
    linear, knn = (c.node for c in swept(store, request, *words).cells)
    assert (linear.recipe.lr, knn.identity["plugin"]["k"]) == (0.2, 5)
    assert read_words(["a.betas=(0.9,0.95),(0.9,0.999)"]) == {"a.betas": ("(0.9,0.95)", "(0.9,0.999)")}


def test_run_tries_chooses_reports_and_does_nothing_twice(harness: Callable[..., subprocess.CompletedProcess[str]], smoke_data: Path, tmp_path: Path) -> None:
    line = ("run", "--methods", "scratch", "--evals", "linear", "--protocol", "smoke", "--sweep", "linear.recipe.lr=0.05,0.2", "--launcher", "debug")
    done = harness(*line)
    assert done.returncode == 0 and "| scratch" in done.stdout and "linear top-1 on 20% of train held out" in done.stderr, done.stderr
    records = {p: json.loads(p.read_text()) for p in (tmp_path / "runs").glob("evaluate-*/record.json")}
    (reported,) = (r for r in records.values() if "sweep" in r["about"])
    assert len(records) == 3 and reported["identity"]["plugin"]["holdout"] == 0 and reported["about"]["sweep"]["trials"] == 2
    times = {p: p.stat().st_mtime_ns for p in records}
    again = harness(*line)
    assert again.returncode == 0 and again.stdout == done.stdout and "to do" not in again.stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("evaluate-*/record.json")} == times
    assert harness(*line, "--force").returncode == 2
