"""The shared ViT: tables of positions and their resizing against the originals' numbers, what a checkpoint may become, and BEiT's zero k bias."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from known_answers import PRECISIONS, cases, config, golden, section

from harness.optim import build_optimizer, parameter_groups
from harness.positions import relative_index, resize_bias, resize_positions, sincos_positions, sincos_table, spread
from harness.randomness import seed_all
from harness.spec import Recipe, ViTConfig
from harness.vit import ViT, load_backbone

POSITIONS, BEIT = golden("mae_pos_embed"), golden("beit_finetune")
SMALL = ViTConfig(size=(32, 48), patch=8, width=16, depth=2, heads=2)


def grids(case: str) -> list[tuple[int, int]]:
    """The two grids of a case: "4to6", "4x5to6x8"."""
    sides = [[int(n) for n in part.split("x")] for part in case.split("to")]
    return [(side[0], side[-1]) for side in sides]


# ------------------------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("key", [key for key in POSITIONS if key.startswith("mae/")])
def test_sincos_tables_are_maes(key: str) -> None:
    """Column first, float64; in float32 as models hold it, with a zero row for the class token."""
    table = POSITIONS[key]
    side = math.isqrt(len(table))  # a class row makes no square
    ours = sincos_table(table.shape[1], (side, side))
    expected = table[len(table) - side * side :]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    assert not table[: len(table) - side * side].any()
    held = sincos_positions(table.shape[1], (side, side))[0]
    assert held.dtype == torch.float32 and not held[0].any()
    np.testing.assert_allclose(held[1:].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", cases(POSITIONS, "mae_large/"))
def test_large_sincos_tables_are_maes(case: str) -> None:
    """Of the papers' sizes: some rows, and a weighted sum in which each row counts."""
    width, grid = (int("".join(c for c in part if c.isdigit())) for part in case.split("_")[:2])
    table = sincos_table(width, (grid, grid))
    if case.endswith("_cls"):
        table = np.concatenate([np.zeros((1, width)), table])
    np.testing.assert_allclose(table[POSITIONS[f"mae_large/{case}/rows"]], POSITIONS[f"mae_large/{case}/values"], rtol=0, atol=1e-12)
    weighted = (np.arange(1, len(table) + 1)[:, None] * table).sum(axis=0)
    np.testing.assert_allclose(weighted, POSITIONS[f"mae_large/{case}/row_weighted_sum"], rtol=1e-9, atol=1e-9 * len(table))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", cases(POSITIONS, "interpolate/"))
