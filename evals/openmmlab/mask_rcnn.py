"""Mask R-CNN on the ViT for mmdetection, with FPN or ViTDet's simple pyramid, as configurations built in Python."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from torch import Tensor, nn

from evals.openmmlab.backbone import Pyramid, keep_fp32
from evals.openmmlab.simple_pyramid import LayerNorm2d, SimplePyramid
from evals.openmmlab.windows import WindowedPyramid, li21, vitdet
from harness.checkpoint import Backbone


@MODELS.register_module("HarnessRoIExtractor", force=True)
class RoIExtractor(SingleRoIExtractor):  # type: ignore[misc]
    """mmdet's, in fp32: its own turns the boxes into the features' type, and bf16 has three digits for a coordinate."""

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Features (n, C, h, w) of rois (n, 5)."""
        pooled: Tensor = super().forward(tuple(f.float() for f in feats), rois.float(), roi_scale_factor)
        return pooled


@dataclass(frozen=True)
class Size:
    """Sizes of the detector. `channels` of FPN, RPN and masks; `hidden` of the box head; boxes per image; `anchor`: side over stride; `points`
    squared: RoIAlign's samples of a bin, 0 for as many as the box is large."""

    channels: int
    hidden: int
    rpn_convs: int
    box_convs: int
    mask_convs: int
    anchor: int
    finest: int
    levels: int
    before_nms: int
    before_nms_in_test: int
    proposals: int
    sampled: int
    points: int


PAPER = Size(  # detectron2's Mask R-CNN with the heads of its "new baselines" (recipes A10)
    256, 1024, rpn_convs=2, box_convs=4, mask_convs=4, anchor=8, finest=56, levels=5, before_nms=2000, before_nms_in_test=1000, proposals=1000,
    sampled=512, points=0,
)
SMALL = Size(
    64, 256, rpn_convs=1, box_convs=0, mask_convs=2, anchor=4, finest=28, levels=4, before_nms=200, before_nms_in_test=200, proposals=100,
    sampled=32, points=1,
)


def train_pipeline(side: int, jitter: tuple[float, float]) -> list[dict[str, Any]]:
    """Large-scale jitter (recipes A10): resize to `side` times a factor, crop or pad to a square, flip."""
    return [
        {"type": "HarnessReadImage"}, {"type": "HarnessReadInstances"},
        {"type": "RandomFlip", "prob": 0.5}, {"type": "RandomResize", "scale": (side, side), "ratio_range": jitter, "keep_ratio": True},
        {"type": "RandomCrop", "crop_type": "absolute", "crop_size": (side, side), "recompute_bbox": True, "allow_negative_crop": True},
        {"type": "FilterAnnotations", "min_gt_bbox_wh": (1e-2, 1e-2), "by_mask": True, "keep_empty": False}, {"type": "PackDetInputs"},
    ]


