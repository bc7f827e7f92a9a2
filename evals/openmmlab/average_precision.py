"""Box and mask AP by COCO's own code (pycocotools), not rounded, and the matches that they are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from mmengine.evaluator import BaseMetric
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evals.openmmlab.outcomes import save_outcomes
from harness.spec import JobFailed

COLUMNS = {"bbox": "AP_box", "segm": "AP_mask"}
EVERYTHING = [0.0, 1e10]  # the area range "all" of COCO's AP, in pixels


class AveragePrecision(BaseMetric):  # type: ignore[misc]
    """AP over IoU 0.50:0.95 and all areas, at most 100 detections an image.

    Outcomes for each of box and mask: `<kind>_dt` (m, 3) int64 image id, category id, and score in 1e-6; `<kind>_matched` and
    `<kind>_ignored` (m,) uint16, bit t set for IoU threshold 0.5 + 0.05 t; `<kind>_gt` (k, 3) image id, category id, objects that count.
    The AP of any set of images can be computed from these.
    """

    default_prefix = ""

    def __init__(self, path: Path, annotations: Path, image_ids: np.ndarray, category_ids: Sequence[int]) -> None:
        super().__init__()
        self.path, self.annotations, self.image_ids, self.category_ids = path, annotations, image_ids, list(category_ids)
        check_truth(annotations, image_ids)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep each image's detections in COCO's result format."""
        for sample in data_samples:
            found = {k: v.cpu().numpy() for k, v in sample["pred_instances"].items() if k in ("bboxes", "scores", "labels", "masks")}
            masks = pycocotools.mask.encode(np.asfortranarray(found["masks"].transpose(1, 2, 0).astype(np.uint8))) if len(found["labels"]) else []
            self.results.append([{
                "image_id": int(sample["img_id"]), "category_id": self.category_ids[label], "score": float(score),
                "bbox": [float(v) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])], "segmentation": mask,
            } for box, score, label, mask in zip(found["bboxes"], found["scores"], found["labels"], masks, strict=True)])

    def compute_metrics(self, results: list[list[dict[str, Any]]]) -> dict[str, float]:
        """Match, score, and write the outcomes."""
        truth = COCO(str(self.annotations))
        detections = [d for image in results for d in image]
        scores, outcomes = {}, {}
        for kind, column in COLUMNS.items():
            # loadRes takes the area of a mask from the mask when there is no box beside it
            given = [{k: v for k, v in d.items() if k not in ({"segmentation"} if kind == "bbox" else {"bbox"})} for d in detections]
            judge = COCOeval(truth, truth.loadRes(given) if given else COCO(), kind)
            judge.params.imgIds, judge.params.catIds = self.image_ids.tolist(), self.category_ids
            judge.params.areaRng, judge.params.areaRngLbl, judge.params.maxDets = [EVERYTHING], ["all"], [100]
            judge.evaluate()
            judge.accumulate()
            precision = judge.eval["precision"]  # (IoU, recall, category, 1, 1), -1 where a category has no object
            scores[column] = 100 * float(precision[precision > -1].mean()) if (precision > -1).any() else 0.0
            outcomes |= {f"{kind}_{k}": v for k, v in matches(judge.evalImgs).items()}
        save_outcomes(self.path, images=self.image_ids, **outcomes)
        return scores


def check_truth(annotations: Path, image_ids: np.ndarray) -> None:
    """Read what will be scored as COCO's code will, before the training: the quick check of a data set does not look so closely at training images (holdout).

    Raises:
        JobFailed: an annotation that this code stops at.
    """
    name = "an annotation"
    try:
        truth = COCO(str(annotations))
        for annotation in truth.loadAnns(truth.getAnnIds(imgIds=image_ids.tolist())):
            name = f"annotation {annotation['id']}"
            truth.annToRLE(annotation)
            float(annotation["area"]), int(annotation["iscrowd"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise JobFailed(f"{annotations}: {name} cannot be scored ({type(error).__name__}: {error}): mend or remove it") from error


def matches(images: Sequence[dict[str, Any] | None]) -> dict[str, np.ndarray]:
    """COCOeval's per-image results as the arrays of the outcomes file."""
    rows: list[tuple[int, int, int]] = []
    objects: list[tuple[int, int, int]] = []
    matched: list[np.ndarray] = []
    ignored: list[np.ndarray] = []
    bits = 1 << np.arange(10, dtype=np.int64)[:, None]
    for image in images:
        if image is None:  # neither objects nor detections of this category
            continue
        where = (int(image["image_id"]), int(image["category_id"]))
        objects.append((*where, int((np.asarray(image["gtIgnore"]) == 0).sum())))
        rows += [(*where, round(score * 1e6)) for score in image["dtScores"]]
        matched.append(((np.asarray(image["dtMatches"]).reshape(10, -1) > 0) * bits).sum(0))
        ignored.append(((np.asarray(image["dtIgnore"]).reshape(10, -1) > 0) * bits).sum(0))
    return {
        "dt": np.array(rows, dtype=np.int64).reshape(-1, 3), "gt": np.array(objects, dtype=np.int64).reshape(-1, 3),
        "matched": np.concatenate([*matched, np.zeros(0)]).astype(np.uint16), "ignored": np.concatenate([*ignored, np.zeros(0)]).astype(np.uint16),
    }
