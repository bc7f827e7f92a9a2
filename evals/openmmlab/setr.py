"""SETR's decoder with progressive upsampling (SETR-PUP, Zheng et al. 2021) for mmsegmentation, as configurations built in Python.

BEiT's paper has it in Tables 3, 4 and 10; the code was not released. This is mmsegmentation's head as its configuration for ADE20K at 512 pixels sets
it up, on the blocks that SETR itself takes of a ViT with twelve (SETR_PUP_DeiT_512x512_160k_ade20k): the last, and three with auxiliary heads.
"""

from __future__ import annotations

from typing import Any

from mmseg.models.decode_heads import SETRUPHead
from mmseg.registry import MODELS

from evals.openmmlab.upernet import LossOnly, cross_entropy


@MODELS.register_module("HarnessPUPHead", force=True)
class PUPHead(LossOnly, SETRUPHead):  # type: ignore[misc]
    """SETRUPHead: LayerNorm on the tokens, 3x3 convolutions with batch norm, each followed by bilinear upsampling."""


def heads(width: int, sizes: dict[str, Any], common: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """(head on the last map: four convolutions, each doubling the grid; on each other map two, each with a step of four; or None for these)."""
    weight = sizes["auxiliary"]

    def head(index: int, convolutions: int, times: int, weight: float) -> dict[str, Any]:
        return {
            "type": "HarnessPUPHead", "in_channels": width, "in_index": index, "channels": min(256, sizes["channels"]), "num_convs": convolutions,
            "up_scale": times, "dropout_ratio": 0.0, "loss_decode": cross_entropy(weight), **common,
        }

    return head(3, 4, 2, 1.0), [head(i, 2, 4, weight) for i in range(3)] if weight else None