def test_pipeline(side: int) -> list[dict[str, Any]]:
    """Longer side to `side`; the preprocessor pads to a square, as in training."""
    return [
        {"type": "HarnessReadImage"}, {"type": "Resize", "scale": (side, side), "keep_ratio": True},
        {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")},
    ]


def backbone(checkpoint: Backbone, by: str, side: int, drop_path: float, window: int, taps: tuple[int, ...], scales: tuple[float, ...]) -> dict[str, Any]:
    """Configuration of the backbone, the ViT in it. It gives four maps of `scales` after the blocks `taps`, or for "vitdet" the map of the last block.

    Args:
        by: "li21" or "vitdet" (see `windows.py`), or "default": the ViT's attention as it is, with class token; a relative bias is brought to the new grid.
        side: of the square input, in pixels.
        window: patches along a side of ViTDet's windows.
    """
    if by == "vitdet":
        last = checkpoint.config.depth - 1
        return {"type": WindowedPyramid, "vit": vitdet(checkpoint, side, drop_path, window), "taps": (last,), "scales": (1.0,)}
    if by == "li21":
        return {"type": WindowedPyramid, "vit": li21(checkpoint, side, drop_path), "taps": taps, "scales": scales, "norm": "group"}
    resized = dataclasses.replace(checkpoint.config, size=(side, side)) if checkpoint.config.relative_bias != "none" else None
    return {"type": Pyramid, "vit": checkpoint.build(resized, drop_path), "taps": taps, "scales": scales}


def build(checkpoint: Backbone, pyramid: dict[str, Any], size: Size, by: str, side: int, scales: tuple[float, ...], classes: int) -> nn.Module:
    """Neck, RPN, box head and mask head on the maps of `backbone`: FPN and batch norm (Li21), or the simple pyramid and layer norm ("vitdet").

    Batch norm is over the images of all processes; with one process that is the plain one.
    """
    width, patch = checkpoint.config.width, checkpoint.config.patch
    exact = [patch / s for s in scales]
    strides = [int(s) if s.is_integer() else s for s in exact + [exact[-1] * 2 ** (i + 1) for i in range(size.levels - 4)]]
    norm: dict[str, Any] = {"type": LayerNorm2d, "eps": 1e-6} if by == "vitdet" else {"type": "NearBN", "requires_grad": True}
    neck: dict[str, Any] = {"type": SimplePyramid, "width": width, "channels": size.channels, "scales": scales, "levels": size.levels} if by == "vitdet" else {
        "type": "FPN", "in_channels": [width] * 4, "out_channels": size.channels, "num_outs": size.levels, "norm_cfg": norm,
    }

    def regions(output: int) -> dict[str, Any]:
        return {
            "type": "HarnessRoIExtractor", "out_channels": size.channels, "featmap_strides": strides[:4], "finest_scale": size.finest,
            "roi_layer": {"type": "RoIAlign", "output_size": output, "sampling_ratio": size.points},
        }

    def coder(*stds: float) -> dict[str, Any]:
        return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)}

    cross_entropy = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    convolutional = {
        "type": "Shared4Conv1FCBBoxHead", "norm_cfg": norm, "conv_out_channels": size.channels,
    } if size.box_convs else {"type": "Shared2FCBBoxHead"}
    assign = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.7, "neg_iou_thr": 0.3, "min_pos_iou": 0.3, "match_low_quality": True, "ignore_iof_thr": -1}
    sample = {"type": "RandomSampler", "num": 256 if size is PAPER else 64, "pos_fraction": 0.5, "neg_pos_ub": -1, "add_gt_as_proposals": False}
    propose = {"nms_pre": size.before_nms, "max_per_img": size.proposals, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}
    model: nn.Module = MODELS.build(ConfigDict({
        "type": "MaskRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor", "mean": [255 * m for m in checkpoint.mean], "std": [255 * s for s in checkpoint.std],
            "bgr_to_rgb": True, "pad_mask": True, "pad_size_divisor": side,
        },
        "backbone": pyramid, "neck": neck,
        "rpn_head": {
            "type": "RPNHead", "in_channels": size.channels, "feat_channels": size.channels, "num_convs": size.rpn_convs,
            "anchor_generator": {"type": "AnchorGenerator", "scales": [size.anchor], "ratios": [0.5, 1.0, 2.0], "strides": strides},
            "bbox_coder": coder(1.0, 1.0, 1.0, 1.0), "loss_cls": {**cross_entropy, "use_sigmoid": True}, "loss_bbox": {"type": "L1Loss"},
        },
        "roi_head": {
            "type": "StandardRoIHead", "bbox_roi_extractor": regions(7), "mask_roi_extractor": regions(14),
            "bbox_head": {
                **convolutional, "in_channels": size.channels, "fc_out_channels": size.hidden, "roi_feat_size": 7, "num_classes": classes,
                "bbox_coder": coder(0.1, 0.1, 0.2, 0.2), "reg_class_agnostic": False, "loss_cls": cross_entropy, "loss_bbox": {"type": "L1Loss"},
            },
            "mask_head": {
                "type": "FCNMaskHead", "num_convs": size.mask_convs, "in_channels": size.channels, "conv_out_channels": size.channels,
                "num_classes": classes, "norm_cfg": norm, "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": {
            "rpn": {"assigner": assign, "sampler": sample, "allowed_border": -1, "pos_weight": -1, "debug": False}, "rpn_proposal": propose,
            "rcnn": {
                "assigner": {**assign, "pos_iou_thr": 0.5, "neg_iou_thr": 0.5, "min_pos_iou": 0.5, "match_low_quality": False},
                "sampler": {**sample, "num": size.sampled, "pos_fraction": 0.25, "add_gt_as_proposals": True},
                "mask_size": 28, "pos_weight": -1, "debug": False,
            },
        },
        "test_cfg": {
            "rpn": {**propose, "nms_pre": size.before_nms_in_test},
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100, "mask_thr_binary": 0.5},
        },
    }))
    keep_fp32(model, "rpn_cls", "rpn_reg", "fc_cls", "fc_reg", "conv_logits")
    return model
