"""Which patches are hidden: BEiT's block-wise masks, random and grid masks, and the pixels of patches as regression targets."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """BEiT's block-wise mask generator (recipes A6; BEiT-repo masking_generator.py, not the paper's Algorithm 1).

    Rectangles are added until `target` patches are hidden or ten attempts in a row fail, so that the count is at most `target` and
    varies from image to image. An attempt fails when its rectangle is as large as the grid on a side, adds no patch, or adds more
    than are still missing.

    Attributes:
        height, width: grid in patches.
        target: most patches hidden.
        minimum, maximum: area of one rectangle in patches before rounding; no maximum means `target`.
        aspect: the log of height/width is uniform in [log aspect, -log aspect].
    """

    height: int
    width: int
    target: int
    minimum: int = 4
    maximum: int | None = None
    aspect: float = 0.3

    def __call__(self, rng: random.Random) -> np.ndarray:
        """Draw a mask (height, width), True where hidden. Consumes exactly the numbers that BEiT's code does."""
        hidden, patches, largest = 0, self.height * self.width, self.target if self.maximum is None else self.maximum
        while (missing := self.target - hidden.bit_count()) > 0:
            block = self._block(hidden, min(missing, largest), rng)
            if not block:
                break
            hidden |= block
        bits = np.frombuffer(int(hidden).to_bytes(-(-patches // 8), "little"), dtype=np.uint8)
        return np.unpackbits(bits, count=patches, bitorder="little").view(bool).reshape(self.height, self.width)

    def _block(self, hidden: int, limit: int, rng: random.Random) -> int:
        """A rectangle that hides 1..`limit` more patches than `hidden`, 0 when ten attempts failed. Patches are bits, row by row: a few
        operations on integers, where arrays of so few values would cost three times as much."""
        edge = math.log(self.aspect)
        for _ in range(10):
            area, ratio = rng.uniform(self.minimum, limit), math.exp(rng.uniform(edge, -edge))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h >= self.height or w >= self.width:
                continue
            top, left = rng.randrange(self.height - h + 1), rng.randrange(self.width - w + 1)
            rows = ((1 << h * self.width) - 1) // ((1 << self.width) - 1)  # the first bit of each of h rows
            block = rows * ((1 << w) - 1) << top * self.width + left
            if 0 < (block & ~hidden).bit_count() <= limit:
                return block
        return 0


@dataclass(frozen=True)
class Algorithm1:
    """Block-wise masks as BEiT's paper describes them, where its code does otherwise (BEiT-paper Algorithm 1; recipes A6).

    Rectangles are added until more than `ratio` of the grid is hidden: area uniform between `minimum` and what is still missing, height/width uniform between
    `aspect` and its inverse, no attempt fails, and the last one may hide more than is missing. Ours, for the paper does not say: sides are rounded and cut
    at the grid's, and where less than `minimum` is missing the area is `minimum`.

    Attributes:
        height, width: grid in patches.
        minimum: smallest area of a rectangle in patches.
        ratio: part of the grid that at least is hidden.
        aspect: smallest height/width.
    """

    height: int
    width: int
    minimum: int = 16
    ratio: float = 0.4
    aspect: float = 0.3

    def __call__(self, rng: random.Random) -> np.ndarray:
        """Draw a mask (height, width), True where hidden."""
        mask = np.zeros((self.height, self.width), dtype=bool)
        while (missing := self.ratio * mask.size - int(mask.sum())) >= 0:
            area, ratio = rng.uniform(self.minimum, max(self.minimum, missing)), rng.uniform(self.aspect, 1 / self.aspect)
            h, w = min(self.height, round(math.sqrt(area * ratio))), min(self.width, round(math.sqrt(area / ratio)))
            top, left = rng.randint(0, self.height - h), rng.randint(0, self.width - w)
            mask[top : top + h, left : left + w] = True
        return mask


def scaled(count: float, patches: int) -> int:
    """A number of patches given for the 14 x 14 grid of the papers, for a grid of `patches`; at least 1."""
    return max(1, round(count * patches / 196))


def random_mask(rng: np.random.Generator, patches: int, hidden: int) -> np.ndarray:
    """Flat mask (N,) with exactly `hidden` patches hidden, each set of patches equally likely."""
    mask = np.zeros(patches, dtype=bool)
    mask[rng.permutation(patches)[:hidden]] = True
    return mask


def grid_mask(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Flat mask (N,) that leaves one patch of each 2 x 2 visible, the same of the four all over the grid, drawn at random."""
    mask = np.ones((rows, columns), dtype=bool)
    mask[rng.integers(2) :: 2, rng.integers(2) :: 2] = False
    return mask.reshape(-1)


def noise_for(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise (N,) float32 whose ascending order (see `shuffle_by`) has the patches that a mask (N,) hides last, each part in random order."""
    return rng.random(mask.size, dtype="float32") + mask.astype(np.float32)


def fixed_size_box(height: int, width: int, size: tuple[int, int], fraction: float, rng: np.random.Generator | None) -> tuple[int, int, int, int]:
    """Box (top, left, height, width) of the shape of `size` that covers `fraction` of the tighter side: central, or anywhere when given a generator."""
    scale = fraction * min(height / size[0], width / size[1])
    h, w = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    if rng is None:
        return (height - h) // 2, (width - w) // 2, h, w
    return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w


def block_mask(rng: np.random.Generator, generator: BlockMask | Algorithm1) -> np.ndarray:
    """Flat block-wise mask (N,), row by row, drawn from a numpy generator."""
    return generator(random.Random(int(rng.integers(2**63)))).reshape(-1)


def shuffle_by(noise: Tensor) -> Tensor:
    """Patch order (B, N) by ascending noise (B, N), as MAE's random masking has it: the first ones are kept. Ties keep their order."""
    return torch.argsort(noise, dim=1, stable=True)


def masked_indices(mask: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Positions of the hidden patches with a static shape (no host sync): (B, N) bool -> indices (B, limit) in ascending order, and which are valid.

    No mask may hide more than `limit` patches; invalid places point at patches that are not hidden.
    """
    index = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)[:, :limit]
    return index, mask.gather(1, index)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows of tokens: (B, N, D), (B, K) -> (B, K, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, (B, C, H, W) -> (B, N, P*P*C); order within a patch: row, column, channel (recipes A1, "patchify layout")."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def images_of(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patch_pixels`: (B, N, P*P*3) of a grid of N patches -> (B, 3, H, W)."""
    b, (h, w), patch = pixels.shape[0], grid, round((pixels.shape[2] / 3) ** 0.5)
    return pixels.reshape(b, h, w, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(b, 3, h * patch, w * patch)


def normalise_patches(pixels: Tensor) -> Tensor:
    """Each patch minus its mean, over its deviation, jointly over channels: unbiased variance, 1e-6 inside the root (recipes A1, norm_pix)."""
    mean, var = pixels.mean(dim=-1, keepdim=True), pixels.var(dim=-1, keepdim=True)
    return (pixels - mean) / (var + 1e-6).sqrt()
