"""Scoring an image at several sizes and mirrored: the mean of the class probabilities of all views, at the image's own size (mIoU ms+flip)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mmcv
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmengine.structures import PixelData
from mmseg.models.utils import resize
from mmseg.structures import SegDataSample

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # BEiT-repo configs, ms (recipes A9)


class Views(BaseTransform):  # type: ignore[misc]
    """`img` -> `views`: [(image (h, w, 3) uint8, how often it counts)].

    The short side is each of RATIOS times `short`, and at least `crop`, as SETR's and BEiT's resize for several scales has it: ratios that end
    at the same size are one view that counts more than once.
    """

    def __init__(self, short: int, crop: int) -> None:
        self.sides = Counter(max(crop, int(short * ratio)) for ratio in RATIOS)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds views."""
        least = min(results["img"].shape[:2])
        results["views"] = [(mmcv.imrescale(results["img"], side / least), times) for side, times in sorted(self.sides.items())]
        return results


TRANSFORMS.register_module("HarnessViews", module=Views, force=True)


def predict_from_views(model: Any, sample: SegDataSample) -> None:
    """Add "pred_ms" to the sample of one image: the class with the highest mean probability over its views and their mirror images."""
    total: Any = 0
    for image, times in sample.metainfo["views"]:
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        inputs = model.data_preprocessor({"inputs": [pixels], "data_samples": [SegDataSample()]}, False)["inputs"]
        for mirrored in (False, True):
            logits = model.slide_inference(inputs.flip(3) if mirrored else inputs, [{}])[:, :, : image.shape[0], : image.shape[1]]
            logits = logits.flip(3) if mirrored else logits
            total += times * resize(logits, size=sample.ori_shape, mode="bilinear", align_corners=False).softmax(1)
    sample.set_data({"pred_ms": PixelData(data=total.argmax(1))})
