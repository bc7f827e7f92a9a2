"""What the plan makes of a request: which settings deviate, which cells share a node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from harness.collect import collect, note_cells
from harness.launch import write_job
from harness.plan import Planner
from harness.request import Plan, Request
from harness.settings import Settings
from harness.spec import Augment, Overrides, Recipe
from harness.store import Store


def plan(smoke_data: Path, methods: str, evals: str, **fields: object) -> Plan:
    return Planner(Request(methods=tuple(methods.split(",")), evals=tuple(evals.split(",")), protocol="smoke", data=str(smoke_data), **fields)).plan()


def test_a_value_that_is_the_recipes_own_is_no_deviation(smoke_data: Path) -> None:
    """A footnote that says "0.750 (recipe: 0.75)" would be untrue, and the key is the same."""
    same = plan(smoke_data, "mae", "linear", settings=("mae.mask_ratio=0.750",))
    assert same.cells[0].about["deviations"] == []
    assert [n.key for n in same.nodes] == [n.key for n in plan(smoke_data, "mae", "linear").nodes]
    other = plan(smoke_data, "mae", "linear", settings=("mae.mask_ratio=0.5",))
    assert other.cells[0].about["deviations"] == ["mae.mask_ratio=0.5 (recipe: 0.75; arXiv 2111.06377; facebookresearch/mae @ efb2a80 (recipes A1))"]


def test_a_deviation_names_the_source_of_the_value_that_it_replaces() -> None:
    """"ours" and "Table 8" are different things to deviate from, and the most specific line of the recipe's sources is the one that is meant."""
    sources = (("all", "Table 8"), ("epochs", "section 4.1"), ("augment", "Table 9"), ("augment.mixup", "ours"))
    recipe = Recipe(batch=8, lr=1e-3, epochs=2, augment=Augment(mixup=0.8, cutmix=1.0), sources=sources)
    words = ("mae.recipe.lr=0.1", "mae.recipe.epochs=3", "mae.recipe.augment.cutmix=0", "mae.recipe.augment.mixup=0")
    _, notes = Settings(words).apply("mae.recipe", recipe)
    assert notes == (
        "mae.recipe.lr=0.1 (recipe: 0.001; Table 8)", "mae.recipe.epochs=3 (recipe: 2; section 4.1)",
        "mae.recipe.augment.cutmix=0 (recipe: 1.0; Table 9)", "mae.recipe.augment.mixup=0 (recipe: 0.8; ours)")
    _, (note,) = Settings(["mae.recipe.lr=0.1"]).apply("mae.recipe", replace(recipe, sources=()))
    assert note == "mae.recipe.lr=0.1 (recipe: 0.001; no source given)"


