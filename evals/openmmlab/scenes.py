"""COCO's images and instances for mmdetection, read from instances_*.json once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from harness.data import read_json_file


@DATASETS.register_module("HarnessCOCO", force=True)
class COCOScenes(BaseDataset):  # type: ignore[misc]
    """Images of a split with boxes, masks and class indices, by image id.

    Categories are mapped to 0..n-1 in the order of `categories` ((id, name), ...), whatever gaps their ids have. Crowd regions are
    kept as ignored instances. Instances without area or without a usable outline are left out, as detectron2 leaves them out.

    Args:
        folder: with train2017, val2017 and annotations/.
        split: "train2017" or "val2017".
    """

    def __init__(self, folder: Path, split: str, categories: tuple[tuple[int, str], ...], pipeline: list[dict[str, Any]]) -> None:
        self.images, self.json = folder / split, folder / "annotations" / f"instances_{split}.json"
        self.label_of = {number: label for label, (number, _) in enumerate(categories)}
        super().__init__(metainfo={"classes": tuple(name for _, name in categories)}, pipeline=pipeline, test_mode=True)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One data info for each image, with its instances."""
        body = read_json_file(self.json)
        instances: dict[int, list[dict[str, Any]]] = {}
        for annotation in body.get("annotations", ()):
            if (instance := self._instance(annotation)) is not None:
                instances.setdefault(int(annotation["image_id"]), []).append(instance)
        return [{
            "img_path": str(self.images / image["file_name"]), "img_id": int(image["id"]), "height": int(image["height"]), "width": int(image["width"]),
            "instances": instances.get(int(image["id"]), []),
        } for image in sorted(body["images"], key=lambda image: int(image["id"]))]

    def _instance(self, annotation: dict[str, Any]) -> dict[str, Any] | None:
        x, y, w, h = annotation["bbox"]
        if annotation.get("ignore") or w <= 0 or h <= 0:
            return None
        mask = annotation.get("segmentation")
        if isinstance(mask, list):
            mask = [outline for outline in mask if len(outline) >= 6 and len(outline) % 2 == 0]
        if not mask:
            return None
        return {
            "bbox": [x, y, x + w, y + h], "bbox_label": self.label_of[int(annotation["category_id"])], "mask": mask,
            "ignore_flag": int(annotation.get("iscrowd", 0)),
        }

    def with_instances(self, indices: list[int]) -> list[int]:
        """Those images that have an instance to learn from (detectron2's filter: crowds do not count)."""
        return [i for i in indices if any(not instance["ignore_flag"] for instance in self.get_data_info(i)["instances"])]

    def ids(self, indices: list[int]) -> np.ndarray:
        """COCO's image ids (n,) int64."""
        return np.array([self.get_data_info(i)["img_id"] for i in indices], dtype=np.int64)
