"""ade20k and coco end to end on a few small pictures: killed or not, the same numbers; odd data that real sets have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evals.openmmlab.ade20k import ADE20K
from evals.openmmlab.coco import COCO
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Progress, Session
from harness.randomness import generator, seed_all
from harness.spec import Interrupted, JobFailed, Protocol, ViTConfig
from harness.vit import ViT

CONFIG = ViTConfig(size=(32, 32), patch=8, width=24, depth=4, heads=3)
SETTING = Protocol("smoke", "smoke", "", {"vit": CONFIG}, "vit")
SIZES = ((40, 48), (48, 40), (45, 51))  # (height, width), not multiples of the patch
CATEGORIES = (3, 17)


def picture(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, int, int, int, int]]]:
    """Noise with two bright squares: (H, W, 3) uint8, and (class, x, y, w, h) of each."""
    image = rng.integers(0, 90, (*size, 3))
    found = []
    for kind in (0, 1):
        side = int(rng.integers(10, 18))
        y, x = int(rng.integers(0, size[0] - side)), int(rng.integers(0, size[1] - side))
        image[y : y + side, x : x + side, kind] += 150
        found.append((kind, x, y, side, side))
    return image.astype(np.uint8), found


def write_ade20k(root: Path) -> Path:
    """Six training scenes and three for validation; background unlabelled (0)."""
    (root / "images").mkdir(parents=True)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0\t6\t3\t0\tred\n2\t0\t6\t3\t0\tgreen\n")
    for split, count in (("training", 6), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, squares = picture(generator(split, i), SIZES[i % 3])
            labels = np.zeros(image.shape[:2], np.uint8)
            for kind, x, y, w, h in squares:
                labels[y : y + h, x : x + w] = kind + 1
            Image.fromarray(image).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(labels).save(root / "annotations" / split / f"{i}.png")
    return root


def write_coco(root: Path) -> Path:
    """The same with instances: category ids with a gap, a crowd, an image without objects, in either split."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 6), ("val2017", 4)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            image, squares = picture(generator(split, i), SIZES[i % 3])
            Image.fromarray(image).save(root / split / f"{i}.jpg")
            height, width = image.shape[:2]
            images.append({"id": 10 * i, "file_name": f"{i}.jpg", "height": height, "width": width})
            for kind, x, y, w, h in squares[: 0 if i == 2 else 2]:
                crowd = i == 1 and kind == 1
                mask = np.zeros((height, width), bool)
                mask[y : y + h, x : x + w] = True
                flat = mask.ravel(order="F")
                edges = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
                counts = ([0] if flat[0] else []) + np.diff(edges).tolist()
                annotations.append({
                    "id": len(annotations) + 1, "image_id": 10 * i, "category_id": CATEGORIES[kind], "iscrowd": int(crowd), "area": w * h, "bbox": [x, y, w, h],
                    "segmentation": {"size": [height, width], "counts": counts} if crowd else [[x, y, x + w, y, x + w, y + h, x, y + h]],
                })
        body = {"images": images, "annotations": annotations, "categories": [{"id": c, "name": f"c{c}"} for c in CATEGORIES]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(body))
    return root


