"""UperNet and ADE20K's images for mmsegmentation, as configurations built in Python; the frame of the SETR decoder as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as ANY_MODELS
from mmengine.registry import TRANSFORMS
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import PackSegInputs
from mmseg.models.decode_heads import FCNHead, UPerHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from PIL import Image
from torch import Tensor, nn

from evals.openmmlab.backbone import Pyramid, for_crops, keep_fp32
from evals.openmmlab.samples import Reader
from evals.openmmlab.views import predict_from_views
from harness.checkpoint import Backbone
from harness.data import BadImage
from harness.spec import JobFailed, Recipe

IGNORED = 255
WINDOWS_AT_ONCE = 8
META = ("img_path", "seg_map_path", "ori_shape", "img_shape", "pad_shape", "scale_factor")  # what scoring keeps of what the pipeline knows of an image
ANY_MODELS.register_module("HarnessPyramid", module=Pyramid, force=True)


class ReadLabels(Reader):
    """`seg_map_path` -> `gt_seg_map` (H, W) uint8: labels 1..n become 0..n-1, 0 is ignored (255). ReadImage has compared the size."""

    def __init__(self, classes: int) -> None:
        if classes > IGNORED:
            raise JobFailed(f"objectInfo150.txt: {classes} classes: at most {IGNORED} fit beside the ignored label")
        self.classes = classes

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds gt_seg_map.

        Raises:
            BadImage: no index picture, or a label above the number of classes.
        """
        path = results["seg_map_path"]
        try:
            with Image.open(path) as picture:
                labels = np.asarray(picture)
        except (OSError, SyntaxError) as error:
            raise BadImage(f"{path}: cannot be read as a label picture ({error}): mend it or remove it with its image") from error
        if labels.ndim != 2:
            raise BadImage(f"{path}: has {labels.shape[-1]} channels: ADE20K's labels are one-channel PNG files (annotations/ of ADEChallengeData2016)")
        if labels.max() > self.classes:
            raise BadImage(f"{path}: label {labels.max()} is above the number of classes in objectInfo150.txt ({self.classes})")
        results["gt_seg_map"] = np.where(labels == 0, IGNORED, labels.astype(np.int32) - 1).astype(np.uint8)
        results["seg_fields"].append("gt_seg_map")
        return results


class LossOnly:
    """mmseg's heads without the pixel accuracy that they log at every step (a twentieth of a step on CPU)."""

    def loss_by_feat(self: Any, seg_logits: Tensor, batch_data_samples: list[Any]) -> dict[str, Tensor]:
        """Cross-entropy at the size of the labels; seg_logits (B, classes, h, w)."""
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1).long()  # (B, H, W)
        logits = resize(seg_logits, size=labels.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        return {"loss_ce": self.loss_decode(logits, labels, ignore_index=self.ignore_index)}


@MODELS.register_module("HarnessUPerHead", force=True)
class UPerNetHead(LossOnly, UPerHead):  # type: ignore[misc]
    """UPerHead."""


@MODELS.register_module("HarnessFCNHead", force=True)
class AuxiliaryHead(LossOnly, FCNHead):  # type: ignore[misc]
    """FCNHead."""


class PackLabels(PackSegInputs):  # type: ignore[misc]
    """mmseg's packing with labels that stay uint8 up to the device; its int64 are eight times as much to pass between processes."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """inputs (3, H, W) uint8, data_samples with gt_sem_seg (1, H, W) uint8."""
        packed: dict[str, Any] = super().transform(results)
        labels = packed["data_samples"].gt_sem_seg
        labels.data = labels.data.byte()
        return packed


TRANSFORMS.register_module("HarnessReadLabels", module=ReadLabels, force=True)
TRANSFORMS.register_module("HarnessPackLabels", module=PackLabels, force=True)


@MODELS.register_module("HarnessSegmentor", force=True)
class Segmentor(EncoderDecoder):  # type: ignore[misc]
    """EncoderDecoder whose sliding windows go through the network together, and which scores an image's `views` where it has them."""

    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None) -> list[Any]:
        """Samples with pred_sem_seg, and pred_ms from their views."""
        samples: list[Any] = super().predict(inputs, data_samples)
        for sample in samples:
            if "views" in sample.metainfo:
                predict_from_views(self, sample)
        return samples

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict[str, Any]]) -> Tensor:
        """Mean of the windows' logits (B, classes, H, W), windows placed as mmseg places them: the last one is moved inside."""
        (stride_y, stride_x), (crop_y, crop_x) = self.test_cfg.stride, self.test_cfg.crop_size
        batch, _, height, width = inputs.shape
        tops = [min(y, height - crop_y) for y in range(0, height - crop_y + stride_y, stride_y)]
        lefts = [min(x, width - crop_x) for x in range(0, width - crop_x + stride_x, stride_x)]
        places = [(y, x) for y in tops for x in lefts]
        windows = torch.cat([inputs[:, :, y : y + crop_y, x : x + crop_x] for y, x in places])
        metas = [{**batch_img_metas[0], "img_shape": windows.shape[2:]}]
        logits = torch.cat([self.encode_decode(part, metas) for part in windows.split(WINDOWS_AT_ONCE)])
        total, count = inputs.new_zeros(batch, logits.shape[1], height, width), inputs.new_zeros(height, width)
        for (y, x), part in zip(places, logits.split(batch), strict=True):
            total[:, :, y : y + crop_y, x : x + crop_x] += part
            count[y : y + crop_y, x : x + crop_x] += 1
        return total / count


