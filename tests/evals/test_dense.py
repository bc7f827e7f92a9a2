"""The dense evaluators as a user meets them: numbers that survive being killed, images of any size, broken files named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from dense_data import make_ade20k, make_coco, picture
from PIL import Image

from evals.openmmlab.ade20k import ADE20K
from evals.openmmlab.coco import COCO
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Progress, Session
from harness.randomness import seed_all
from harness.spec import Interrupted, JobFailed, Outcome, Protocol, Recipe, ViTConfig
from harness.vit import ViT

VIT = ViTConfig(size=(32, 32), patch=8, width=32, depth=4, heads=2)
SETTING = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")
EVALUATORS = {"ade20k": ADE20K(channels=8), "coco": COCO(side=64)}


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    return {"ade20k": make_ade20k(root / "ADEChallengeData2016"), "coco": make_coco(root / "coco")}


@pytest.fixture(scope="session")
def checkpoint() -> Backbone:
    seed_all("tiny")
    return Backbone(VIT, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), ViT(VIT).state_dict())


def recipe_of(name: str, **changes: Any) -> Recipe:
    recipe = EVALUATORS[name].recipe(SETTING, VIT)
    assert recipe is not None
    return dataclasses.replace(recipe, **({"batch": 2, "iterations": 4, "warmup": 1} | changes))


def evaluate(
    name: str, checkpoint: Backbone, folder: Path, sets: dict[str, Path], *, evaluator: Any = None, recipe: Recipe | None = None, **session: Any
) -> tuple[Outcome, Session]:
    folder.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {"seed": 3, "device": torch.device("cpu"), "dtype": torch.float32, "folders": sets, "checkpoint_every_s": 0.0}
    lent = Session(dir=folder, **(defaults | session))
    return (evaluator or EVALUATORS[name]).run(checkpoint, EvalContext(lent, SETTING, recipe or recipe_of(name))), lent


@pytest.fixture(scope="session")
def uninterrupted(checkpoint: Backbone, sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, Path]]:
    done: dict[str, tuple[Outcome, Path]] = {}

    def get(name: str) -> tuple[Outcome, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp(f"{name}-whole")
            done[name] = evaluate(name, checkpoint, folder, sets)[0], folder
        return done[name]

    return get


def states(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoint" / "train").glob("state-*.pt"))


def same_training(a: Path, b: Path) -> bool:
    left, right = (torch.load(states(f)[-1], weights_only=True)["model"] for f in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_listing_evaluators_does_not_load_openmmlab() -> None:
    code = "import sys, evals.openmmlab.ade20k, evals.openmmlab.coco; print([m for m in ('mmengine', 'mmcv', 'mmdet', 'mmseg') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", EVALUATORS)
def test_scores_are_the_declared_columns_and_outcomes_stay_small(name: str, uninterrupted: Any) -> None:
    outcome, folder = uninterrupted(name)
    assert tuple(outcome.metrics) == tuple(column.name for column in EVALUATORS[name].columns)
    assert all(0 <= score <= 100 for score in outcome.metrics.values())
    assert outcome.outcomes == folder / "outcomes.npz" and outcome.outcomes.stat().st_size < 20_000
    assert outcome.facts["steps"] == 4 and outcome.facts["images_seen"] == 8 and outcome.facts["flops"] > 0


@pytest.mark.parametrize("name,stem", [("ade20k", "ADE_100"), ("coco", "00000000100")])
def test_some_scored_images_are_drawn_beside_truth_and_prediction(name: str, stem: str, uninterrupted: Any) -> None:
    _, folder = uninterrupted(name)
    drawn = sorted((folder / "samples").iterdir())
    assert [p.name for p in drawn] == [f"{stem}{i}.png" for i in range(5)]
    for path in drawn:
        width, height = picture(1000 + int(path.stem[-1]))[0].shape[1::-1]
        with Image.open(path) as found:
            panel = [round(v * 384 / max(width, height)) for v in (width, height)]
            assert found.width == 3 * panel[0] and 0 <= found.height - panel[1] - 18 <= 36  # a line of titles, up to two of names
            pixels = np.asarray(found.convert("RGB"))[18 : 18 + panel[1]].reshape(panel[1], 3, panel[0], 3)
        truth, image = pixels[:, 1].astype(int), pixels[:, 0].astype(int)
        assert (np.abs(truth - image).max() > 60) == (name == "ade20k" or path.stem[-1] != "4")  # the fifth image of COCO has no objects


def test_evenly_spaced_images_are_drawn() -> None:
    from evals.openmmlab.pictures import places

    assert places(2000) == [0, 286, 571, 857, 1142, 1428, 1713, 1999] and places(3) == [0, 1, 2] and places(1) == [0]


@pytest.mark.parametrize("name", EVALUATORS)
def test_stopped_by_a_signal_it_resumes_to_the_same_bits_and_reads_no_image_again(
    name: str, checkpoint: Backbone, sets: dict[str, Path], uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that is replayed takes at iteration 100,000 as long as the training did (mmengine#1520)."""
    whole, folder = uninterrupted(name)
    from evals.openmmlab.samples import InOrder

    read, get = list[int](), InOrder.__getitem__
    with pytest.raises(Interrupted, match="iteration 2 of 4"):
        seen: list[int] = []
        evaluate(name, checkpoint, tmp_path, sets, should_stop=lambda: len(states(tmp_path)) > 0 or bool(seen.append(1)) or len(seen) > 1)
    monkeypatch.setattr(InOrder, "__getitem__", lambda self, place: (read.append(place) if self.seed is not None else None, get(self, place))[1])
    again, _ = evaluate(name, checkpoint, tmp_path, sets)
    assert read == [4, 5, 6, 7]  # two of four iterations of two images were done
    assert again.metrics == whole.metrics and same_training(tmp_path, folder)
    assert (tmp_path / "outcomes.npz").read_bytes() == (folder / "outcomes.npz").read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("name", EVALUATORS)
