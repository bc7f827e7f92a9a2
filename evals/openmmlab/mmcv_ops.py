"""A stand-in for mmcv's compiled module, so that mmdet and mmseg run with mmcv-lite and nothing is compiled.

mmcv-lite has all of `mmcv.ops` in Python but the module `mmcv._ext`. `install` provides that: `nms` and `roi_align` through
torchvision, in fp32 whatever the features' type, and for every other name a function that says what is missing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAME = "mmcv._ext"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (n, 4) that non-maximum suppression keeps, best first."""
    if offset != 0:
        raise RuntimeError("nms with offset 1 (boxes that include their last pixel) needs compiled mmcv")
    import torchvision

    kept: Tensor = torchvision.ops.nms(boxes.float(), scores.float(), iou_threshold)
    return kept


def roi_align_forward(
    features: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, *, aligned_height: int, aligned_width: int,
    spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:
    """Average-pooled regions (n, C, h, w) of features (B, C, H, W) into `output`; rois (n, 5) are (image, x1, y1, x2, y2)."""
    if pool_mode != 1:
        raise RuntimeError("roi_align with pool_mode max needs compiled mmcv")
    import torchvision

    output.copy_(torchvision.ops.roi_align(
        features.float(), rois.float(), (aligned_height, aligned_width), spatial_scale, sampling_ratio or -1, aligned,
    ))


def roi_align_backward(
    gradient: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_features: Tensor, *, aligned_height: int, aligned_width: int,
    spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:
    """The gradient (n, C, h, w) of roi_align's output carried back into `grad_features` (B, C, H, W)."""
    grad_features.copy_(torch.ops.torchvision._roi_align_backward(
        gradient.float(), rois.float(), spatial_scale, aligned_height, aligned_width, *grad_features.shape, sampling_ratio or -1, aligned,
    ))


def missing(name: str) -> Callable[..., Any]:
    """A function that says that an op is not there."""

    def op(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"mmcv op {name} needs compiled mmcv (installed: mmcv-lite)")

    return op


class Extension(types.ModuleType):
    """The module `mmcv._ext`: two ops, and a clear refusal for every other."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # inspect and importlib probe for __file__ and the like
            raise AttributeError(name)
        return missing(name)


def install() -> None:
    """Put the stand-in into sys.modules, unless compiled ops are there. Call before mmdet or mmseg is imported; twice does no harm."""
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return
    module = Extension(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)  # mmengine asks find_loader, which wants a spec
    for op in (nms, roi_align_forward, roi_align_backward):
        setattr(module, op.__name__, op)
    sys.modules[NAME] = module
