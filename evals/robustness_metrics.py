"""What robustness benchmarks measure: the mean corruption error of ImageNet-C, and top-1 among some of the classes (ImageNet-A and -R)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# Error of AlexNet, averaged over the five severities (hendrycks/robustness @ 8190fe3, in the order of google-research/augmix @ 9b9824c imagenet.py).
# ImageNet-C's four extra corruptions (gaussian_blur, saturate, spatter, speckle_noise) are no part of the metric.
ALEXNET_ERROR: Mapping[str, float] = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
    "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}


def corruption_errors(accuracy: Mapping[str, Sequence[float]], reference: Mapping[str, float] = ALEXNET_ERROR) -> dict[str, float]:
    """CE of each corruption: its error averaged over severities, over the reference's, x 100 (Hendrycks and Dietterich, arXiv 1903.12261, section 3).

    Args:
        accuracy: top-1 accuracy 0..1 at each severity, by corruption.
        reference: error 0..1 of the reference model, by corruption.

    Raises:
        ValueError: corruptions are missing, or too many; or they have different numbers of severities.
    """
    if set(accuracy) != set(reference):
        missing, extra = sorted(set(reference) - set(accuracy)), sorted(set(accuracy) - set(reference))
        raise ValueError(f"the corruptions are not those of the metric: missing {', '.join(missing) or 'none'}; not part of it: {', '.join(extra) or 'none'}")
    if len({len(values) for values in accuracy.values()}) != 1:
        raise ValueError(f"every corruption needs as many severities, not {sorted({len(values) for values in accuracy.values()})}")
    return {name: 100.0 * float(np.mean(1.0 - np.asarray(accuracy[name], dtype=np.float64))) / reference[name] for name in reference}


def mean_corruption_error(accuracy: Mapping[str, Sequence[float]], reference: Mapping[str, float] = ALEXNET_ERROR) -> float:
    """mCE: the mean of the CEs, a mean of ratios. Lower is better; 100 is AlexNet. Arguments and errors as for `corruption_errors`."""
    return float(np.mean(list(corruption_errors(accuracy, reference).values())))


def mean_error(accuracy: Mapping[str, Sequence[float]]) -> float:
    """Plain error 0..100 over corruptions and severities alike, without any reference."""
    return 100.0 * float(np.mean(1.0 - np.asarray(list(accuracy.values()), dtype=np.float64)))


def predict_among(scores: np.ndarray, classes: Sequence[int] | np.ndarray) -> np.ndarray:
    """The best of some classes, as its place among them, int64 (n,), for scores of all classes (n, C).

    ImageNet-A and -R have 200 of ImageNet's 1,000 classes, and the other 800 are no possible answer (hendrycks/natural-adv-examples @ 0777070
    eval.py, hendrycks/imagenet-r @ 3131cac eval.py). Sorted folder names number the places.
    """
    return np.asarray(scores)[:, np.asarray(classes)].argmax(axis=1).astype(np.int64)


def top1_among(scores: np.ndarray, classes: Sequence[int] | np.ndarray, target: np.ndarray) -> float:
    """Top-1 accuracy 0..100 of `predict_among`; `target` (n,) are places among `classes`."""
    return 100.0 * float((predict_among(scores, classes) == target).mean())