def test_killed_while_scoring_with_a_truncated_state_it_ends_the_same(
    name: str, checkpoint: Backbone, sets: dict[str, Path], uninterrupted: Any, tmp_path: Path
) -> None:
    whole, folder = uninterrupted(name)

    def die(progress: Progress) -> None:
        if progress.stage == "evaluate":
            raise MemoryError

    with pytest.raises(MemoryError):
        evaluate(name, checkpoint, tmp_path, sets, report=die)
    newest = states(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged"):
        again, _ = evaluate(name, checkpoint, tmp_path, sets)
    assert again.metrics == whole.metrics and same_training(tmp_path, folder)


def test_a_state_with_a_loss_that_is_no_number_is_not_kept(checkpoint: Backbone, sets: dict[str, Path], tmp_path: Path) -> None:
    """Between two lines of the log as well: --retry would go on from it."""
    recipe = recipe_of("ade20k", lr=1e30, warmup=0, iterations=2000)  # a line every ten iterations
    with pytest.raises(JobFailed, match=r"loss nan at step 2 of 2000 .*the last good state is of step 1"):
        evaluate("ade20k", checkpoint, tmp_path, sets, recipe=recipe)
    assert [p.name for p in states(tmp_path)] == ["state-000000001.pt"]


def test_another_seed_trains_on_other_images_and_ends_elsewhere(checkpoint: Backbone, sets: dict[str, Path], uninterrupted: Any, tmp_path: Path) -> None:
    evaluate("ade20k", checkpoint, tmp_path, sets, seed=4)
    assert not same_training(tmp_path, uninterrupted("ade20k")[1])


def test_loader_workers_do_not_change_the_training(checkpoint: Backbone, sets: dict[str, Path], uninterrupted: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)  # Python's, about fork
        evaluate("ade20k", checkpoint, tmp_path, sets, workers=2)
    assert same_training(tmp_path, uninterrupted("ade20k")[1])


@pytest.mark.parametrize("name", EVALUATORS)
def test_bf16_reaches_the_backbone_and_not_the_losses_and_boxes(
    name: str, checkpoint: Backbone, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.nn.functional as F
    import torchvision

    seen: dict[str, set[torch.dtype]] = {}

    def spy(what: str, module: Any, function: str, tensors: int) -> None:
        original = getattr(module, function)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(what, set()).update(a.dtype for a in args[:tensors] if isinstance(a, torch.Tensor))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, call)

    spy("losses", F, "cross_entropy", 1)
    spy("losses", F, "binary_cross_entropy_with_logits", 1)
    spy("boxes", torchvision.ops, "roi_align", 2)
    spy("boxes", torchvision.ops, "nms", 2)
    blocks = ViT.run_blocks

    def spy_blocks(self: ViT, *args: Any, **kwargs: Any) -> Any:
        self.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, o: seen.setdefault("blocks", set()).add(o.dtype))
        return blocks(self, *args, **kwargs)

    monkeypatch.setattr(ViT, "run_blocks", spy_blocks)
    evaluate(name, checkpoint, tmp_path, sets, dtype=torch.bfloat16, recipe=recipe_of(name, iterations=1))
    boxes = {"boxes": {torch.float32}} if name == "coco" else {}
    assert seen == {"blocks": {torch.bfloat16}, "losses": {torch.float32}, **boxes}