def train_pipeline(sizes: dict[str, Any], classes: int) -> list[dict[str, Any]]:
    """BEiT's and MAE's augmentation (recipes A9): resize by 0.5..2, crop with at most 75 % of one class, flip, photometric distortion."""
    crop, short = sizes["crop"], sizes["short"]
    return [
        {"type": "HarnessReadImage"}, {"type": "HarnessReadLabels", "classes": classes},
        {"type": "RandomResize", "scale": (4 * short, short), "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (crop, crop), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5}, {"type": "PhotoMetricDistortion"}, {"type": "HarnessPackLabels"},
    ]


def test_pipeline(sizes: dict[str, Any], classes: int) -> list[dict[str, Any]]:
    """Short side to its size, labels at the image's own; for scoring at several scales the image's views as well."""
    views = [{"type": "HarnessViews", "short": sizes["short"], "crop": sizes["crop"]}] if sizes["multi_scale"] else []
    return [
        {"type": "HarnessReadImage"}, *views, {"type": "Resize", "scale": (4 * sizes["short"], sizes["short"]), "keep_ratio": True},
        {"type": "HarnessReadLabels", "classes": classes}, {"type": "PackSegInputs", "meta_keys": META + (("views",) if views else ())},
    ]


def scenes(folder: Path, split: str, classes: tuple[str, ...], pipeline: list[dict[str, Any]]) -> BaseSegDataset:
    """Images and labels of a split ("training" or "validation"), in the order of their names."""
    return BaseSegDataset(
        data_root=str(folder), data_prefix={"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"}, metainfo={"classes": classes},
        pipeline=pipeline, test_mode=True,
    )


def heads(width: int, sizes: dict[str, Any], common: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """(UPerHead, auxiliary FCN head on the third map with one convolution and 256 channels at the papers' width, or None)."""
    channels, weight = sizes["channels"], sizes["auxiliary"]
    auxiliary = {
        "type": "HarnessFCNHead", "in_channels": width, "in_index": 2, "channels": min(256, channels), "num_convs": 1, "concat_input": False,
        "loss_decode": cross_entropy(weight), "dropout_ratio": 0.1, **common,
    }
    return {
        "type": "HarnessUPerHead", "in_channels": [width] * 4, "in_index": [0, 1, 2, 3], "pool_scales": (1, 2, 3, 6), "channels": channels,
        "loss_decode": cross_entropy(1.0), "dropout_ratio": 0.1, **common,
    }, auxiliary if weight else None


def cross_entropy(weight: float) -> dict[str, Any]:
    """The loss of a head."""
    return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}


def build(checkpoint: Backbone, recipe: Recipe, sizes: dict[str, Any], classes: int) -> nn.Module:
    """A decoder on the ViT's pyramid; `sizes` are `ADE20K.sizes`."""
    from evals.openmmlab import setr

    width, crop = checkpoint.config.width, sizes["crop"]
    common = {"num_classes": classes, "norm_cfg": {"type": "NearBN", "requires_grad": True}, "align_corners": False}
    decoder, auxiliary = (setr.heads if sizes["head"] == "setr" else heads)(width, sizes, common)
    vit = for_crops(checkpoint, crop, recipe.drop_path, sizes["bias"], sizes["layer_scale"], sizes["positions"])
    model: nn.Module = MODELS.build(ConfigDict({
        "type": "HarnessSegmentor",
        "data_preprocessor": {
            "type": "SegDataPreProcessor", "mean": [255 * m for m in checkpoint.mean], "std": [255 * s for s in checkpoint.std],
            "bgr_to_rgb": True, "pad_val": 0, "seg_pad_val": IGNORED, "size": (crop, crop), "test_cfg": {"size": (crop, crop)},
        },
        "backbone": {"type": "HarnessPyramid", "vit": vit, "taps": sizes["taps"], "scales": sizes["scales"]},
        "decode_head": decoder, "auxiliary_head": auxiliary,
        "train_cfg": {}, "test_cfg": {"mode": "slide", "crop_size": (crop, crop), "stride": (sizes["stride"], sizes["stride"])},
    }))
    keep_fp32(model, "conv_seg")
    return model