def test_what_a_method_sets_for_its_transfer_has_the_source_of_the_method(smoke_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a footnote would cite the evaluator's paper for a value that the method's paper set."""
    monkeypatch.setattr("methods.mae.MAE.transfer", lambda *_: Overrides({"lr": 0.25, "warmup": 1}, source="MAE's own table"))
    words = ("linear.recipe.lr=0.5", "linear.recipe.weight_decay=0.5")
    (cell,) = plan(smoke_data, "mae", "linear", settings=words).cells
    assert cell.about["deviations"][0] == "linear.recipe.lr=0.5 (recipe: 0.25; MAE's own table)" and "MAE's own" not in cell.about["deviations"][1]


def test_what_is_set_of_a_parent_is_a_deviation_of_what_stands_on_it(smoke_data: Path) -> None:
    found = plan(smoke_data, "beit@intermediate", "knn", settings=("beit.mask_patches=50",))
    note = found.cells[0].about["deviations"]
    assert len(note) == 1 and note[0].startswith("beit.mask_patches=50")
    assert [n.about["deviations"] for n in found.nodes if n.kind == "pretrain"] == [note, note]


def test_an_evaluation_that_another_goes_on_from_has_none_of_its_deviations(smoke_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.linear.Linear.after", "imagenet", raising=False)
    found = plan(smoke_data, "mae", "linear,imagenet", settings=("linear.recipe.epochs=3", "imagenet.recipe.lr=1"))
    told = {c.about["eval"]: [d.split("=")[0] for d in c.about["deviations"]] for c in found.cells}
    assert told == {"linear": ["imagenet.recipe.lr", "linear.recipe.epochs"], "imagenet": ["imagenet.recipe.lr"]}
    assert all(c.node is not None and c.node.about["deviations"] == c.about["deviations"] for c in found.cells)


def test_what_draws_nothing_is_one_run_whatever_the_seeds(smoke_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.scratch.Scratch.seedless", True, raising=False)
    found = plan(smoke_data, "scratch,mae", "knn", seeds=(3, 4))
    assert [(c.about["method"], c.about["seed"]) for c in found.cells] == [("scratch", 0), ("mae", 3), ("mae", 4)]


def test_a_node_of_two_cells_stands_in_the_table_twice(smoke_data: Path, tmp_path: Path) -> None:
    """Whichever run made it: what is equal under both tunings is done once, and a table of the runs folder is to have both rows."""
    store = Store(tmp_path)
    for tuning in ("published", "shared", "published"):
        found = plan(smoke_data, "scratch", "knn", tuning=tuning, eval_seeds=(0, 1))
        for node in found.nodes:
            if not (store.folder(node) / "job.json").exists():
                write_job(node, store)
        note_cells(found.cells, store)
    assert [(r.tuning, r.status, r.eval_seed) for r in collect([tmp_path])] == [("published", "missing", 0), ("shared", "missing", 0)]


def test_a_record_carries_the_trainings_behind_its_checkpoint(smoke_data: Path) -> None:
    """Tables decide by them beside which published number a score may stand; an evaluation's folder may have been copied without the others."""
    (cell,) = plan(smoke_data, "beit", "linear").cells
    assert cell.node is not None
    (pretraining,) = cell.node.job(Path())["about"]["lineage"]
    assert pretraining["kind"] == "pretrain" and pretraining["recipe"]["batch"] == 32 and "tokenizer" in pretraining["parents"]
    assert "lineage" not in cell.node.about and cell.node.lineage == [pretraining]


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


def test_a_recipe_is_read_before_it_is_paid_for(smoke_data: Path, harness: Callable[..., CompletedProcess[str]]) -> None:
    """A batch or a learning rate that was misunderstood costs GPU-weeks; nothing else shows them before the first step."""
    sources = (("lr, epochs", "ours: a guess"), ("all", "Table 8"))
    assert str(Recipe(batch=4096, lr=1.5e-4, lr_batch=256, epochs=800, sources=sources)) == (
        "lr 0.00015 x 4096/256 = 0.0024, batch 4096, 800 epochs [Table 8; lr ours: a guess]")
    assert str(Recipe(batch=32, lr=1e-3, iterations=60)) == "lr 0.001, batch 32, 60 iterations [no source given]"
    line = ("run", "--methods", "mae", "--evals", "linear", "--protocol", "smoke", "--data", str(smoke_data), "--dry-run")
    shown = harness(*line, "--set", "mae.recipe.lr=0.25").stdout.splitlines()
    assert shown[1].startswith("      lr 0.25, batch 32, 60 iterations") and shown[3].startswith("      lr 0.1 x 64/64 = 0.1, batch 64, 20 epochs")
    scratch = harness("run", "--methods", "scratch", *line[3:]).stdout.splitlines()
    assert scratch[1].startswith("[2/2]")  # nothing is trained, nothing is shown


def test_keys_say_where_torch_resizes(smoke_data: Path) -> None:
    """At 64 pixels, where PIL does, keys are what they always were; an evaluation at 384 has other pixels, its pre-training has not."""
    small, large = (plan(smoke_data, "mae", "imagenet", settings=words).nodes for words in ((), ("imagenet.size=384",)))
    assert ["pixels" in n.identity for n in small] == [False, False]
    assert {n.kind: n.identity.get("pixels") for n in large} == {"pretrain": None, "evaluate": "torch"}
