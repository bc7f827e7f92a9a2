"""The dense evaluators beside a running table: quiet, counting up, not training twice; every labelled pixel scored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_data import make_ade20k, make_coco
from PIL import Image

from evals.openmmlab.ade20k import ADE20K
from evals.openmmlab.coco import COCO
from harness.checkpoint import Backbone, States
from harness.plugins import EvalContext, Progress, Session
from harness.randomness import seed_all
from harness.spec import JobFailed, Outcome, Protocol, ViTConfig
from harness.vit import ViT

VIT = ViTConfig(size=(32, 32), patch=8, width=24, depth=4, heads=3)
SETTING = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")
EVALUATORS: dict[str, Any] = {"ade20k": ADE20K(channels=8), "coco": COCO(side=32)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    return {"ade20k": make_ade20k(root / "ade", 4, 3), "coco": make_coco(root / "coco", 4, 3)}


def evaluate(name: str, place: Path, sets: dict[str, Path], changes: Any = None, **session: Any) -> Outcome:
    """Three steps of two images, and the score."""
    place.mkdir(parents=True, exist_ok=True)
    seed_all("checkpoint")
    checkpoint = Backbone(VIT, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), ViT(VIT).state_dict())
    lent = Session(place, 5, torch.device("cpu"), torch.float32, sets, **session)
    recipe = dataclasses.replace(EVALUATORS[name].recipe(SETTING, VIT), iterations=3, batch=2, warmup=0, **(changes or {}))
    outcome: Outcome = EVALUATORS[name].run(checkpoint, EvalContext(lent, SETTING, recipe))
    return outcome


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, sets: dict[str, Path]) -> None:
    """A job that goes on from them would fail for ever: the state of the step before stays the last one."""
    with pytest.raises(JobFailed, match=r"train: loss \S+ at step 2 of 3 \(gradient norm nan, lr .*the last good state is of step 1,"):
        evaluate("ade20k", tmp_path, sets, {"lr": 1e38, "optimizer": "sgd", "clip": None}, checkpoint_every_s=0.0)
    found = States(tmp_path / "checkpoint" / "train").latest()
    assert found is not None and found[0] == 1


@pytest.mark.parametrize("name", EVALUATORS)
def test_quiet_counting_up_and_when_finished_only_scored_again(name: str, tmp_path: Path, sets: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """OpenMMLab's pages would bury the table, the bar would stand still, or a job killed before its record would train on."""
    seen: list[Progress] = []
    first = evaluate(name, tmp_path, sets, report=seen.append)
    output = capfd.readouterr()
    assert output.out == output.err == ""
    train = [p for p in seen if p.stage == "train"]
    assert train[-1].step == train[-1].steps == 3 and train[-1].loss is not None and train[-1].images_per_s > 0
    assert [p.step for p in train] == sorted(p.step for p in train)
    assert seen[-1].stage == "evaluate" and seen[-1].step == seen[-1].steps
    seen.clear()
    again = evaluate(name, tmp_path, sets, report=seen.append)
    assert again.metrics == first.metrics and {p.stage for p in seen} == {"evaluate"}


def test_every_labelled_pixel_is_scored_once(tmp_path: Path, sets: dict[str, Path]) -> None:
    """Padding to patches, resizing or windows would lose or double pixels, and with them the score's denominator."""
    outcome = evaluate("ade20k", tmp_path, sets)
    assert outcome.outcomes is not None
    with np.load(outcome.outcomes) as saved:
        scored = np.bincount(saved["image"], saved["count"])
        paths = [sets["ade20k"] / "annotations" / "validation" / Path(str(n)).with_suffix(".png") for n in saved["names"]]
    assert scored.tolist() == [int((np.asarray(Image.open(p)) > 0).sum()) for p in paths]


def test_two_classes_are_as_good_as_any(tmp_path: Path) -> None:
    """mmseg warns about two classes and suggests another head; a user's set of two must not be scored by other rules."""
    root = make_ade20k(tmp_path / "ade", 3, 2)
    table = root / "objectInfo150.txt"
    table.write_text("\n".join(table.read_text().splitlines()[:3]) + "\n")
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(np.minimum(np.asarray(Image.open(path)), 2)).save(path)
    assert 0 <= evaluate("ade20k", tmp_path / "job", {"ade20k": root}).metrics["mIoU"] <= 100
