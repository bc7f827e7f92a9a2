"""Windowed attention for detection, put inside the blocks of the shared ViT, and the relative positions of Li21 and of ViTDet (recipes A10).

Nothing of the ViT is written a second time: `install` replaces the attention of some blocks by a wrapper, or by timm's own with decomposed relative positions
added, and keeps the layers, so that parameters stay the pre-trained ones. Images have one size, the square that detection pads to. There is no class token:
ViTDet drops it on entry; Li21 does not say, and a window has no place for it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from evals.openmmlab.backbone import Pyramid, even_taps
from harness.checkpoint import Backbone
from harness.positions import EXTRA, offsets, resize_bias
from harness.vit import ViT, load_backbone

Grid = tuple[int, int]


def partition(x: Tensor, window: int) -> tuple[Tensor, Grid]:
    """Maps (B, H, W, D) as windows (B x rows x columns, window, window, D), zeros below and to the right where they do not fit; and the padded (H, W)."""
    b, h, w, d = x.shape
    x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.reshape(b, rows, window, columns, window, d).transpose(2, 3)
    return x.reshape(-1, window, window, d), (rows * window, columns * window)


def merge(windows: Tensor, padded: Grid, grid: Grid) -> Tensor:
    """Inverse of `partition`: windows (B x rows x columns, window, window, D) -> (B, H, W, D) of `grid`, what was padded cut off."""
    window, d = windows.shape[1], windows.shape[-1]
    rows, columns = padded[0] // window, padded[1] // window
    x = windows.reshape(-1, rows, columns, window, window, d).transpose(2, 3).reshape(-1, *padded, d)
    return x[:, : grid[0], : grid[1]]


class Windowed(nn.Module):
    """A block's attention within windows. It is given what comes after the block's first norm and pads that, as detectron2 does: padded tokens are keys too."""

    def __init__(self, attn: nn.Module, grid: Grid, window: int) -> None:
        super().__init__()
        self.attn, self.grid, self.window = attn, grid, window

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> the same. `attn_mask` (1, heads, window^2, window^2) is added in every window."""
        windows, padded = partition(x.unflatten(1, self.grid), self.window)
        out = self.attn(windows.flatten(1, 2), attn_mask=attn_mask, is_causal=is_causal)
        return merge(out.unflatten(1, (self.window, self.window)), padded, self.grid).flatten(1, 2)


class PatchBias(nn.Module):
    """A relative position bias between the patches of a grid: a table (2H-1, 2W-1, heads) in BEiT's order, zero at the start.

    Called as the ViT calls its own: the result is an additive mask (1, heads, N, N). It is made of sliding views of the table and not of a lookup: at 64x64
    patches an index of 16.8 million places would have to be kept, and its gradient sorted.
    """

    def __init__(self, grid: Grid, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(*offsets(grid), heads))

    def forward(self, keep: Tensor | None = None) -> Tensor:
        """Entry (i, j) is that of the offset of patch i from patch j, by rows and by columns."""
        assert keep is None, "detection sees all patches"
        h, w = self.grid
        views = self.table.unfold(0, h, 1).unfold(1, w, 1)  # (h, w, heads, h, w): i, then j from the end, for the offset grows with i and falls with j
        bias = views.permute(2, 0, 1, 3, 4).flip(3, 4).reshape(1, -1, h * w, h * w)
        kind = bias.device.type  # once for all blocks: each would cast it for itself; the gradient is summed over the places in fp32 all the same
        return bias.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else bias


def axis_positions(table: Tensor, queries: int, keys: int) -> Tensor:
    """Rows (queries, keys, C) of a table of relative positions along one axis (detectron2's `get_rel_pos`, recipes A10).

    A table (L, C) of another length than 2 max(queries, keys) - 1 is interpolated linearly; the coordinates of a shorter side are stretched.
    """
    length = 2 * max(queries, keys) - 1
    if len(table) != length:
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    stretch_q, stretch_k = max(keys / queries, 1.0), max(queries / keys, 1.0)
    at = torch.arange(queries, device=table.device)[:, None] * stretch_q - torch.arange(keys, device=table.device)[None] * stretch_k
    return table[(at + (keys - 1) * stretch_k).long()]


def decomposed(q: Tensor, rows: Tensor, columns: Tensor, grid: Grid, keys: Grid) -> tuple[Tensor, Tensor]:
    """Terms by row (..., N, H of the keys) and by column (..., N, W of the keys) of queries (..., N, C), which are not scaled (MViTv2, ViTDet)."""
    q = q.unflatten(-2, grid)
    by_row = torch.einsum("...hwc,hkc->...hwk", q, axis_positions(rows, grid[0], keys[0]))
    by_column = torch.einsum("...hwc,wkc->...hwk", q, axis_positions(columns, grid[1], keys[1]))
    return by_row.flatten(-3, -2), by_column.flatten(-3, -2)


