"""FLOPs of a step: the same whichever kernel computes the attention."""

from __future__ import annotations

from typing import Any

import torch

from harness.metrics import count_flops
from harness.vit import ViT, ViTConfig, choose_attention


def counted(fused: bool) -> float:
    """FLOPs of forward and backward of a small ViT on two images."""
    vit, facts = ViT(ViTConfig(size=(32, 32), patch=8, width=24, depth=2, heads=3)).train(), dict[str, Any](flops_per_step=None)
    if not fused:
        choose_attention(vit, torch.device("cpu"), torch.bfloat16)
    with count_flops(facts):
        vit.encode(vit.place(vit.patches(torch.zeros(2, 3, 32, 32)))).sum().backward()
    return float(facts["flops_per_step"])


def test_fused_attention_counts_as_much_as_explicit_attention() -> None:
    tokens, width, head, images, blocks = 17, 24, 8, 2, 2
    attention = blocks * images * 3 * 3 * 2 * 2 * tokens**2 * head  # heads, forward and twice that backward, two products, multiply and add
    linear = blocks * images * 3 * 2 * tokens * 12 * width**2 + 2 * images * 2 * 16 * 192 * width  # no gradient for the pixels
    assert counted(True) == counted(False) == attention + linear