def test_positions_are_interpolated_as_maes(case: str, precision: torch.dtype) -> None:
    """The class row is kept; source coordinates are float32 in the original."""
    old, new = grids(case)
    resized = resize_positions(torch.from_numpy(POSITIONS[f"interpolate/{case}/input"]).to(precision), old, new)
    assert resized.dtype == precision
    np.testing.assert_allclose(resized.numpy(), POSITIONS[f"interpolate/{case}/output"], rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- relative bias


@pytest.mark.parametrize("name", ["beit_pretrain", "beit_finetune"])
def test_relative_index_is_beits(name: str) -> None:
    """Otherwise a loaded table would be read at other offsets."""
    arrays = golden(name)
    grid = tuple(n // config(arrays, "p") for n in arrays["images"].shape[-2:])
    tables = [value for key, value in arrays.items() if key.endswith("relative_position_index")]
    assert tables
    for table in tables:
        np.testing.assert_array_equal(relative_index(grid).numpy(), table)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", cases(BEIT, "rel_interp/"))
def test_bias_tables_are_interpolated_as_beits(case: str, precision: torch.dtype) -> None:
    """Geometric source coordinates by the same bisection, cubic splines, the class token's three rows kept."""
    old, new = grids(case)
    recorded = section(BEIT, f"rel_interp/{case}")
    for a, b in zip(old, new, strict=True):
        source, target, ratio = spread(2 * a - 1, 2 * b - 1)
        assert math.isclose(ratio, recorded["ratio_q"].item(), rel_tol=1e-12)
        np.testing.assert_allclose(source, recorded["source_coordinates"].numpy(), rtol=1e-12)
        np.testing.assert_allclose(target, recorded["target_coordinates"].numpy(), rtol=1e-12)
    resized = resize_bias(recorded["input"].to(precision), old, new)
    assert resized.dtype == precision and torch.equal(resized[-3:], recorded["input"][-3:].to(precision))
    np.testing.assert_allclose(resized.numpy(), recorded["output"].numpy(), rtol=1e-5, atol=1e-5)


def test_bias_table_of_a_wide_grid() -> None:
    """The originals have squares only. Here each axis is stretched by itself: a table that depends on the row only stays so."""
    rows = torch.arange(-2.0, 3).pow(2).reshape(5, 1, 1).expand(5, 9, 1)  # 3 x 5 patches
    table = torch.cat([rows.reshape(-1, 1), torch.tensor([[7.0], [8.0], [9.0]])])
    tall = resize_bias(table, (3, 5), (4, 5))[:-3].reshape(7, 9)
    assert torch.allclose(tall, tall[:, :1].expand(7, 9), atol=1e-5)
    both = resize_bias(table, (3, 5), (4, 6))[:-3].reshape(7, 11)
    assert torch.allclose(both, tall[:, :1].expand(7, 11), atol=1e-5)
    assert resize_bias(table, (3, 5), (3, 5)) is table
    with pytest.raises(ValueError, match="one patch only"):
        resize_bias(table[:8], (1, 3), (2, 3))


def test_checkpoint_with_a_shared_bias_becomes_a_larger_vit_with_one_per_block() -> None:
    """BEiT's fine-tuning at 384 pixels: every block starts from the same interpolated copy; the ViT takes images of its new size."""
    source = dataclasses.replace(SMALL, relative_bias="shared", positions="none", key_bias=False)
    target = dataclasses.replace(source, size=(48, 64), relative_bias="block")
    vit = ViT(source)
    torch.nn.init.normal_(vit.relative_bias[0].table)
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    larger = load_backbone(state, source, target)
    expected = resize_bias(state["relative_bias.0.table"], source.grid, target.grid)
    assert all(torch.equal(module.table, expected) for module in larger.relative_bias) and len(larger.relative_bias) == source.depth
    assert larger.tokens(torch.randn(1, 3, 48, 64)).shape == (1, 49, 16)
    same = load_backbone(state, source, dataclasses.replace(target, size=source.size)).eval()
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(same.tokens(images), vit.eval().tokens(images))
    added = load_backbone(ViT(SMALL).state_dict(), SMALL, dataclasses.replace(SMALL, relative_bias="block"))
    assert not any(module.table.any() for module in added.relative_bias)


def test_what_a_checkpoint_cannot_become_is_refused() -> None:
    """A silent partial load would make a number that means nothing."""
    biased = dataclasses.replace(SMALL, relative_bias="block")
    with pytest.raises(ValueError, match="block cannot become none"):
        load_backbone(ViT(biased).state_dict(), biased, SMALL)
    with pytest.raises(ValueError, match="another positions"):
        load_backbone(ViT(SMALL).state_dict(), SMALL, dataclasses.replace(SMALL, positions="none"))
    with pytest.raises(ValueError, match="another width, depth"):
        load_backbone(ViT(SMALL).state_dict(), SMALL, dataclasses.replace(SMALL, width=32, depth=3))


def test_vit_without_positions_has_no_table() -> None:
    """BEiT+ knows places by its relative bias alone: without one, the order of patches makes no difference."""
    vit = ViT(dataclasses.replace(SMALL, positions="none")).eval()
    assert "pos_embed" not in vit.state_dict()
    patches, order = torch.randn(2, 24, 16), torch.randperm(24)
    torch.testing.assert_close(vit.encode(vit.place(patches))[:, 1:][:, order], vit.encode(vit.place(patches[:, order]))[:, 1:])


# --------------------------------------------------------------------------------------------------------------- no bias of k


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "bf16-weights"])
def test_k_bias_stays_zero_through_bf16_adamw(whole: bool) -> None:
    """A k bias changes no softmax, so its gradient is rounding noise, which AdamW would turn into full steps."""

    def trained(key_bias: bool) -> ViT:
        seed_all("k bias")
        vit = ViT(dataclasses.replace(SMALL, size=(16, 16), key_bias=key_bias))
        torch.nn.init.zeros_(vit.blocks[0].attn.qkv.bias)
        if whole:
            vit = vit.to(torch.bfloat16)
        recipe = Recipe(batch=4, lr=1e-2, iterations=50, weight_decay=0.05, decay_vectors=True)
        optimizer = build_optimizer(parameter_groups(vit, recipe, 0), recipe)
        for _ in range(50):
            images = torch.randn(4, 3, 16, 16, dtype=torch.bfloat16 if whole else torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
                loss = (vit.tokens(images)[:, 0] - images.mean(dim=(2, 3)).repeat(1, 6)[:, :16]).float().pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return vit

    held, free = trained(False), trained(True)
    for block in held.blocks:
        q, k, v = block.attn.qkv.bias.chunk(3)
        assert not k.any() and q.any() and v.any()
    assert all(block.attn.qkv.bias.chunk(3)[1].abs().max() > 1e-3 for block in free.blocks)  # what would happen