class DecomposedAttention(Attention):  # type: ignore[misc]
    """timm's attention with ViTDet's decomposed relative positions: tables (2H-1, C) and (2W-1, C) of the block's own, zero at the start.

    The two terms are a product as well: queries lengthened by them, keys by the row and the column that they stand in, one-hot. So the fused kernels
    that take no bias do it, and the (N, N) bias of an image and head, 4096 x 4096 at 1024 pixels, is never stored.
    """

    def __init__(self, attn: Attention, grid: Grid) -> None:
        super().__init__(attn.qkv.in_features, attn.num_heads, qkv_bias=True)
        self.qkv, self.proj, self.fused_attn, self.grid = attn.qkv, attn.proj, attn.fused_attn, grid
        self.rows, self.columns = (nn.Parameter(torch.zeros(n, self.head_dim)) for n in offsets(grid))
        where = torch.arange(grid[0] * grid[1])
        place = torch.cat([F.one_hot(where // grid[1], grid[0]), F.one_hot(where % grid[1], grid[1])], dim=1)
        self.register_buffer("place", place.float(), persistent=False)  # (N, H + W)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> the same."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        terms = decomposed(q, self.rows, self.columns, self.grid, self.grid)
        q = torch.cat([q * self.scale, *(t.to(q.dtype) for t in terms)], dim=-1)
        k = torch.cat([k, self.place.to(k.dtype).expand(b, self.num_heads, -1, -1)], dim=-1)
        if self.fused_attn:
            v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))  # the flash kernel wants one width
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=1.0)[..., : self.head_dim]
        else:
            logits = q @ k.transpose(-2, -1)
            x = (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1) @ v
        out: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, -1))
        return out


def install(vit: ViT, grid: Grid, window: int, biases: Literal["shared", "block", "none"], decompose: bool) -> None:
    """Make the attention of all blocks but four windowed, the four at the ends of the quarters global (recipes A10), and add relative positions, all zero.

    Args:
        grid: patches of the images, H and W.
        window: patches along a side of a window.
        biases: tables of relative position bias: one for the windowed blocks and one for the global ones (Li21), one for each block, or none.
        decompose: ViTDet's relative positions in each block.
    """
    everywhere = [i in even_taps(vit.config.depth) for i in range(vit.config.depth)]
    sizes = [grid if globally else (window, window) for globally in everywhere]
    for block, size, globally in zip(vit.blocks, sizes, everywhere, strict=True):
        attn = DecomposedAttention(block.attn, size) if decompose else block.attn
        block.attn = attn if globally else Windowed(attn, grid, window)
    if biases != "none":
        vit.config = dataclasses.replace(vit.config, relative_bias=biases)  # where layer decay looks whether a table is of one block
        kinds = list(dict.fromkeys(everywhere))  # a ViT of four blocks has no windowed ones
        vit.bias_of_block = [kinds.index(globally) if biases == "shared" else i for i, globally in enumerate(everywhere)]
        firsts = [vit.bias_of_block.index(i) for i in range(max(vit.bias_of_block) + 1)]
        vit.relative_bias = nn.ModuleList(PatchBias(sizes[block], vit.config.heads) for block in firsts)


class WindowedPyramid(Pyramid):
    """`Pyramid` of a ViT on which `install` was called: no class token, images of one size."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, 3, H, W) -> maps (B, D, scale H/P, scale W/P). No norm is applied to the taps."""
        p = self.vit.config.patch
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        outputs = self.vit.run_blocks(self.vit.place(self.vit.patches(images), grid=grid)[:, 1:])
        return tuple(step(outputs[tap].transpose(1, 2).unflatten(2, grid)) for step, tap in zip(self.steps, self.taps, strict=True))


def li21(checkpoint: Backbone, side: int, drop_path: float) -> ViT:
    """The ViT of Li21 (MAE-paper Table 4) for images of `side` x `side` pixels: windows of the pre-training's grid.

    Positions are resized once and trained at their new size; a ViT without any is given random ones, as Li21 gives BEiT (normal 0.02: ours). Biases of the
    pre-training are resized, zero otherwise; where it had one for each block, each block keeps its own (ours).
    """
    config, state = checkpoint.config, dict(checkpoint.state)
    tables = [state.pop(f"relative_bias.{i}.table") for i in range(config.depth) if f"relative_bias.{i}.table" in state]
    plain = dataclasses.replace(config, relative_bias="none", positions="learned" if config.positions == "none" else config.positions)
    target = dataclasses.replace(plain, size=(side, side))
    if config.positions == "none":
        plain, state["pos_embed"] = target, 0.02 * torch.randn(1, 1 + target.patches, config.width)
    vit = load_backbone(state, plain, target, drop_path)
    install(vit, target.grid, config.grid[0], "block" if config.relative_bias == "block" else "shared", decompose=False)
    fill(vit, tables, config.grid)
    return vit


def vitdet(checkpoint: Backbone, side: int, drop_path: float, window: int) -> ViT:
    """The ViT of ViTDet: decomposed relative positions in each block; absolute ones stay as pre-trained and are interpolated in each pass.

    ViTDet was never run with a ViT that has a relative position bias: it keeps it, resized as in Li21's setting (ours).
    """
    config, state = checkpoint.config, dict(checkpoint.state)
    tables = [state.pop(f"relative_bias.{i}.table") for i in range(config.depth) if f"relative_bias.{i}.table" in state]
    vit = load_backbone(state, dataclasses.replace(config, relative_bias="none"), None, drop_path)
    install(vit, (side // config.patch, side // config.patch), window, config.relative_bias, decompose=True)
    fill(vit, tables, config.grid)
    return vit


def fill(vit: ViT, tables: list[Tensor], grid: Grid) -> None:
    """Put the pre-training's bias tables, one or one for each block, into the ViT's, resized from `grid`. The rows of the class token are left out."""
    for i, bias in enumerate(vit.relative_bias or ()):
        if tables:
            with torch.no_grad():
                bias.table.copy_(resize_bias(tables[i % len(tables)], grid, bias.grid)[:-EXTRA].view_as(bias.table))
