"""The shared ViT as a backbone of mmseg and mmdet: four taps, brought to the strides of a pyramid."""

from __future__ import annotations

from typing import Literal

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from harness.vit import ViT

Norm = Literal["batch", "group"]
DEFAULT_SCALES = {8: (2.0, 1.0, 0.5, 0.25)}


def even_taps(depth: int) -> tuple[int, ...]:
    """Four blocks (0-based) at the ends of the quarters of the depth: 12 -> 2, 5, 8, 11 (Li21's choice, recipes A10). Fewer than four serve several maps."""
    return tuple(-(-i * depth // 4) - 1 for i in range(1, 5))


def scales_for(patch: int) -> tuple[float, ...]:
    """Size of the four maps relative to the ViT's grid: strides of 4, 8, 16, 32 pixels for a patch of 16, and also for one of 8 (ours)."""
    return DEFAULT_SCALES.get(patch, (4.0, 2.0, 1.0, 0.5))


class NearBatchNorm(nn.BatchNorm2d):
    """Batch norm that uses the running statistics where a channel has one value only (the 1x1 pooled branch at batch 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


MODELS.register_module("NearBN", module=NearBatchNorm, force=True)


def rescale(width: int, scale: float, norm: Norm) -> nn.Module:
    """The step from the ViT's grid to `scale` times it, at constant width (recipes A9, A10): transposed convolutions or max pooling."""

    def double() -> nn.Module:
        return nn.ConvTranspose2d(width, width, 2, stride=2)

    if scale == 4:
        return nn.Sequential(double(), NearBatchNorm(width) if norm == "batch" else nn.GroupNorm(1, width), nn.GELU(), double())
    if scale == 2:
        return double()
    if scale == 1:
        return nn.Identity()
    if scale < 1 and (1 / scale).is_integer():
        return nn.MaxPool2d(round(1 / scale))
    raise ValueError(f"a pyramid map has 4, 2, 1, 1/2 or 1/4 times the grid of the ViT, not {scale}")


class Pyramid(BaseModule):  # type: ignore[misc]
    """Maps of a ViT at several strides.

    Args:
        vit: pre-trained; its parameters are found under `vit.`.
        taps: blocks (0-based), one for each map.
        scales: size of each map relative to the grid.
        norm: in the branch that goes up twice: "batch" (UperNet) or "group" (Li21).
    """

    def __init__(self, vit: ViT, taps: tuple[int, ...], scales: tuple[float, ...], norm: Norm = "batch") -> None:
        super().__init__()
        self.vit, self.taps = vit, taps
        self.steps = nn.ModuleList(rescale(vit.config.width, s, norm) for s in scales)

    def init_weights(self) -> None:
        """Nothing: the ViT comes pre-trained and the steps have torch's own initialisation."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, 3, H, W) -> maps (B, D, scale H/P, scale W/P). No norm is applied to the taps."""
        maps = self.vit.features(images, self.taps)
        return tuple(step(m) for step, m in zip(self.steps, maps, strict=True))


def keep_fp32(model: nn.Module, *names: str) -> None:
    """Give the outputs of these last layers of heads in fp32, so that losses, box decoding and ranking are not done in bf16."""
    found = {name: module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in names}
    assert found, names
    for module in found.values():
        module.register_forward_hook(lambda _module, _inputs, output: output.float() if isinstance(output, torch.Tensor) else output)
