"""BEiT has no k bias: in our fused qkv its place stays exactly zero, whatever trains it, or an export would lose something."""

from __future__ import annotations

import pytest
import torch

from harness.randomness import seed_all
from harness.spec import ViTConfig
from harness.vit import ViT


@pytest.mark.parametrize("pure", [False, True])
def test_zero_k_bias_survives_bf16_adamw(pure: bool) -> None:
    """50 steps with weight decay, under autocast and in pure bfloat16, where rounding would let a k bias drift; q and v bias do move."""
    seed_all(0, "init")
    vit = ViT(ViTConfig((16, 16), 8, 32, 1, 2, relative_bias="shared", key_bias=False))
    if pure:
        vit.bfloat16()
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-2, weight_decay=0.05)
    images = torch.randn(4, 3, 16, 16, dtype=next(vit.parameters()).dtype)
    for _ in range(50):
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            loss = vit.tokens(images)[:, 0, :4].float().pow(2).mean() + vit.tokens(images)[:, 1:].float().std()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    q, k, v = vit.blocks[0].attn.qkv.bias.detach().chunk(3)
    assert torch.equal(k, torch.zeros_like(k)) and q.abs().min() > 0 and v.abs().min() > 0
