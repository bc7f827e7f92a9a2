"""Windowed attention and relative positions of detection: against detectron2's recorded answers, and whole blocks against loops written out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from known_answers import PRECISIONS, cases, golden
from torch import Tensor, nn

from evals.openmmlab.foreign import openmmlab
from harness.checkpoint import Backbone
from harness.positions import relative_index, resize_bias
from harness.spec import ViTConfig
from harness.vit import ViT

PIECES = golden("vitdet_pieces")
VIT = ViTConfig(size=(32, 32), patch=8, width=32, depth=4, heads=2)


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    with openmmlab():
        yield


def recorded(key: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(PIECES[key]).to(dtype)


# -------------------------------------------------------------------------------------------------- detectron2's own answers


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_windows_are_detectron2s_and_can_be_put_together_again(dtype: torch.dtype) -> None:
    from evals.openmmlab.windows import merge, partition

    x = recorded("window/input", dtype)
    windows, padded = partition(x, int(PIECES["window/window_size"]))
    assert padded == tuple(PIECES["window/padded_hw"])
    assert torch.equal(windows, recorded("window/windows", dtype))
    assert torch.equal(merge(windows, padded, (x.shape[1], x.shape[2])), recorded("window/unpartitioned", dtype))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", cases(PIECES, "rel_pos/"))
def test_decomposed_relative_positions_are_detectron2s(case: str, dtype: torch.dtype) -> None:
    from evals.openmmlab.windows import axis_positions, decomposed

    def at(name: str) -> Tensor:
        return recorded(f"rel_pos/{case}/{name}", dtype)

    grid, keys = (tuple(int(n) for n in PIECES[f"rel_pos/{case}/{name}_size"]) for name in ("q", "k"))
    longest = [2 * max(pair) - 1 for pair in zip(grid, keys, strict=True)]
    interpolated = [len(at("rel_pos_h")), len(at("rel_pos_w"))] != longest
    close = {"rtol": 0.0, "atol": 5e-5 if interpolated else 1e-5}
    for axis, name in enumerate(("h", "w")):
        torch.testing.assert_close(axis_positions(at(f"rel_pos_{name}"), grid[axis], keys[axis]), at(f"get_rel_pos_{name}"), **close)
    by_row, by_column = decomposed(at("q"), at("rel_pos_h"), at("rel_pos_w"), grid, keys)
    terms = (by_row[..., :, None] + by_column[..., None, :]).flatten(-2)
    torch.testing.assert_close(at("attn") + terms, at("output"), **close)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", cases(PIECES, "abs_pos/"))
def test_absolute_positions_are_interpolated_as_detectron2_does(case: str, dtype: torch.dtype) -> None:
    table = recorded(f"abs_pos/{case}/input", dtype)
    if not PIECES[f"abs_pos/{case}/has_cls_token"]:
        table = torch.cat([torch.full_like(table[:, :1], 9.0), table], dim=1)  # our tables have the row; it must not be seen
    side, grid = math.isqrt(table.shape[1] - 1), tuple(int(n) for n in PIECES[f"abs_pos/{case}/hw"])
    vit = ViT(ViTConfig(size=(8 * side, 8 * side), patch=8, width=table.shape[2], depth=1, heads=1)).to(dtype)
    vit.pos_embed = nn.Parameter(table)
    placed = vit.place(torch.zeros(1, math.prod(grid), table.shape[2], dtype=dtype), grid=grid)[:, 1:]
    torch.testing.assert_close(placed.reshape(1, *grid, -1), recorded(f"abs_pos/{case}/output", dtype), rtol=0, atol=1e-5)


def test_every_piece_is_tested() -> None:
    assert cases(PIECES) == ["abs_pos", "rel_pos", "window"]


# ------------------------------------------------------------------------------------------------- whole blocks, written out


def slow_attention(attn: Any, x: Tensor, bias: Any) -> Tensor:
    """Attention over tokens (n, D) one query and head at a time; `bias(head, q, i, j)` is added to the logits, q (C,) not scaled."""
    n, width = x.shape
    heads = attn.num_heads
    q, k, v = (attn.qkv(x)[:, i * width : (i + 1) * width].reshape(n, heads, -1) for i in range(3))
    out = torch.zeros(n, heads, width // heads, dtype=x.dtype)
    for head in range(heads):
        for i in range(n):
            logits = torch.stack([q[i, head] @ k[j, head] / math.sqrt(width // heads) + bias(head, q[i, head], i, j) for j in range(n)])
            out[i, head] = logits.softmax(0) @ v[:, head]
    return attn.proj(out.reshape(n, width))


def slow_block(block: Any, attn: Any, x: Tensor, grid: tuple[int, int], window: tuple[int, int], bias: Any) -> Tensor:
    """A whole block on tokens (N, D) of one image: windows cut out of the normed map one after the other, zeros where they reach beyond it."""
    normed, mixed = block.norm1(x).reshape(*grid, -1), torch.zeros(*grid, x.shape[1], dtype=x.dtype)
    for top in range(0, grid[0], window[0]):
        for left in range(0, grid[1], window[1]):
            tokens = torch.zeros(*window, x.shape[1], dtype=x.dtype)
            inside = normed[top : top + window[0], left : left + window[1]]
            tokens[: inside.shape[0], : inside.shape[1]] = inside
            out = slow_attention(attn, tokens.flatten(0, 1), bias).reshape(*window, -1)
            mixed[top : top + window[0], left : left + window[1]] = out[: inside.shape[0], : inside.shape[1]]
    x = x + block.ls1(mixed.flatten(0, 1))
    return x + block.ls2(block.mlp(block.norm2(x)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("protocol", ["li21", "vitdet"])
def test_whole_blocks_on_a_grid_that_windows_do_not_divide(protocol: str, fused: bool) -> None:
    from evals.openmmlab.windows import install

    torch.manual_seed(0)
    config = ViTConfig(size=(24, 24), patch=8, width=8, depth=5, heads=2, layer_scale=0.5)
    vit, grid, window = ViT(config).double().eval(), (5, 7), 3
    install(vit, grid, window, "shared" if protocol == "li21" else "none", decompose=protocol == "vitdet")
    vit.double()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    globally = [1, 2, 3, 4]  # the ends of the quarters of five blocks
    x = torch.randn(2, 35, 8, dtype=torch.float64)
    outputs, before = vit.run_blocks(x), x
    for i, (block, after) in enumerate(zip(vit.blocks, outputs, strict=True)):
        size = grid if i in globally else (window, window)
        attn = block.attn if i in globally else block.attn.attn

        def bias(head: int, q: Tensor, a: int, b: int, i: int = i, size: tuple[int, int] = size, attn: Any = attn) -> Tensor:
            down, right = a // size[1] - b // size[1] + size[0] - 1, a % size[1] - b % size[1] + size[1] - 1
            if protocol == "li21":
                return vit.relative_bias[int(i in globally)].table[down, right, head]
            return q @ attn.rows[down] + q @ attn.columns[right]

        expected = torch.stack([slow_block(block, attn, image, grid, size, bias) for image in before])
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
        before = after


def test_a_bias_of_patches_is_beits_without_the_class_token_forward_and_backward() -> None:
    from evals.openmmlab.windows import PatchBias

    bias, weight = PatchBias((3, 4), 2), torch.randn(1, 2, 12, 12)
    nn.init.normal_(bias.table)
    table = bias.table.detach().reshape(-1, 2).requires_grad_()
    looked_up = table[relative_index((3, 4))[1:, 1:]].permute(2, 0, 1)[None]
    assert torch.equal(bias(), looked_up)
    (bias() * weight).sum().backward()
    (looked_up * weight).sum().backward()
    assert bias.table.grad is not None and table.grad is not None
    torch.testing.assert_close(bias.table.grad.reshape(-1, 2), table.grad)


def test_a_bias_in_bf16_has_its_gradient_summed_in_fp32() -> None:
    """In bf16 a sum of ones ends at 256: the 400 patches that are at no distance from themselves would not all count."""
    from evals.openmmlab.windows import PatchBias

    bias = PatchBias((20, 20), 1)
    with torch.autocast("cpu", torch.bfloat16):
        mask = bias()
    assert mask.dtype == torch.bfloat16
    mask.sum(dtype=torch.float32).backward()
    assert bias.table.grad is not None and bias.table.grad[19, 19, 0] == 400 and bias.table.grad[0, 0, 0] == 1


def test_padded_tokens_are_zero_after_the_norm_and_not_before_it() -> None:
    """Padding before the block would make them the norm's bias: the answer must not change with what the norm makes of a zero."""
    from evals.openmmlab.windows import Windowed

    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, **given: Any) -> Tensor:
            seen.append(x)
            return x

    vit = ViT(VIT)
    block = vit.blocks[0]
    block.attn = Windowed(Spy(), (5, 4), 4)
    nn.init.constant_(block.norm1.bias, 7.0)
    block(torch.randn(1, 20, 32))
    (windows,) = seen
    assert windows.shape == (2, 16, 32) and not windows[1, 4:].any() and windows[1, :4].any()


