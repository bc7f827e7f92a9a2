"""What the plan makes of a request: which settings deviate, which cells share a node."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.plan import Planner
from harness.request import Plan, Request


def plan(smoke_data: Path, methods: str, evals: str, **fields: object) -> Plan:
    return Planner(Request(methods=tuple(methods.split(",")), evals=tuple(evals.split(",")), protocol="smoke", data=str(smoke_data), **fields)).plan()


def test_a_value_that_is_the_recipes_own_is_no_deviation(smoke_data: Path) -> None:
    """A footnote that says "0.750 (recipe: 0.75)" would be untrue, and the key is the same."""
    same = plan(smoke_data, "mae", "linear", settings=("mae.mask_ratio=0.750",))
    assert same.cells[0].about["deviations"] == []
    assert [n.key for n in same.nodes] == [n.key for n in plan(smoke_data, "mae", "linear").nodes]
    other = plan(smoke_data, "mae", "linear", settings=("mae.mask_ratio=0.5",))
    assert other.cells[0].about["deviations"] == ["mae.mask_ratio=0.5 (recipe: 0.75)"]


def test_an_own_classifier_is_scored_once_whatever_the_fine_tuning_seeds(smoke_data: Path) -> None:
    """Two fine-tuning seeds of a score that trains nothing are not two measurements."""
    shared = plan(smoke_data, "supervised", "imagenet", eval_seeds=(0, 1))
    assert len({c.node.key for c in shared.cells if c.node}) == 1
    trained = plan(smoke_data, "supervised", "imagenet", eval_seeds=(0, 1), tuning="shared")
    assert len({c.node.key for c in trained.cells if c.node}) == 2


def test_pre_training_is_shared_and_a_tokenizer_too(smoke_data: Path) -> None:
    """Four evaluators share one pre-training; methods on tokens of one seed share the tokenizer."""
    found = plan(smoke_data, "beit,beit@random", "imagenet,linear")
    assert [n.kind for n in found.nodes].count("asset") == 1
    assert [n.kind for n in found.nodes].count("pretrain") == 2
    assert [n.kind for n in found.nodes].count("evaluate") == 4


@pytest.mark.parametrize("setting,changed", [
    ("linear.recipe.lr=0.5", {"evaluate"}), ("beit.recipe.lr=0.5", {"pretrain", "evaluate"}), ("dvae.recipe.lr=0.5", {"asset", "pretrain", "evaluate"}),
])
def test_a_field_changes_its_node_and_what_depends_on_it(setting: str, changed: set[str], smoke_data: Path) -> None:
    before, after = (plan(smoke_data, "beit", "linear", settings=s) for s in ((), (setting,)))
    assert {b.kind for b, a in zip(before.nodes, after.nodes, strict=True) if a.key != b.key} == changed


def test_seeds_change_every_key_and_no_setting(smoke_data: Path) -> None:
    zero, one = (plan(smoke_data, "mae", "linear", seeds=(s,)) for s in (0, 1))
    assert not {n.key for n in zero.nodes} & {n.key for n in one.nodes}
    assert zero.cells[0].about["settings"] == one.cells[0].about["settings"]
