"""Masks as COCO writes them: polygons along pixel edges, and run lengths for crowds."""

from __future__ import annotations

import numpy as np


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed RLE of a mask (H, W) bool: column by column, beginning with the number of zeros."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"counts": [int(c) for c in (counts[:-1] if counts[-1] == 0 and len(counts) > 1 else counts)], "size": [int(s) for s in mask.shape]}


def from_run_lengths(counts: list[int], size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) bool of uncompressed run lengths."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size, order="F")


def polygons(mask: np.ndarray) -> list[list[float]]:
    """COCO polygons [x0, y0, x1, y1, ...] of a mask (H, W) bool, exact along pixel edges.

    COCO's polygons have no holes: a mask with a hole is cut into two through it, as annotators do.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    loops = _loops(mask)
    hole = next((loop for loop in loops if _area(loop) < 0), None)
    if hole is None:
        return [[float(c) for corner in loop for c in corner] for loop in loops]
    cut = (min(x for x, _ in hole) + max(x for x, _ in hole) + 1) // 2
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return polygons(left) + polygons(right)


def _area(loop: list[tuple[int, int]]) -> float:
    x, y = np.array(loop, np.float64).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed boundaries as corner points (x, y), the mask on the right hand (positive area: outline, negative: hole)."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    sides = ((padded[:-2, 1:-1], (0, 0), (1, 0)), (padded[1:-1, 2:], (1, 0), (1, 1)),
             (padded[2:, 1:-1], (1, 1), (0, 1)), (padded[1:-1, :-2], (0, 1), (0, 0)))
    for neighbour, (ax, ay), (bx, by) in sides:
        ys, xs = np.nonzero(inside & ~neighbour)
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            following.setdefault((x + ax, y + ay), []).append((x + bx, y + by))
    loops = []
    while following:
        start = min(following)
        loop, here, step = [], start, (0, 0)
        while True:
            choices = following[here]
            # where two corners touch, turn right: diagonal neighbours stay separate loops
            right = (here[0] - step[1], here[1] + step[0])
            ahead = choices.pop(choices.index(right) if len(choices) > 1 and right in choices else 0)
            if not choices:
                del following[here]
            taken = (ahead[0] - here[0], ahead[1] - here[1])
            if taken != step:
                loop.append(here)
            here, step = ahead, taken
            if here == start:
                break
        loops.append(loop)
    return loops
