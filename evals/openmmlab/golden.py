"""Known answers of the dense evaluators: their own readers, models and metrics on drawn scenes, in seconds and without training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from evals.openmmlab import session
from evals.openmmlab.work import Work
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Golden, Session
from harness.randomness import generator
from harness.spec import Protocol, Recipe, ViTConfig
from harness.vit import ViT

CLASSES = ("ground", "red", "green", "blue")
COLOURS = ((110, 110, 110), (200, 60, 60), (60, 180, 60), (60, 60, 200))
SIZES = ((64, 88), (80, 64), (72, 72))  # height, width
IMAGES, SIDE, MOVED = 24, 20, 3  # MOVED by 3 of 20 pixels: IoU 17 / 23 = 0.74, a match at 0.50 to 0.70, half of COCO's thresholds
IGNORED = 255
VIT = ViTConfig(size=(32, 32), patch=8, width=32, depth=4, heads=2)
SETTING = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")
# Measured in fp32 on an AMD EPYC: torch 2.14.1, mmseg 1.2.2, mmdet 3.3.0. (number, tolerance): machines differ in the last bits. Three times all weights were
# changed by 1e-5 of themselves, a hundred times those bits, and moved the mIoU by 0.002 at most and the score by 0.23 (suppression then keeps other boxes).
FIXED_MIOU, FIXED_SCORE = (8.15, 0.05), (70.29, 1.0)


def scene(index: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """An image (H, W, 3) with a square in each quarter, and the squares (class 1..3, left, top)."""
    rng, (height, width) = generator("golden scene", index), SIZES[index % len(SIZES)]
    image = np.full((height, width, 3), COLOURS[0], np.uint8)
    squares = []
    for quarter in range(4):
        label = int(rng.integers(1, len(CLASSES)))
        left, top = (half * length // 2 + int(rng.integers(2, length // 2 - SIDE - MOVED)) for half, length in ((quarter % 2, width), (quarter // 2, height)))
        image[top : top + SIDE, left : left + SIDE] = COLOURS[label]
        squares.append((label, left, top))
    return image + rng.integers(0, 12, image.shape, dtype=np.uint8), squares


def label_map(index: int) -> np.ndarray:
    """Class (H, W) of each pixel of a scene; two lines above are not labelled."""
    image, squares = scene(index)
    labels = np.zeros(image.shape[:2], np.int64)
    for label, left, top in squares:
        labels[top : top + SIDE, left : left + SIDE] = label
    labels[:2] = IGNORED
    return labels


def fixed(model: nn.Module) -> nn.Module:
    """A model whose weights are drawn from its parameters' names: the same everywhere, with torch's generator left out of it."""
    for name, parameter in model.named_parameters():
        drawn = generator("golden", name).standard_normal(parameter.shape, dtype=np.float32)
        if parameter.ndim > 1:  # filters without a mean: what is alike everywhere would decide all pixels for one class
            drawn -= drawn.mean(tuple(range(1, drawn.ndim)), keepdims=True)
            parameter.data.copy_(torch.from_numpy(drawn * (2.0 / (parameter.numel() / parameter.shape[0])) ** 0.5))
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def run(evaluator: Any, data: dict[str, Path], folder: Path, ask: Callable[[Work, str], dict[str, float]]) -> None:
    """Let an evaluator prepare its work on a tiny ViT, in fp32 on the processor, and ask that."""
    checkpoint = Backbone(VIT, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), fixed(ViT(VIT)).state_dict())
    lent = Session(folder, 0, torch.device("cpu"), torch.float32, data)
    with session.instead_of_training(ask):
        evaluator.run(checkpoint, EvalContext(lent, SETTING, Recipe(batch=1, lr=1.0, iterations=1)))


# --------------------------------------------------------------------------------------------------------------- ade20k


def write_ade20k(root: Path, images: int = IMAGES, classes: int = len(CLASSES)) -> None:
    """One training image and some to be scored in ADE20K's layout; classes beyond the drawn ones have names and no pixels."""
    names = [*CLASSES, *(f"class {i}" for i in range(len(CLASSES), classes))]
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0\t1\t1\t0\t{name}" for i, name in enumerate(names, 1))]
    for split, count in (("training", 1), ("validation", images)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = label_map(i)
            Image.fromarray(scene(i)[0]).save(root / "images" / split / f"{i:03}.jpg", quality=95)
            Image.fromarray(np.where(labels == IGNORED, 0, labels + 1).astype(np.uint8)).save(root / "annotations" / split / f"{i:03}.png")
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")


def segmentation(evaluator: Any, folder: Path) -> tuple[Golden, ...]:
    """Known answers of `ade20k`: perfect and shuffled predictions, and a fixed model through the evaluator's windows, head and metric."""
    found: list[Golden] = []

    def ask(work: Work, scope: str) -> dict[str, float]:
        classes = len(work.test.metainfo["classes"])

        def mean_iou(predictions: list[np.ndarray]) -> float:
            work.metric.dataset_meta = work.test.metainfo
            for i, predicted in enumerate(predictions):
                truth = work.test.source[i]["data_samples"].to_dict()
                work.metric.process({}, [{**truth, "pred_sem_seg": {"data": torch.from_numpy(predicted)[None]}}])
            return float(work.metric.evaluate(len(predictions))["mIoU"])

        perfect = [np.where((labels := label_map(i)) == IGNORED, 0, labels) for i in range(IMAGES)]
        shuffled, hit, union = [], np.zeros(classes), np.zeros(classes)
        for i in range(IMAGES):
            seen = label_map(i) != IGNORED
            mixed, share = perfect[i].copy(), np.bincount(perfect[i][seen], minlength=classes) / seen.sum()
            mixed[seen] = generator("shuffle", i).permutation(mixed[seen])
            shuffled.append(mixed)
            hit, union = hit + seen.sum() * share**2, union + seen.sum() * (2 * share - share**2)  # what is to be expected of pixels at random
        found.append(Golden("perfect predictions, mIoU", mean_iou(perfect), 100.0, 1e-9))
        found.append(Golden("pixels shuffled, mIoU", mean_iou(shuffled), 100 * float((hit / union).mean()), 0.5))
        fixed(work.model)
        scores = session.only_test(work, scope)
        found.append(Golden("a fixed tiny checkpoint, mIoU", scores["mIoU"], *FIXED_MIOU))
        return scores

    write_ade20k(folder / "data")
    run(dataclasses.replace(evaluator, channels=16), {"ade20k": folder / "data"}, folder, ask)
    return tuple(found)


# ----------------------------------------------------------------------------------------------------------------- coco


def write_coco(root: Path, images: int = IMAGES, classes: int = len(CLASSES) - 1) -> None:
    """The same in COCO's layout; the categories have ids with gaps."""
    (root / "annotations").mkdir(parents=True)
    names = [*CLASSES[1:], *(f"class {i}" for i in range(len(CLASSES) - 1, classes))]
    categories = [{"id": 3 * i + 1, "name": name} for i, name in enumerate(names, 1)]
    for split, count in (("train2017", 1), ("val2017", images)):
        (root / split).mkdir()
        listed, annotations = [], []
        for i in range(count):
            image, squares = scene(i)
            Image.fromarray(image).save(root / split / f"{i:012}.jpg", quality=95)
            listed.append({"id": i, "file_name": f"{i:012}.jpg", "height": image.shape[0], "width": image.shape[1]})
            for label, x, y in squares:
                outline = [x, y, x + SIDE, y, x + SIDE, y + SIDE, x, y + SIDE]
                annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": categories[label - 1]["id"], "bbox": [x, y, SIDE, SIDE],
                                    "area": SIDE * SIDE, "iscrowd": 0, "segmentation": [outline]})
        body = {"images": listed, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(body))


