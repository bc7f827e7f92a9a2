"""FLOPs before anything has run are those that the worker counts in its second step."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.jobs import Node
from harness.plan import Planner
from harness.request import Request
from harness.store import Store, read_record
from results.ancestry import Archive
from results.budget import Budget
from results.flops import step_flops

DEMO = Path(__file__).resolve().parents[2] / "results" / "demo"
SHAPES = [str(index) for index in range(10)]  # the classes of the demo's ImageNet


def node_of(record: Any, archive: Archive) -> Node:
    """The node that a record is of, without the places of its data."""
    parents = {role: node_of(archive.record(archive.folder(p["key"])), archive) for role, p in record["parents"].items()}
    return Node(record["kind"], record["name"], record["identity"], parents, record["about"])


def test_the_demo_would_have_been_counted_as_it_was() -> None:
    archive = Archive((DEMO,))
    found = {}
    for folder in archive.folders():
        record: Any = archive.record(folder)
        if record["kind"] != "evaluate" and record["identity"]["recipe"] and record["name"] not in found:
            node = node_of(record, archive)
            assert node.key == record["key"]
            step = step_flops(node, SHAPES if record["about"].get("labels") else ())
            found[record["name"]] = step and step * node.recipe.iterations / record["flops"]
    # These records counted the first step, and a dVAE's also made its start from images.
    assert found.pop("dvae") == pytest.approx(2_202_009_600 / 3_400_152_064, rel=1e-9)
    assert found == {name: pytest.approx(1, rel=1e-9) for name in ("beit", "beit-pixel", "mae", "supervised")}


def test_a_plan_says_what_the_record_will(harness: Callable[..., subprocess.CompletedProcess[str]], smoke_data: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    # A loss that couples the images of a batch has a term of its square; a teacher that a node makes reads labels.
    monkeypatch.setattr("results.budget.shipped", lambda: ())
    methods = ("moco-v3", "deit@distilled")
    settings = tuple(f"{name}.recipe.{field}={value}" for name in methods for field, value in (("iterations", 2), ("batch", 6)))
    done = harness("run", "--methods", ",".join(methods), "--evals", "knn", "--protocol", "smoke", "--launcher", "debug", *(f"--set={s}" for s in settings))
    assert done.returncode == 0, done.stderr
    plan = Planner(Request(methods, ("knn",), "smoke", data=str(smoke_data), settings=settings)).plan()
    costs = Budget(plan, Store(tmp_path / "elsewhere"), True, None)
    records = {n.name: (read_record(tmp_path / "runs" / n.folder), costs.flops(n)) for n in plan.nodes if n.kind != "evaluate"}
    assert set(methods) < set(records)
    assert {name: flops for name, (_, flops) in records.items()} == {name: pytest.approx(r["flops"], rel=1e-9) for name, (r, _) in records.items() if r}


def test_what_depends_on_numbers_is_not_known(smoke_data: Path) -> None:
    plan = Planner(Request(("igpt",), ("knn",), "smoke", data=str(smoke_data))).plan()
    assert {n.name: step_flops(n, ()) is None for n in plan.nodes if n.kind != "evaluate"} == {"palette": True, "igpt": False}
