"""The fairness audit: what differs is found, what is measured is not compared to the last digit, what is not known is not called equal."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from folders import written

from harness.canonical import canonical
from harness.plan import Planner
from harness.request import Request
from harness.spec import Augment, Recipe, UserError, ViTConfig
from harness.store import Store
from harness.vit import ViT
from results.ancestry import Step
from results.audit import Item, audit, parameters, stamp
from results.audit_command import Audit, as_text, planned


def trail(length: int = 100, hours: float = 1.0, tokenizer: bool = False, **fields: object) -> dict[str, tuple[Step, ...]]:
    """Evaluator -> evaluation and pre-training of a method."""
    recipe = canonical(Recipe(batch=8, lr=1.0, iterations=length, augment=Augment(smoothing=0.1 if fields.pop("smooth", False) else 0.0)))
    vit = canonical(ViTConfig(size=(64, 64), patch=8, width=64, depth=2, heads=2))
    usual = {"images_seen": 8 * length, "flops": 1e12 * hours, "device_hours": hours, "facts": {}}

    def step(role: str, identity: dict, **more: object) -> Step:
        kind = {"evaluation": "evaluate", "checkpoint": "pretrain"}.get(role, "asset")
        return Step(role, role, None, {"kind": kind, **usual, "about": {"labels": fields.get("labels", False)}, **more, "identity": identity})

    evaluation = step("evaluation", {"plugin": {"class": "a:B", "layer": 3}, "recipe": recipe, "use_head": False, "data": {"imagenet": "ab" * 8}})
    training = step("checkpoint", {"plugin": {"class": "a:C"}, "recipe": recipe, "vit": vit, "data": {"imagenet": "cd" * 8}, "files": fields.get("files", {})})
    asset = [step("tokenizer", {"recipe": recipe, "data": {"other": "ef" * 8}})] if tokenizer else []
    return {"linear": (evaluation, training, *asset)}


def verdicts(**methods: dict[str, tuple[Step, ...]]) -> dict[str, str]:
    same = dict.fromkeys(methods, "1")
    return {i.name: i.verdict for i in audit(methods, same, same)}


def test_equal_rows_are_equal_in_everything() -> None:
    assert set(verdicts(a=trail(), b=trail()).values()) == {"equal"}


@pytest.mark.parametrize(("fields", "item"), [
    ({"length": 200}, "images and crops seen"), ({"length": 200}, "pre-training length"), ({"hours": 1.5}, "pre-training device-hours"),
    ({"tokenizer": True}, "tokenizer and its data"), ({"labels": True}, "labels used in pre-training"), ({"smooth": True}, "augmentation"),
    ({"files": {"tokenizer": "0" * 64}}, "tokenizer and its data"),
])
def test_what_differs_is_found(fields: dict, item: str) -> None:
    assert verdicts(a=trail(), b=trail(**fields))[item] == "unequal"


def test_measured_items_have_a_tolerance() -> None:
    # Device-hours are never equal to the last digit: 5 % is the same, 20 % is not.
    assert verdicts(a=trail(), b=trail(hours=1.05))["pre-training device-hours"] == "equal"
    assert verdicts(a=trail(), b=trail(hours=1.25))["pre-training device-hours"] == "unequal"


def test_measured_items_are_means_over_all_seeds() -> None:
    # The last seed had the machine for itself in both rows; the first of b did not. The table's cost columns say 1 and 2 hours, and so does the audit.
    methods, same = {"a": trail(), "b": trail()}, {"a": "2", "b": "2"}
    every = {"a": [trail()["linear"], trail()["linear"]], "b": [trail(hours=3.0)["linear"], trail()["linear"]]}
    item = next(i for i in audit(methods, same, same, every) if i.name == "pre-training device-hours")
    assert item.measured == {"a": 1.0, "b": 2.0} and item.verdict == "unequal"
    gone = Step("checkpoint", "checkpoint", None, None)
    item = next(i for i in audit(methods, same, same, {**every, "a": [(every["a"][0][0], gone), every["a"][1]]}) if i.name == "pre-training FLOPs")
    assert item.verdict == "not known"  # of one seed of a


def test_hours_of_different_devices_are_not_one_measure() -> None:
    hours = "pre-training device-hours"

    def on(name: str) -> dict[str, tuple[Step, ...]]:
        hardware = {"device": "cpu", "cpu": name} if "GPU" not in name else {"device": name, "cpu": "any"}
        return {"linear": tuple(replace(s, record={**(s.record or {}), "hardware": hardware}) for s in trail()["linear"])}

    assert verdicts(a=on("A"), b=on("A"))[hours] == "equal"
    methods, same = {"a": on("A"), "b": on("a GPU")}, {"a": "1", "b": "1"}
    item = next(i for i in audit(methods, same, same) if i.name == hours)
    assert item.verdict == "unequal" and item.values == {"a": "1 h on A", "b": "1 h on a GPU"}


def test_what_is_not_known_is_not_called_equal() -> None:
    # A checkpoint of somebody else's: nobody knows its images or labels, and two such rows are not equal for that.
    found = verdicts(a=trail(files={"weights": "0" * 64}), b=trail(files={"weights": "1" * 64}))
    assert found["images and crops seen"] == found["labels used in pre-training"] == found["pre-training FLOPs"] == "not known"
    evaluation, training = trail()["linear"]
    gone = {"linear": (evaluation, Step("checkpoint", training.key, None, None))}
    assert verdicts(a=gone, b=trail())["pre-training FLOPs"] == "not known"
    # A third row that cannot be asked does not hide that two others differ.
    assert verdicts(a=gone, b=trail(), c=trail(hours=2.0))["pre-training FLOPs"] == "unequal"
    assert verdicts(a=gone, b=trail(), c=trail(length=200))["pre-training length"] == "unequal"


def test_fine_tuning_on_the_way_to_a_score_is_no_pre_training() -> None:
    # ImageNet-A's checkpoint is ImageNet's fine-tuned model; its row must not look longer pre-trained than one that has ImageNet only.
    evaluation, training = trail()["linear"]
    tuned = Step("checkpoint", "tuned", None, evaluation.record)
    assert verdicts(a={"imagenet-a": (evaluation, tuned, training)}, b={"imagenet-a": (evaluation, training)})["images and crops seen"] == "equal"


def test_the_stamp_names_what_is_unequal() -> None:
    items = (Item("x", {"a": "1", "b": "1"}), Item("y", {"a": "1", "b": "2"}), Item("z", {"a": "1", "b": "not known"}))
    assert stamp((*items, Item("of a alone", {"a": "not known"}))) == stamp(items)
    assert stamp(items) == "Fairness audit: 1 of 3 items equal; unequal: y; not known: z. Who had what: harness audit." and stamp(()) == ""
    assert as_text("t", items).splitlines()[1:] == ["unequal    y  a: 1; b: 2", "not known  z  a: 1; b: not known", "equal      x  1"]


def test_a_single_row_says_what_it_had_and_is_compared_with_nothing() -> None:
    # Its trials are of interest before there is a rival: a value of a sweep was chosen among three.
    items = audit({"a": trail()}, {"a": "3 on linear"}, {"a": "1"})
    lines = as_text("t", items).splitlines()
    assert lines[0] == "t: one row, nothing to compare it with; a had" and "hyper-parameter trials 3 on linear" in (" ".join(line.split()) for line in lines)
    assert {i.verdict for i in items} == {"single row"} and stamp(items) == "" and as_text("t", ()).startswith("t: no row with a score")


@pytest.mark.parametrize("config", [
    ViTConfig(size=(32, 32), patch=8, width=32, depth=2, heads=2), ViTConfig(size=(32, 48), patch=8, width=32, depth=2, heads=2, relative_bias="shared"),
    ViTConfig(size=(32, 32), patch=8, width=32, depth=3, heads=2, relative_bias="block", positions="none", layer_scale=0.1, key_bias=False),
    ViTConfig(size=(32, 32), patch=16, width=32, depth=1, heads=2, positions="sincos-mae", mlp_ratio=2.0),
])
def test_parameters_are_counted_as_the_vit_has_them(config: ViTConfig) -> None:
    assert parameters(canonical(config)) == f"{sum(p.numel() for p in ViT(config).parameters()):,}"


def test_a_plan_is_audited_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    Audit.add_arguments(parser)
    words = ["--plan", "--methods", "mae,supervised", "--evals", "linear", "--protocol", "smoke"]
    assert Audit().run(parser.parse_args([*words, "--format", "json"])) == 0
    items = {i["item"]: i["verdict"] for i in json.loads(capsys.readouterr().out)[0]["items"]}
    assert items["labels used in pre-training"] == "unequal" and items["linear: fine-tuning recipe"] == "equal" and items["architecture"] == "equal"
    assert {items[f"pre-training {what}, estimated"] for what in ("FLOPs", "device-hours")} <= {"equal", "unequal", "not known"}
    with pytest.raises(UserError, match="add --plan"):
        Audit().run(parser.parse_args(["--tuning", "shared", "--runs", str(Path("nowhere"))]))


def test_a_plan_says_the_hours_and_flops_that_were_measured_for_the_like(smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("results.budget.hardware_here", lambda: "Test, 2 threads")
    monkeypatch.setattr("results.budget.shipped", lambda: ())
    Store(tmp_path).prepare()
    node = Planner(Request(("mae",), ("linear",), "smoke", data=str(smoke_data))).plan().nodes[0]
    hardware = {"device": "cpu", "cpu": "Test", "threads": 2, "cores": 2}
    written(tmp_path, node, 2.0, images_seen=node.recipe.iterations * node.recipe.batch, hardware=hardware, flops=6e9)
    parser = argparse.ArgumentParser()
    Audit.add_arguments(parser)
    words = ["--plan", "--methods", "mae,scratch,supervised", "--evals", "linear", "--protocol", "smoke", "--data", str(smoke_data), "--runs", str(tmp_path)]
    items = {i.name: i for i in planned(parser.parse_args(words))}
    hours = items["pre-training device-hours, estimated"]
    assert items["pre-training FLOPs, estimated"].values == {"mae": "6e+09", "scratch": "none", "supervised": "2.52e+11"}  # recorded, none, counted
    assert hours.values == {"mae": "2 h", "scratch": "none", "supervised": "not known"} and hours.verdict == "unequal"  # whatever supervised takes