EVALUATORS: dict[str, tuple[Any, Callable[[Path], Path]]] = {"ade20k": (ADE20K(channels=8), write_ade20k), "coco": (COCO(side=32), write_coco)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both data sets."""
    root = tmp_path_factory.mktemp("dense")
    return {name: write(root / name) for name, (_, write) in EVALUATORS.items()}


def checkpoint() -> Backbone:
    """An untrained ViT, the same each time."""
    seed_all("checkpoint")
    return Backbone(CONFIG, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), ViT(CONFIG).state_dict())


def evaluate(name: str, place: Path, folders: dict[str, Path], evaluator: Any = None, iterations: int = 3, batch: int = 2, **changes: Any) -> Any:
    """Run an evaluator on the small data."""
    place.mkdir(parents=True, exist_ok=True)
    session = Session(place, 5, torch.device("cpu"), torch.float32, folders)
    session = dataclasses.replace(session, **changes)
    evaluator = evaluator or EVALUATORS[name][0]
    recipe = dataclasses.replace(evaluator.recipe(SETTING, CONFIG), iterations=iterations, batch=batch, warmup=0)
    return evaluator.run(checkpoint(), EvalContext(session, SETTING, recipe))


@pytest.mark.parametrize("name", EVALUATORS)
def test_stopped_at_any_point_it_ends_with_the_same_numbers(name: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    """A preempted job would publish another score than an undisturbed one."""
    whole = evaluate(name, tmp_path / "whole", folders)
    assert set(whole.metrics) == {m.name for m in EVALUATORS[name][0].columns}
    looks = [0]

    def should_stop() -> bool:  # at every second look: in training at each other step, and while scoring
        looks[0] += 1
        return looks[0] % 2 == 0

    for attempt in range(8):
        try:
            parts = evaluate(name, tmp_path / "parts", folders, should_stop=should_stop)
            break
        except Interrupted:
            assert attempt < 7
    assert attempt >= 2
    assert parts.metrics == whole.metrics
    assert parts.outcomes.read_bytes() == whole.outcomes.read_bytes()
    assert {k: v for k, v in parts.facts.items() if k != "seconds"} == {k: v for k, v in whole.facts.items() if k != "seconds"}


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_finished_job_only_scores_again(name: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    """Killed between the last step and its record, a job would train again, or on."""
    stages: list[str] = []
    first = evaluate(name, tmp_path, folders)
    again = evaluate(name, tmp_path, folders, report=lambda p: stages.append(p.stage))
    assert again.metrics == first.metrics and set(stages) == {"evaluate"}


@pytest.mark.parametrize("name", EVALUATORS)
def test_loader_workers_change_nothing(name: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    """The score would depend on the machine."""
    whole = evaluate(name, tmp_path / "none", folders)
    assert evaluate(name, tmp_path / "two", folders, workers=2).metrics == whole.metrics


@pytest.mark.parametrize("name", EVALUATORS)
def test_progress_counts_up_and_the_console_stays_quiet(name: str, tmp_path: Path, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """OpenMMLab's pages of environment would stand between the user and the table; the bar would stand still."""
    seen: list[Progress] = []
    evaluate(name, tmp_path, folders, report=seen.append)
    assert capfd.readouterr().out == ""
    train = [p for p in seen if p.stage == "train"]
    assert train[-1].step == train[-1].steps == 3 and train[-1].loss is not None and train[-1].images_per_s > 0
    assert seen[-1].stage == "evaluate" and seen[-1].step == seen[-1].steps


@pytest.mark.parametrize("name", EVALUATORS)
def test_bfloat16_trains(name: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    """The default precision on CPUs that have it: RoIAlign and NMS have no bf16 kernel there."""
    outcome = evaluate(name, tmp_path, folders, dtype=torch.bfloat16)
    assert all(np.isfinite(v) for v in outcome.metrics.values())


@pytest.mark.parametrize("name", EVALUATORS)
def test_held_out_images_are_scored_and_not_trained_on(name: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    """Tuning on val, or on images that were trained on, would flatter the table."""
    evaluator = dataclasses.replace(EVALUATORS[name][0], holdout=0.34)
    outcome = evaluate(name, tmp_path, folders, evaluator)
    assert outcome.facts["images_scored"] == 2
    from evals.openmmlab.foreign import openmmlab

    with openmmlab():
        from evals.openmmlab.samples import held_out
    rest, held = held_out(6, 0.34)
    assert sorted(rest + held) == list(range(6)) and len(held) == 2


def test_a_batch_of_one_trains(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Batch norm over the 1x1 pooled branch has one value at batch 1."""
    assert np.isfinite(evaluate("ade20k", tmp_path, folders, batch=1).metrics["mIoU"])


def test_iou_from_the_outcomes_is_the_score(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Bootstraps over images start from this file."""
    outcome = evaluate("ade20k", tmp_path, folders)
    with np.load(outcome.outcomes) as saved:
        total = np.zeros((2, 2))
        np.add.at(total, (saved["gt"], saved["pred"]), saved["count"])
        assert len(saved["names"]) == 3
    labelled = sum(int((np.asarray(Image.open(p)) > 0).sum()) for p in (folders["ade20k"] / "annotations" / "validation").glob("*.png"))
    assert total.sum() == labelled  # nothing unlabelled is scored, nothing labelled is lost to resizing or windows
    union = total.sum(0) + total.sum(1) - total.diagonal()
    assert outcome.metrics["mIoU"] == pytest.approx(100 * (total.diagonal() / union).mean(), rel=1e-6)


def test_a_label_above_the_number_of_classes_fails_with_its_file(tmp_path: Path) -> None:
    """It would be trained on as another class, or crash without a name."""
    root = write_ade20k(tmp_path / "data")
    path = root / "annotations" / "training" / "4.png"
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 9)).save(path)
    with pytest.raises(JobFailed, match=r"4\.png.*label 9"):
        evaluate("ade20k", tmp_path / "job", {"ade20k": root}, iterations=6)


def test_a_broken_image_fails_the_job_or_is_counted(tmp_path: Path) -> None:
    """What --on-bad-image promises, in training and in validation."""
    root = write_coco(tmp_path / "data")
    for path in ("train2017/4.jpg", "val2017/3.jpg"):
        (root / path).write_bytes(b"no picture")
    with pytest.raises(JobFailed, match=r"\d\.jpg"):
        evaluate("coco", tmp_path / "fail", {"coco": root}, iterations=4)
    skipped: dict[str, str] = {}
    outcome = evaluate("coco", tmp_path / "skip", {"coco": root}, iterations=4, on_bad_image="skip", skipped_images=skipped)
    assert {Path(p).name for p in skipped} == {"4.jpg", "3.jpg"} and outcome.facts["images_scored"] == 3
