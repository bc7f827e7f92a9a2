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


def corners(rois: Tensor, size: tuple[int, int], bins: tuple[int, int], scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """RoIAlign with one sample in the middle of each bin, as a weighted sum of the four pixels around it.

    Returns:
        index into the feature map flattened over (B, H, W) and bilinear weight, both (n, bins_y, bins_x, 2, 2). A sample more than a
        pixel outside counts as 0, as in torchvision.
    """

    def axis(start: Tensor, side: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
        where = start[:, None] + (torch.arange(count, device=rois.device) + 0.5) * (side / count)[:, None]  # (n, count), in pixels
        inside = (where >= -1) & (where <= length)
        where = where.clamp(min=0, max=length - 1)
        low = where.long()
        fraction = where - low
        pixels, weights = torch.stack([low, (low + 1).clamp(max=length - 1)], -1), torch.stack([1 - fraction, fraction], -1)
        return pixels, weights * inside[..., None]

    x1, y1, x2, y2 = (rois[:, 1:] * scale - (0.5 if aligned else 0.0)).unbind(1)
    height, width = (y2 - y1, x2 - x1) if aligned else ((y2 - y1).clamp(min=1.0), (x2 - x1).clamp(min=1.0))
    rows, row_weights = axis(y1, height, bins[0], size[0])
    columns, column_weights = axis(x1, width, bins[1], size[1])
    image = rois[:, 0].long()[:, None, None, None, None]
    index = (image * size[0] + rows[:, :, None, :, None]) * size[1] + columns[:, None, :, None, :]
    return index, row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]


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
    if not gradient.is_cuda and sampling_ratio == 1:  # torchvision's CPU kernel goes channel by channel: three times as long
        batch, channels, height, width = grad_features.shape
        index, weight = corners(rois.float(), (height, width), (aligned_height, aligned_width), spatial_scale, aligned)
        rows = gradient.float().permute(0, 2, 3, 1)[:, :, :, None, None] * weight[..., None]  # (n, h, w, 2, 2, C)
        flat = gradient.new_zeros(batch * height * width, channels, dtype=torch.float32)
        flat.index_add_(0, index.flatten(), rows.reshape(-1, channels))
        grad_features.copy_(flat.reshape(batch, height, width, channels).permute(0, 3, 1, 2))
        return
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
