"""mIoU, and the confusion of each image that it is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmseg.evaluation import IoUMetric

from evals.openmmlab.outcomes import save_outcomes


class MeanIoU(BaseMetric):  # type: ignore[misc]
    """mIoU as mmseg computes it, not rounded, from each image's confusion matrix.

    Outcomes: names (n,), and one row for each pair that occurs: image, gt, pred (class indices), count (pixels).
    """

    default_prefix = ""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Count the pairs of true and predicted class of each image, on the device."""
        classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            predicted = sample["pred_sem_seg"]["data"].squeeze(0)
            truth = sample["gt_sem_seg"]["data"].squeeze(0).to(predicted.device)
            seen = truth != 255
            pairs = torch.bincount(truth[seen].long() * classes + predicted[seen].long(), minlength=classes**2).cpu().numpy()
            where = np.flatnonzero(pairs)
            self.results.append((Path(sample["img_path"]).name, where, pairs[where]))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Sum, score, and write the outcomes."""
        classes = len(self.dataset_meta["classes"])
        total = np.zeros(classes**2, dtype=np.int64)
        for _, where, counts in results:
            total[where] += counts
        confusion = torch.from_numpy(total.reshape(classes, classes))
        hit, label, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        scores = IoUMetric.total_area_to_metrics(hit, label + predicted - hit, predicted, label, ["mIoU"])
        where = np.concatenate([w for _, w, _ in results])
        save_outcomes(
            self.path, names=np.array([n for n, _, _ in results]), image=np.repeat(np.arange(len(results)), [len(w) for _, w, _ in results]).astype(np.int32),
            gt=(where // classes).astype(np.int16), pred=(where % classes).astype(np.int16),
            count=np.concatenate([c for _, _, c in results]).astype(np.int32),
        )
        return {"mIoU": 100 * float(np.nanmean(scores["IoU"]))}