# ------------------------------------------------------------------------------------------------------ the two protocols


def checkpoint(**changes: Any) -> Backbone:
    torch.manual_seed(1)
    config = dataclasses.replace(VIT, **changes)
    return Backbone(config, (0.5,) * 3, (0.5,) * 3, {k: torch.randn_like(v) for k, v in ViT(config).state_dict().items()})


def test_li21_shares_tables_among_windowed_and_among_global_blocks() -> None:
    from evals.openmmlab.windows import Windowed, li21

    vit = li21(checkpoint(depth=8), 96, 0.1)
    assert [isinstance(b.attn, Windowed) for b in vit.blocks] == [True, False] * 4
    assert [tuple(bias.table.shape) for bias in vit.relative_bias or ()] == [(7, 7, 2), (23, 23, 2)]
    assert all(not bias.table.any() for bias in vit.relative_bias or ())
    assert vit.pos_embed.shape == (1, 1 + 144, 32)


@pytest.mark.parametrize("protocol", ["li21", "vitdet"])
@pytest.mark.parametrize("kind", ["shared", "block"])
def test_beits_biases_are_taken_from_pre_training_and_resized(kind: str, protocol: str) -> None:
    from evals.openmmlab.windows import li21, vitdet

    given = checkpoint(depth=8, relative_bias=kind, positions="none", layer_scale=0.1, key_bias=False)
    vit = li21(given, 96, 0.0) if protocol == "li21" else vitdet(given, 96, 0.0, 3)
    assert len(vit.relative_bias or ()) == (2 if kind == "shared" else 8)
    for block in range(8):
        source = given.state[f"relative_bias.{0 if kind == 'shared' else block}.table"]
        side = 12 if block % 2 else (4 if protocol == "li21" else 3)
        found = vit.relative_bias[vit.bias_of_block[block]]().detach()  # type: ignore[index]
        expected = resize_bias(source, (4, 4), (side, side))[relative_index((side, side))[1:, 1:]].permute(2, 0, 1)[None]
        torch.testing.assert_close(found, expected)
    assert torch.equal(vit.blocks[0].ls1.gamma, given.state["blocks.0.ls1.gamma"])
    if protocol == "li21":  # BEiT has no absolute positions: Li21 gives it random ones
        assert 0.015 < float(vit.pos_embed.detach().std()) < 0.025
    else:
        assert vit.pos_embed is None


