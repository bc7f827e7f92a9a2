"""The shared ViT as a backbone of mmseg and mmdet: four taps, brought to the strides of a pyramid."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from harness.batches import BatchNorm, processes
from harness.checkpoint import Backbone
from harness.positions import resize_positions
from harness.vit import ViT

Norm = Literal["batch", "group"]
DEFAULT_SCALES = {8: (2.0, 1.0, 0.5, 0.25)}


def even_taps(depth: int) -> tuple[int, ...]:
    """Four blocks (0-based) at the ends of the quarters of the depth: 12 -> 2, 5, 8, 11 (Li21's choice, recipes A10). Fewer than four serve several maps."""
    return tuple(-(-i * depth // 4) - 1 for i in range(1, 5))


def scales_for(patch: int) -> tuple[float, ...]:
    """Size of the four maps relative to the ViT's grid: strides of 4, 8, 16, 32 pixels for a patch of 16, and also for one of 8 (ours)."""
    return DEFAULT_SCALES.get(patch, (4.0, 2.0, 1.0, 0.5))


class NearBatchNorm(BatchNorm):
    """Batch norm over the images of all processes (SyncBN), for channels that may have one value only.

    Such a channel (the 1x1 pooled branch with one image on one device) is normalised by the running statistics, which then stay as they
    are: `num_batches_tracked` tells how often that did not happen.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] * processes() == 1:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


def steps_by_running_statistics(model: nn.Module, steps: int) -> int:
    """In how many of the training steps (of the passes of a process, where a step has several) some batch norm of a model had a single value per channel.

    Kept through interruptions, as the model's state is.
    """
    counted = [m.num_batches_tracked for m in model.modules() if isinstance(m, NearBatchNorm)]
    return max((steps - int(count) for count in counted if count is not None), default=0)


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


def for_crops(
    checkpoint: Backbone, crop: int, drop_path: float, bias: Literal["kept", "added"], layer_scale: float | None, positions: Literal["bicubic", "bilinear"]
) -> ViT:
    """A pre-trained ViT for square crops, to be fine-tuned.

    Absolute positions and relative biases are brought to the crop's grid, a shared bias is copied into each block.

    Args:
        crop: side in pixels, a multiple of the patch.
        bias: "added": a ViT without relative bias gets one per block, zero at the start.
        layer_scale: a ViT without LayerScale gets one of this value; None: it gets none.
        positions: how absolute positions are interpolated.
    """
    config, state = checkpoint.config, dict(checkpoint.state)
    if layer_scale is not None and config.layer_scale is None:
        config = dataclasses.replace(config, layer_scale=layer_scale)
        state |= {f"blocks.{i}.ls{j}.gamma": torch.full((config.width,), layer_scale) for i in range(config.depth) for j in (1, 2)}
    block = config.relative_bias != "none" or bias == "added"
    target = dataclasses.replace(config, size=(crop, crop), relative_bias="block" if block else "none")
    vit = dataclasses.replace(checkpoint, config=config, state=state).build(target, drop_path)
    if positions != "bicubic" and vit.pos_embed is not None:
        with torch.no_grad():
            vit.pos_embed.copy_(resize_positions(state["pos_embed"], config.grid, target.grid, positions))
    return vit


def keep_fp32(model: nn.Module, *names: str) -> None:
    """Give the outputs of these last layers of heads in fp32, so that losses, box decoding and ranking are not done in bf16."""
    found = {name: module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in names}
    assert found, names
    for module in found.values():
        module.register_forward_hook(lambda _module, _inputs, output: output.float() if isinstance(output, torch.Tensor) else output)
