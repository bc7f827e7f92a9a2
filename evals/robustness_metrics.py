"""mCE of ImageNet-C, and accuracy among a subset of ImageNet's classes, as pure functions of outcomes (recipes A12; tests/golden)."""

from __future__ import annotations

import numpy as np


def mce(accuracy: np.ndarray, alexnet_error: np.ndarray) -> float:
    """Mean corruption error in percent: the error averaged over severities, divided by AlexNet's, averaged over corruptions.

    Hendrycks & Dietterich, arXiv 1903.12261, equation (1). The mean of ratios is not the ratio of means.

    Args:
        accuracy: (corruptions, severities), 0..1.
        alexnet_error: (corruptions,), 0..1, in the same order.
    """
    return float(100 * np.mean((1 - accuracy).mean(axis=1) / alexnet_error))


def restricted_top1(logits: np.ndarray, indices: np.ndarray, targets_in_subset: np.ndarray) -> float:
    """Top-1 accuracy in percent where only the classes `indices` can be predicted (ImageNet-A's and -R's evaluation code).

    Args:
        logits: (N, 1000).
        indices: (K,) classes of the subset.
        targets_in_subset: (N,) the right class as a place in `indices`.
    """
    return float(100 * np.mean(logits[:, indices].argmax(axis=1) == targets_in_subset))