def test_positions_are_resized_once_or_in_each_pass() -> None:
    from evals.openmmlab.windows import li21, vitdet

    given = checkpoint()
    once, always = li21(given, 96, 0.0), vitdet(given, 96, 0.0, 4)
    assert always.pos_embed.shape == given.state["pos_embed"].shape
    patches = torch.randn(1, 144, 32)
    torch.testing.assert_close(once.place(patches, grid=(12, 12)), always.place(patches, grid=(12, 12)))


def test_vitdets_positions_belong_to_their_block_and_start_at_zero() -> None:
    from evals.openmmlab.windows import vitdet
    from harness.optim import layer_of

    given = checkpoint(depth=8)
    vit = vitdet(given, 96, 0.0, 4)
    tables = {n: p for n, p in vit.named_parameters() if n.endswith((".rows", ".columns"))}
    assert len(tables) == 16 and all(not t.any() for t in tables.values())
    assert {len(t) for n, t in tables.items() if n.startswith("blocks.1.")} == {23} and {len(t) for n, t in tables.items() if n.startswith("blocks.0.")} == {7}
    assert all(layer_of(f"vit.{n}", 8) == int(n.split(".")[1]) + 1 for n in tables)
    assert torch.equal(vit.blocks[0].attn.attn.qkv.weight, given.state["blocks.0.attn.qkv.weight"])


def test_without_windows_that_cut_and_with_zero_positions_it_is_the_pre_trained_vit() -> None:
    """On images of the pre-training's size all that is added changes nothing, but for the class token that is not there."""
    from evals.openmmlab.windows import WindowedPyramid, li21, vitdet

    given, images = checkpoint(), torch.rand(2, 3, 32, 32)
    plain = ViT(VIT).eval()
    plain.load_state_dict(given.state)
    expected = plain.run_blocks(plain.place(plain.patches(images))[:, 1:])[-1].transpose(1, 2).reshape(2, 32, 4, 4)
    for vit in (li21(given, 32, 0.0), vitdet(given, 32, 0.0, 4)):
        (found,) = WindowedPyramid(vit.eval(), (3,), (1.0,))(images)
        np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-4, atol=1e-3)  # of values up to 150


def test_bf16_on_a_cpu_reaches_the_decomposed_attention() -> None:
    from evals.openmmlab.windows import WindowedPyramid, vitdet

    model = WindowedPyramid(vitdet(checkpoint(depth=8), 96, 0.0, 4), (7,), (1.0,))
    images, seen = torch.rand(1, 3, 96, 96), []
    model.vit.blocks[1].attn.proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = model(images)
    found.float().sum().backward()
    assert seen == [torch.bfloat16]
    assert all(b.attn.columns.grad.abs().sum() > 0 for b in list(model.vit.blocks)[1::2])
