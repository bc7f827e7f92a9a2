"""What a plan costs is estimated from measurements only: scaled, on the same device, nothing for what is done, and refused where it is not known."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from folders import written

from harness.collect import collect
from harness.data import read_images
from harness.jobs import Node
from harness.plan import Planner
from harness.request import Plan, Request
from harness.spec import UserError
from harness.store import Store
from results import throughput
from results.ancestry import Archive
from results.budget import Budget
from results.kept import NAME, pack

HERE, OTHER = {"device": "cpu", "cpu": "Test", "threads": 2, "cores": 2}, {"device": "Big GPU", "cpu": "Test", "threads": 2, "cores": 2}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("results.budget.hardware_here", lambda: "Test, 2 threads")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "runs")
    found.prepare()
    return found


def plan(data: Path, methods: str, evals: str, *settings: str, protocol: str = "smoke") -> Plan:
    return Planner(Request(tuple(methods.split(",")), tuple(evals.split(",")), protocol, data=str(data), settings=settings, precision="bf16")).plan()


def measure(store: Store, node: Node, hours: float, hardware: dict[str, Any] = HERE, **fields: object) -> None:
    images = node.recipe.iterations * node.recipe.batch if node.recipe and node.recipe.iterations else 0
    written(store.root, node, hours, **{"images_seen": images, "hardware": hardware, **fields})


def budget(plan: Plan, store: Store, force: bool = False, launcher: object = None) -> Budget:
    return Budget(plan, store, force, launcher)


def test_hours_scale_with_images_and_what_is_done_costs_nothing(smoke_data: Path, store: Store) -> None:
    before = plan(smoke_data, "mae", "imagenet")
    pretrain, evaluate = before.nodes
    measure(store, pretrain, 2.0)
    measure(store, evaluate, 0.5)
    assert budget(before, store).total == 0.0 and budget(before, store, force=True).total == pytest.approx(2.5)
    steps = pretrain.recipe.iterations
    longer = plan(smoke_data, "mae,scratch", "imagenet", f"mae.recipe.iterations={3 * steps}")
    found = budget(longer, store)
    assert [found.estimates[n.key].hours for n in longer.nodes] == [pytest.approx(6.0), pytest.approx(0.5), 0.0, pytest.approx(0.5)]
    assert "as pretrain-mae-" in found.words(longer.nodes[0]) and str(found) == "total: 7 device-hours"


def test_a_probe_on_stored_features_costs_by_images_and_not_by_epochs(smoke_data: Path, store: Store) -> None:
    images = len(read_images("imagenet", "train", smoke_data / "imagenet"))
    before = plan(smoke_data, "scratch", "linear")
    measure(store, before.nodes[1], 1.0, images_seen=images // 2, facts={"epochs_on_features": 90.0})
    longer = plan(smoke_data, "scratch", "linear", "linear.recipe.epochs=7")
    assert budget(longer, store).total == pytest.approx(2.0, rel=0.02)
    held_out = plan(smoke_data, "scratch", "linear", "linear.recipe.epochs=7", "linear.holdout=0.5")
    assert budget(held_out, store).total == pytest.approx(1.0, rel=0.02)


def test_flops_are_those_that_a_record_has_counted_for_the_same_computation(smoke_data: Path, store: Store) -> None:
    before = plan(smoke_data, "mae", "imagenet")
    for node, flops in zip(before.nodes, (6e9, 2e9), strict=True):
        measure(store, node, 1.0, OTHER, flops=flops)  # on other hardware: FLOPs are the same there
    steps = before.nodes[0].recipe.iterations
    longer = plan(smoke_data, "mae,scratch", "imagenet", f"mae.recipe.iterations={3 * steps}", "mae.recipe.lr=0.1")
    found = budget(longer, store)
    assert [found.flops(n) for n in longer.nodes] == [pytest.approx(18e9), pytest.approx(2e9), 0.0, pytest.approx(2e9)]
    hidden = plan(smoke_data, "mae", "imagenet", "mae.mask_ratio=0.5").nodes[0]
    assert (found.flops(hidden) or 0.0) > 1e11, "another share of patches is another computation: counted, not taken from what is recorded above"
    assert found.flops(plan(smoke_data, "mae", "linear").nodes[-1]) is None, "what an evaluator does is known from records alone"
    job = before.nodes[0].job(Path())
    published = {**job, "identity": {**job["identity"], "files": {"tokenizer": "ab"}}}
    assert throughput.computation(published) != throughput.computation(job), "so is a network from a file beside the ViT"


def test_the_shipped_figures_are_those_of_kept_records(
        smoke_data: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = plan(smoke_data, "mae", "imagenet")
    for node in before.nodes:
        measure(store, node, 1.0, flops=6e9)
    (tmp_path / NAME).write_bytes(pack(collect([store.root]), Archive((store.root,))))
    throughput.main([str(tmp_path)])
    (tmp_path / "throughput.csv").write_text(capsys.readouterr().out)
    monkeypatch.setattr(throughput, "SHIPPED", tmp_path / "throughput.csv")
    throughput.shipped.cache_clear()
    found = {(f.work, f.hours, f.flops, f.computed) for f in throughput.shipped()}
    throughput.shipped.cache_clear()
    assert found == {(f.work, f.hours, f.flops, f.computed) for f in throughput.measured(store)} and len(found) == 2
    with pytest.raises(SystemExit, match="no kept records there"):
        throughput.main([str(store.root)])


def test_only_the_same_device_counts_and_elsewhere_what_was_measured_there(smoke_data: Path, store: Store) -> None:
    before = plan(smoke_data, "mae", "imagenet", "mae.recipe.lr=0.0003")
    for node in before.nodes:
        measure(store, node, 2.0, OTHER)
    now = plan(smoke_data, "mae", "imagenet")
    found = budget(now, store)
    assert found.unknown == list(now.nodes) and "nothing like it was measured on Test, 2 threads" in found.words(now.nodes[0])
    assert budget(now, store, launcher=SimpleNamespace(precision="bf16")).total == pytest.approx(4.0)


def test_the_shipped_table_knows_the_demo(smoke_data: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its rows are found by what a job does: a change of these words would leave the table there and unused.
    monkeypatch.setattr("results.budget.hardware_here", lambda: "AMD EPYC, 1 thread")
    demo = plan(smoke_data, "scratch,supervised,beit,mae", "imagenet,linear,ade20k,coco", protocol="demo")
    found = budget(demo, store)
    unknown = {n.about["title"] for n in found.unknown}
    assert unknown == {"evaluate imagenet on supervised"} and 0.3 < found.total < 3  # its own classifier is scored on other images here


def test_a_plan_over_the_budget_is_refused_with_what_is_dearest(smoke_data: Path, store: Store) -> None:
    now = plan(smoke_data, "mae,scratch", "imagenet")
    measure(store, plan(smoke_data, "mae", "imagenet", "mae.recipe.lr=0.0003").nodes[0], 3.0)
    found = budget(now, store)
    with pytest.raises(UserError, match=r"^--budget 2: the plan needs at least 3 device-hours, most for pretrain mae seed 0 \(3\): raise it, or ask for less$"):
        found.check(2.0)
    with pytest.raises(UserError, match=r"--budget 4: 2 of 4 nodes .* evaluate imagenet on mae .* the others 3 device-hours: run it once with less"):
        found.check(4.0)
    measure(store, plan(smoke_data, "mae", "imagenet", "imagenet.recipe.lr=0.0003").nodes[1], 0.25)
    budget(now, store).check(4.0)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="hours are a number above 0"):
            found.check(wrong)


def test_of_what_comes_later_the_dearest_counts(smoke_data: Path, store: Store) -> None:
    now = plan(smoke_data, "mae", "imagenet")
    steps = now.nodes[0].recipe.iterations
    measure(store, now.nodes[0], 1.0)
    measure(store, now.nodes[1], 1.0)
    one, two = (plan(smoke_data, "mae", "imagenet", f"mae.recipe.iterations={k * steps}") for k in (2, 3))
    found = budget(Plan(now.nodes, (), now.protocol, (one.nodes, two.nodes)), store)
    assert found.total == pytest.approx(3 + 1) and str(found) == "total: 4 device-hours, with 2 nodes of what comes then"


def test_run_refuses_before_anything_starts(harness: Callable[..., subprocess.CompletedProcess[str]], smoke_data: Path, tmp_path: Path) -> None:
    line = ("run", "--methods", "scratch", "--evals", "knn", "--protocol", "smoke")
    done = harness(*line, "--budget", "5")
    assert done.returncode == 2 and done.stderr.startswith("harness: --budget 5: 1 of 2 nodes cost nobody knows what") and done.stderr.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*-*")) and done.stdout == ""
    shown = harness(*line, "--dry-run")
    assert shown.returncode == 0 and "device-hours unknown" in shown.stdout and "total: 0 device-hours, and 1 node of which it is not known" in shown.stdout
