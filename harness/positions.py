"""Tables of positions: sine-cosine, learned ones resized to another grid, and BEiT's relative positions with their resizing."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EXTRA = 3  # rows of a bias table behind the offsets: class to patch, patch to class, class to class


def sincos_table(width: int, grid: tuple[int, int], layout: str = "sincos-mae") -> np.ndarray:
    """Sine-cosine table (N, D), float64, row by row, without a class row.

    Half of D encodes each axis as [sin, cos] with frequencies 10000^(-k/(D/4)). MAE's layout puts the column (x) first, MoCo v3's
    the row (y) first (recipes A1: the two are transposed).

    Raises:
        ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {width}")
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, cols = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")

    def encode(axis: np.ndarray) -> np.ndarray:
        angle = axis.reshape(-1, 1).astype(np.float64) * omega[None]
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    first, second = (cols, rows) if layout == "sincos-mae" else (rows, cols)
    return np.concatenate([encode(first), encode(second)], axis=1)


def sincos_positions(width: int, grid: tuple[int, int], layout: str = "sincos-mae") -> Tensor:
    """`sincos_table` as a model holds it: float32 (1, 1 + N, D), a zero row for the class token in front."""
    table = np.concatenate([np.zeros((1, width)), sincos_table(width, grid, layout)], axis=0)
    return torch.from_numpy(table).float()[None]


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Interpolation of a position table (1, 1 + N, D) from one grid to another, bicubic as MAE-repo util/pos_embed.py; the class row is kept."""
    if old == new:
        return table
    head, body = table[:, :1], table[:, 1:]
    body = body.reshape(1, *old, -1).permute(0, 3, 1, 2).to(torch.promote_types(table.dtype, torch.float32))
    body = F.interpolate(body, size=new, mode=mode, align_corners=False)
    return torch.cat([head, body.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(head.dtype)], dim=1)


def offsets(grid: tuple[int, int]) -> tuple[int, int]:
    """Different offsets between two patches of a grid, by rows and by columns: (2H-1, 2W-1)."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def relative_index(grid: tuple[int, int]) -> Tensor:
    """Row of the bias table for each pair of tokens, (1 + N, 1 + N), in BEiT's order: (2H-1)(2W-1) offsets, then cls->patch, patch->cls, cls->cls."""
    h, w = grid
    coords = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)  # (2, N)
    offset = coords[:, :, None] - coords[:, None, :]  # (2, N, N)
    body = (offset[0] + h - 1) * (2 * w - 1) + offset[1] + w - 1
    count = (2 * h - 1) * (2 * w - 1)
    index = torch.empty(h * w + 1, h * w + 1, dtype=torch.long)
    index[1:, 1:] = body
    index[0, :] = count
    index[:, 0] = count + 1
    index[0, 0] = count + 2
    return index


def spread(source: int, target: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Where BEiT puts the offsets of two tables for interpolation along one axis (BEiT-repo run_class_finetuning.py).

    The target's offsets are whole numbers. The source's grow as a geometric series, 1, 1 + q, 1 + q + q^2, ..., dense in the middle where a
    table changes fastest, with q such that the last one meets the target's last. BEiT looks for q by bisection between 1.01 and 1.5 and
    no further: a source too small for that ends inside the target (4 x 4 to 6 x 6 does).

    Args:
        source, target: number of offsets, both odd.

    Returns:
        coordinates of the source (source,) and of the target (target,), and q.
    """
    reach = target // 2
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (source // 2)) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    arm = np.cumsum(ratio ** np.arange(source // 2))
    return np.concatenate([-arm[::-1], [0.0], arm]), np.arange(-reach, reach + 1, dtype=np.float64), ratio


def resize_bias(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A relative bias table ((2H-1)(2W-1)+3, heads) for another grid: cubic splines between `spread` coordinates, beyond the source its border.

    The three rows of the class token are kept. BEiT has square grids only; here each axis has its own ratio, and one that keeps its
    length is left as it is.

    Raises:
        ValueError: a side of one of the grids has a single patch, so that there is nothing to interpolate.
    """
    if old == new:
        return table
    if min(*old, *new) < 2:
        raise ValueError(f"a relative bias cannot be interpolated from {old[0]}x{old[1]} to {new[0]}x{new[1]} patches: a side has one patch only")
    from scipy.interpolate import RectBivariateSpline

    axes = [(at, at) if (at := np.arange(a, dtype=np.float64)).size == b else spread(a, b)[:2] for a, b in zip(offsets(old), offsets(new), strict=True)]
    (y, to_y), (x, to_x) = axes
    values = table[:-EXTRA].detach().cpu().double().numpy().reshape(*offsets(old), -1)
    heads = [RectBivariateSpline(y, x, values[:, :, i], kx=min(3, len(y) - 1), ky=min(3, len(x) - 1))(to_y, to_x) for i in range(values.shape[2])]
    body = torch.from_numpy(np.stack(heads, axis=-1)).reshape(-1, values.shape[2]).to(table)
    return torch.cat([body, table[-EXTRA:]])
