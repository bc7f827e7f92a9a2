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

PREDICTIONS = {"mIoU": "pred_sem_seg", "mIoU_ms": "pred_ms"}  # score -> what it is about in a sample


class MeanIoU(BaseMetric):  # type: ignore[misc]
    """mIoU as mmseg computes it, not rounded, from each image's confusion matrix, counted on the device.

    Outcomes: names (n,), and one row for each pair that occurs: image, gt, pred (class indices), count (pixels). Of a second score the rows
    are called ms_image, ms_gt, ms_pred and ms_count.
    """

    default_prefix = ""

    def __init__(self, path: Path, scores: Sequence[str] = ("mIoU",)) -> None:
        super().__init__()
        self.path, self.scores = path, tuple(scores)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Count the pairs of true and predicted class of each image, on the device."""
        classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            found = {}
            for score in self.scores:
                predicted = sample[PREDICTIONS[score]]["data"].squeeze(0)
                truth = sample["gt_sem_seg"]["data"].squeeze(0).to(predicted.device)
                seen = truth != 255
                pairs = torch.bincount(truth[seen].long() * classes + predicted[seen].long(), minlength=classes**2).cpu().numpy()
                where = np.flatnonzero(pairs)
                found[score] = where, pairs[where]
            self.results.append((Path(sample["img_path"]).name, found))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Sum, score, and write the outcomes."""
        classes = len(self.dataset_meta["classes"])
        outcomes = {"names": np.array([name for name, _ in results])}
        scored = {}
        for score in self.scores:
            rows = [found[score] for _, found in results]
            where, counts = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
            total = np.zeros(classes**2, dtype=np.int64)
            np.add.at(total, where, counts)
            scored[score] = mean_iou(total.reshape(classes, classes))
            image = np.repeat(np.arange(len(rows)), [len(places) for places, _ in rows])
            columns = {"image": image.astype(np.int32), "gt": (where // classes).astype(np.int16), "pred": (where % classes).astype(np.int16),
                       "count": counts.astype(np.int32)}
            outcomes |= {name if score == "mIoU" else f"ms_{name}": column for name, column in columns.items()}
        save_outcomes(self.path, **outcomes)
        return scored


def mean_iou(confusion: np.ndarray) -> float:
    """mIoU, 0..100, from pixels by true and predicted class: the mean over the classes that occur in either."""
    pixels = torch.from_numpy(confusion)
    hit, label, predicted = pixels.diagonal(), pixels.sum(1), pixels.sum(0)
    scores = IoUMetric.total_area_to_metrics(hit, label + predicted - hit, predicted, label, ["mIoU"])
    return 100 * float(np.nanmean(scores["IoU"]))
