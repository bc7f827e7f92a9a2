"""ViTDet's simple feature pyramid: all levels from the last map of a plain ViT (Li et al., arXiv 2203.16527; detectron2's projects/ViTDet, recipes A10)."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of maps (B, C, H, W), one place at a time."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resample(width: int, scale: float) -> tuple[dict[str, nn.Module], int]:
    """Layers from the ViT's grid to `scale` times it, and the width after them: halved by each doubling, kept by pooling."""
    if scale == 4:
        return {
            "up1": nn.ConvTranspose2d(width, width // 2, 2, stride=2), "norm": LayerNorm2d(width // 2), "act": nn.GELU(),
            "up2": nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        }, width // 4
    if scale == 2:
        return {"up1": nn.ConvTranspose2d(width, width // 2, 2, stride=2)}, width // 2
    return ({"pool": nn.MaxPool2d(round(1 / scale))} if scale < 1 else {}), width


class SimplePyramid(BaseModule):  # type: ignore[misc]
    """A neck for mmdet: one map (B, D, h, w) -> maps of `channels` at each of `scales` times its size, then coarser ones by taking every second place.

    Each level has a 1x1 and a 3x3 convolution, both with a layer norm and no activation.
    """

    def __init__(self, width: int, channels: int, scales: tuple[float, ...], levels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        self.coarser = levels - len(scales)
        for scale in scales:
            layers, wide = resample(width, scale)
            self.levels.append(nn.Sequential(OrderedDict(
                layers, conv1=nn.Conv2d(wide, channels, 1, bias=False), norm1=LayerNorm2d(channels),
                conv2=nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm2=LayerNorm2d(channels),
            )))

    def init_weights(self) -> None:
        """Nothing: torch's own initialisation, as in detectron2."""

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The last of the ViT's maps, as a tuple of one -> all levels, finest first."""
        (x,) = maps
        found = [level(x) for level in self.levels]
        for _ in range(self.coarser):
            found.append(F.max_pool2d(found[-1], 1, stride=2))
        return tuple(found)
