"""How much of a difference the choice of test images explains: a paired bootstrap over the images of the stored outcomes.

Evaluation noise only. Both checkpoints are held fixed and only the test images are drawn again, so that it says how a score would move on other images
of the same kind, and nothing about another training. It never enters the comparison of methods (`results.statistics` does that, by seeds).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESAMPLES = 200
Score = Callable[[np.ndarray], float]  # weights of the images (n,) -> score, 0..100
RECALLS = np.linspace(0.0, 1.0, 101)  # COCO's
STORED = {  # metric -> the arrays that it is scored again from
    "top-1": {"correct", "label"}, "mIoU": {"names", "image", "gt", "pred", "count"},
    **{f"AP_{name}": {"images", *(f"{kind}_{part}" for part in ("dt", "gt", "matched", "ignored"))} for name, kind in (("box", "bbox"), ("mask", "segm"))},
}


@dataclass(frozen=True)
class Noise:
    """`std` of a score over resampled images; `gap` and its 95 % percentile interval `ci95` against the reference, None for the reference itself."""

    method: str
    score: float
    std: float
    gap: float | None = None
    ci95: tuple[float, float] | None = None


def noise(files: Mapping[str, tuple[Path, float]], metric: str, reference: str) -> tuple[list[Noise], str]:
    """Each method's evaluation noise, and its gap to `reference` on equally drawn images. `files` is method -> (outcomes, recorded score).

    Returns an empty list and the reason where the outcomes do not allow it.
    """
    scores: dict[str, Score] = {}
    grounds = []
    for method, (path, recorded) in files.items():
        try:
            with open(path, "rb") as stream, np.load(stream) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # what NumPy raises on damaged files
            return [], f"outcomes of {method} cannot be read ({error})"
        if metric not in STORED or not STORED[metric] <= arrays.keys():
            return [], f"no outcomes of single images for {metric}"
        if metric == "top-1":
            ground, scores[method] = arrays["label"], top1(arrays["correct"])
        elif metric == "mIoU":
            ground, scores[method] = arrays["names"], mean_iou(arrays)
        else:
            ground, scores[method] = arrays["images"], average_precision(arrays, {"AP_box": "bbox", "AP_mask": "segm"}[metric])
        grounds.append(ground)
        if abs((again := scores[method](np.ones(len(ground)))) - recorded) > 0.05:
            return [], f"the outcomes of {method} give {again:.2f}, its record says {recorded:.2f}"
        if not np.array_equal(ground, grounds[0]):
            return [], "not scored on the same images"
    if reference not in scores or len(scores) < 2 or not len(grounds[0]):
        return [], "fewer than two methods"
    rng, n = np.random.default_rng(0), len(grounds[0])
    weights = [rng.multinomial(n, np.full(n, 1 / n)) for _ in range(RESAMPLES)]
    drawn = {method: np.array([score(w) for w in weights]) for method, score in scores.items()}
    found = []
    for method, values in drawn.items():
        gaps, gap, bounds = values - drawn[reference], None, None
        if method != reference:
            low, high = np.nanpercentile(gaps, [2.5, 97.5])
            gap, bounds = files[method][1] - files[reference][1], (float(low), float(high))
        found.append(Noise(method, files[method][1], float(np.nanstd(values, ddof=1)), gap, bounds))
    return found, ""


def top1(correct: np.ndarray) -> Score:
    """Share of right images, in percent; `correct` is (n,) bool."""
    return lambda weights: 100.0 * float(weights @ correct) / float(weights.sum())


def mean_iou(arrays: Mapping[str, np.ndarray]) -> Score:
    """mIoU from each image's pairs of true and predicted class: the mean over classes that occur of hit / (true + predicted - hit)."""
    image, true, predicted, count = (arrays[k].astype(np.int64) for k in ("image", "gt", "pred", "count"))
    images, classes = len(arrays["names"]), int(max(true.max(initial=0), predicted.max(initial=0))) + 1
    areas = np.zeros((3, images, classes))
    np.add.at(areas[0], (image, true), count * (true == predicted))
    np.add.at(areas[1], (image, true), count)
    np.add.at(areas[2], (image, predicted), count)

    def score(weights: np.ndarray) -> float:
        hit, label, found = np.einsum("i,kic->kc", weights, areas)
        union = label + found - hit
        return 100.0 * float(np.mean(hit[union > 0] / union[union > 0]))

    return score


def average_precision(arrays: Mapping[str, np.ndarray], kind: str) -> Score:
    """COCO's AP (IoU 0.50:0.95, all areas, 101 recall points) from stored matches; an image of weight w counts as w copies."""
    place = {int(number): i for i, number in enumerate(arrays["images"])}
    found, objects = arrays[f"{kind}_dt"], arrays[f"{kind}_gt"]
    bits = 1 << np.arange(10)
    matched, ignored = ((arrays[f"{kind}_{k}"].astype(np.int64)[:, None] & bits) > 0 for k in ("matched", "ignored"))
    categories = []
    for category in np.unique(objects[:, 1]):
        of = np.flatnonzero(found[:, 1] == category)
        of = of[np.argsort(-found[of, 2], kind="stable")]
        there = objects[objects[:, 1] == category]
        categories.append((
            np.array([place[int(i)] for i in found[of, 0]], dtype=np.int64), matched[of] & ~ignored[of], ~matched[of] & ~ignored[of],
            np.array([place[int(i)] for i in there[:, 0]], dtype=np.int64), there[:, 2],
        ))

    def score(weights: np.ndarray) -> float:
        means = []
        for where, hits, misses, where_true, number in categories:
            positives = float(weights[where_true] @ number)
            if positives == 0:
                continue
            w = weights[where].astype(float)[:, None]
            hit, miss = np.cumsum(w * hits, 0), np.cumsum(w * misses, 0)
            recall, precision = hit / positives, hit / np.maximum(hit + miss, np.spacing(1))
            precision = np.vstack([np.maximum.accumulate(precision[::-1], 0)[::-1], np.zeros((1, 10))])  # beyond the last recall it is 0
            means.append(np.mean([precision[np.searchsorted(recall[:, t], RECALLS, side="left"), t] for t in range(10)]))
        return 100.0 * float(np.mean(means)) if means else 0.0

    return score
