"""Attention maps: what the block itself attends to, drawn from a checkpoint with its own images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import written
from PIL import Image

from harness.checkpoint import Backbone
from harness.jobs import Node
from harness.spec import ViTConfig
from harness.store import Store
from harness.vit import ViT
from results.attention import SIDE, attention, picture

TINY = ViTConfig(size=(16, 16), patch=4, width=24, depth=2, heads=3)


@pytest.mark.parametrize("changed", [{}, {"positions": "none", "relative_bias": "shared", "key_bias": False}, {"relative_bias": "block"}])
def test_the_maps_are_what_the_block_uses(changed: dict) -> None:
    """With one value that counts and an output that passes it on, a block's attention can be read off what it returns."""
    from dataclasses import replace

    vit = ViT(replace(TINY, **{"heads": 1, **changed})).eval()
    block = vit.blocks[-1]
    with torch.no_grad():
        for bias in vit.relative_bias or ():
            bias.table.normal_()
        block.attn.qkv.weight.mul_(20.0)
    found: list[torch.Tensor] = []

    def note(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        found.extend((given[0], out))

    block.attn.register_forward_hook(note)
    weights = attention(vit, torch.randn(2, 3, 16, 16))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 17), atol=1e-5) and weights.std() > 0.02
    _, _, values = block.attn.qkv(found[0]).chunk(3, dim=-1)
    assert torch.allclose(block.attn.proj(weights @ values), found[1], atol=1e-4)


def test_a_picture_needs_the_checkpoint_and_its_images(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.fromarray(np.full((20, 24, 3), 60 * i, dtype=np.uint8)).save(images / f"{i}.png")
    node = Node("pretrain", "mae", {"seed": 0}, where={"folders": {"folder": str(images)}})
    Store(tmp_path / "runs").prepare()
    folder = written(tmp_path / "runs", node)
    assert picture(folder) is None
    mean = (0.5, 0.5, 0.5)
    Backbone(TINY, mean, mean, ViT(TINY).state_dict(), None, {}).save(folder / "checkpoint" / "backbone.pt")
    made = picture(folder)
    assert made is not None and made == picture(folder)
    with Image.open(io.BytesIO(made)) as sheet:
        assert sheet.size == (4 * SIDE + 12, 3 * SIDE + 8)
        assert np.asarray(sheet)[5, 5].tolist() == [0, 0, 0] and np.asarray(sheet)[SIDE + 9, 5].max() > 30
    for file in images.iterdir():
        file.unlink()
    assert picture(folder) is None