@pytest.mark.parametrize("name", EVALUATORS)
def test_recomputed_blocks_end_in_the_same_bits(name: str, checkpoint: Backbone, sets: dict[str, Path], uninterrupted: Any, tmp_path: Path) -> None:
    """Less memory must not be another number, dropped paths included; and it must be on at all."""
    entered: list[bool] = []
    forward = timm.layers.Mlp.forward

    def count(self: Any, x: torch.Tensor) -> torch.Tensor:
        entered.append(torch.is_grad_enabled())
        return forward(self, x)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm.layers.Mlp, "forward", count)
        evaluate(name, checkpoint, tmp_path, sets, recompute=True)
    assert same_training(tmp_path, uninterrupted(name)[1])
    assert sum(entered) == 2 * 4 * VIT.depth  # twice in each of four steps


def test_batch_of_one_trains(checkpoint: Backbone, sets: dict[str, Path], uninterrupted: Any, tmp_path: Path) -> None:
    """The 1x1 pooled branch then has one value per channel; the record says what became of its batch norm, and nothing where all was as published."""
    outcome, _ = evaluate("ade20k", checkpoint, tmp_path / "one", sets, recipe=recipe_of("ade20k", batch=1, iterations=2))
    assert 0 <= outcome.metrics["mIoU"] <= 100
    assert outcome.facts["deviations"] == ["batch norm of the 1x1 pooled branch by running statistics in 2 steps: one image at a time"]
    assert uninterrupted("ade20k")[0].facts["deviations"] == []


@pytest.mark.parametrize("name", EVALUATORS)
def test_holdout_scores_training_images_that_are_not_trained_on(name: str, checkpoint: Backbone, sets: dict[str, Path], tmp_path: Path) -> None:
    evaluator = dataclasses.replace(EVALUATORS[name], holdout=0.34)
    outcome, _ = evaluate(name, checkpoint, tmp_path, sets, evaluator=evaluator, recipe=recipe_of(name, iterations=1))
    assert outcome.facts["scored_images"] == 3
    assert outcome.outcomes is not None
    with np.load(outcome.outcomes) as saved:
        numbers = {int(n[4:8]) for n in saved["names"]} if name == "ade20k" else set(saved["images"].tolist())
    assert len(numbers) == 3 and max(numbers) < 9


def broken_copy(sets: dict[str, Path], name: str, tmp_path: Path) -> dict[str, Path]:
    shutil.copytree(sets[name], tmp_path / "data")
    return {name: tmp_path / "data"}


@pytest.mark.parametrize("name,image", [("ade20k", "images/training/ADE_0001.jpg"), ("coco", "train2017/000000000001.jpg")])
def test_a_broken_image_fails_by_its_path_or_is_counted(name: str, image: str, checkpoint: Backbone, sets: dict[str, Path], tmp_path: Path) -> None:
    broken = broken_copy(sets, name, tmp_path)
    (broken[name] / image).write_bytes(b"no image")
    recipe = recipe_of(name, iterations=5)
    with pytest.raises(JobFailed, match=Path(image).name):
        evaluate(name, checkpoint, tmp_path / "fail", broken, recipe=recipe)
    _, lent = evaluate(name, checkpoint, tmp_path / "skip", broken, recipe=recipe, on_bad_image="skip")
    assert [Path(p).name for p in lent.skipped_images] == [Path(image).name]


def test_recipes_exist_for_what_the_sources_give() -> None:
    paper = dataclasses.replace(SETTING, name="paper", family="paper")
    base = ViTConfig()
    for evaluator in EVALUATORS.values():
        assert evaluator.recipe(paper, base) is not None and evaluator.recipe(paper, VIT) is None
        assert evaluator.skip(VIT) is None and evaluator.skip(dataclasses.replace(VIT, depth=2)) is None  # the conformance suite has two blocks
