"""COCO's images and instances for mmdetection, read from instances_*.json once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets.transforms import LoadAnnotations
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, TRANSFORMS

from harness.data import BadImage, read_json_file


@TRANSFORMS.register_module("HarnessReadInstances", force=True)
class ReadInstances(LoadAnnotations):  # type: ignore[misc]
    """mmdet's reader of boxes, labels and masks; one that cannot be decoded is a failure of its image, and named."""

    def __init__(self) -> None:
        super().__init__(with_bbox=True, with_mask=True)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds gt_bboxes, gt_bboxes_labels, gt_ignore_flags and gt_masks.

        Raises:
            BadImage: run lengths that are none of this image.
        """
        try:
            found: dict[str, Any] = super().transform(results)
        except (ValueError, TypeError, AssertionError) as error:  # pycocotools on the runs, or masks of several sizes
            raise BadImage(f"{results['img_path']}: a mask of its annotations cannot be read ({error}): mend it, or add --retry --on-bad-image skip") from error
        return found


@DATASETS.register_module("HarnessCOCO", force=True)
class COCOScenes(BaseDataset):  # type: ignore[misc]
    """Images of a split with boxes, masks and class indices, by image id.

    Categories are mapped to 0..n-1 in the order of `categories` ((id, name), ...), whatever gaps their ids have. Crowd regions are
    kept as ignored instances. Boxes are cut at the border of their image; instances without area inside it, or without an outline of three
    corners, are left out, as detectron2 leaves them out.

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
        sizes = {int(image["id"]): (int(image["width"]), int(image["height"])) for image in body["images"]}
        instances: dict[int, list[dict[str, Any]]] = {number: [] for number in sizes}
        for annotation in body.get("annotations", ()):
            number = int(annotation["image_id"])
            if (instance := self._instance(annotation, *sizes[number])) is not None:
                instances[number].append(instance)
        return [{
            "img_path": str(self.images / image["file_name"]), "img_id": int(image["id"]), "height": int(image["height"]), "width": int(image["width"]),
            "instances": instances[int(image["id"])],
        } for image in sorted(body["images"], key=lambda image: int(image["id"]))]

    def _instance(self, annotation: dict[str, Any], width: int, height: int) -> dict[str, Any] | None:
        x, y, w, h = annotation["bbox"]
        box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
        if annotation.get("ignore") or box[0] >= box[2] or box[1] >= box[3]:
            return None
        mask = annotation.get("segmentation")
        if isinstance(mask, list):
            mask = [outline for outline in mask if len(outline) >= 6 and len(outline) % 2 == 0]
        if not mask:
            return None
        return {
            "bbox": box, "bbox_label": self.label_of[int(annotation["category_id"])], "mask": mask,
            "ignore_flag": int(annotation.get("iscrowd", 0)),
        }

    def with_instances(self, indices: list[int]) -> list[int]:
        """Those images that have an instance to learn from (detectron2's filter: crowds do not count)."""
        return [i for i in indices if any(not instance["ignore_flag"] for instance in self.get_data_info(i)["instances"])]

    def ids(self, indices: list[int]) -> np.ndarray:
        """COCO's image ids (n,) int64."""
        return np.array([self.get_data_info(i)["img_id"] for i in indices], dtype=np.int64)