def detections(moved: int, labels: np.ndarray) -> list[dict[str, Any]]:
    """The squares of all scenes `moved` to the right, with these labels (0..2), as mmdet hands predictions to a metric."""
    found = []
    for i in range(IMAGES):
        image, squares = scene(i)
        masks = np.zeros((4, *image.shape[:2]), bool)
        for mask, (_, left, top) in zip(masks, squares, strict=True):
            mask[top : top + SIDE, left + moved : left + moved + SIDE] = True
        boxes = torch.tensor([[left + moved, top, left + moved + SIDE, top + SIDE] for _, left, top in squares], dtype=torch.float)
        found.append({"img_id": i, "pred_instances": {
            "bboxes": boxes, "labels": torch.from_numpy(labels[i]), "scores": torch.linspace(0.9, 0.6, 4) - 0.01 * i, "masks": torch.from_numpy(masks),
        }})
    return found


def chance(count: int, total: int) -> float:
    """AP, 0..1, to be expected of `count` detections of as many objects when each is one of them with probability count / total."""
    hits = (generator("chance", count).random((1000, count)) < count / total).cumsum(1)
    precision = hits / np.arange(1, count + 1)
    best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # at this recall or a higher one
    at = [(hits >= recall * count).argmax(1) for recall in np.linspace(0, 1, 101)]
    reached = [hits[:, -1] >= recall * count for recall in np.linspace(0, 1, 101)]
    return float(np.mean([np.where(r, best[np.arange(len(best)), a], 0.0) for a, r in zip(at, reached, strict=True)]))


def detection(evaluator: Any, folder: Path) -> tuple[Golden, ...]:
    """Known answers of `coco`: perfect, moved and shuffled detections, and the detections of a fixed model."""
    found: list[Golden] = []
    true = np.array([[label - 1 for label, _, _ in scene(i)[1]] for i in range(IMAGES)])
    mixed = generator("shuffle").permutation(true.ravel()).reshape(true.shape)
    expected = 100 * float(np.mean([chance(n, true.size) for n in np.bincount(true.ravel())]))

    def ask(work: Work, scope: str) -> dict[str, float]:
        work.metric.dataset_meta = work.test.metainfo
        for what, moved, labels, answer, tolerance in (
            ("perfect detections", 0, true, 100.0, 1e-6), ("moved to an IoU of 0.74", MOVED, true, 50.0, 1e-6), ("labels shuffled", 0, mixed, expected, 6.0),
        ):
            work.metric.process({}, detections(moved, labels))
            found.extend(Golden(f"{what}, {name}", value, answer, tolerance) for name, value in work.metric.evaluate(IMAGES).items())
        fixed(work.model)
        scores = session.only_test(work, scope)
        with np.load(work.metric.path) as saved:
            found.append(Golden("a fixed tiny checkpoint, mean score of its detections", float(saved["bbox_dt"][:, 2].mean()) / 1e4, *FIXED_SCORE))
        return scores

    write_coco(folder / "data")
    run(dataclasses.replace(evaluator, side=96), {"coco": folder / "data"}, folder, ask)
    return tuple(found)
