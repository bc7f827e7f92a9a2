"""Views of an image. For methods that compare views: crop, colour jitter with hue, grey, blur, solarisation, flip (BYOL's set; recipes A13, A14).
For BEiT: one box at two sizes, from one decode (`same_box`; recipes A6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from harness.augment import BICUBIC, color_jitter, crop_resize, random_resized_crop_box, to_tensor
from harness.pictures import planar, resize, values_of
from harness.spec import LARGE, Augment

HUE, JITTERED, GREY = 0.1, 0.8, 0.2
CONTRAST, SATURATION = 1, 2
DOWN = -0.499  # added where OpenCV rounds to the nearest and PIL down
LUMA = (0.299, 0.587, 0.114)
BLUR = (0.1, 2.0)  # radius in pixels of a view of 224


@dataclass(frozen=True)
class View:
    """One kind of view: `size` (height, width), area of the crop, probabilities of blur and solarisation, `pixel`: side of the ViT's input / 224, for blur."""

    size: tuple[int, int]
    scale: tuple[float, float]
    blur: float
    solarize: float = 0.0
    pixel: float = 1.0


def make(image: Image.Image, rng: np.random.Generator, view: View, augment: Augment, resample: Image.Resampling = BICUBIC) -> Tensor:
    """A view of an RGB image, uint8 (3, h, w); ratio, flip and strength of the jitter are the recipe's."""
    box = random_resized_crop_box(rng, image.height, image.width, view.scale, augment.crop_ratio)
    image = crop_resize(image, box, view.size, resample)
    if augment.color_jitter is not None and rng.random() < JITTERED:
        image = jitter(image, rng, augment.color_jitter)
    if rng.random() < GREY:
        image = image.convert("L").convert("RGB")
    if rng.random() < view.blur:
        image = image.filter(ImageFilter.GaussianBlur(view.pixel * rng.uniform(*BLUR)))
    if rng.random() < view.solarize:
        image = ImageOps.solarize(image)
    return to_tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < augment.flip else image)


def jitter(image: Image.Image, rng: np.random.Generator, strength: tuple[float, float, float]) -> Image.Image:
    """Brightness, contrast, saturation and hue, in random order (torchvision's ColorJitter)."""
    b, c, s = strength
    for one in rng.permutation(4):
        image = shift_hue(image, rng.uniform(-HUE, HUE)) if one == 3 else color_jitter(image, rng, (b * (one == 0), c * (one == 1), s * (one == 2)))
    return image


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Colours turned by `turn` of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    step = int(turn * 255) % 256
    return Image.merge("HSV", (hue.point([(h + step) % 256 for h in range(256)]), saturation, value)).convert("RGB")


def same_box(
    image: Image.Image, rng: np.random.Generator, augment: Augment, wanted: Sequence[tuple[tuple[int, int], Image.Resampling]]
) -> list[Tensor]:
    """An image jittered, mirrored, cut to a random box and resized to each (size, filter): uint8 (3, h, w) each.

    Where all are large, they are cut first and jittered and mirrored then, at a tenth of the cost. Contrast still turns about the grey of the whole image
    (of every eighth row), and what is clipped is clipped after the resize.
    """
    large, steps = min(min(size) for size, _ in wanted) >= LARGE, []
    if augment.color_jitter is not None and not large:
        image = color_jitter(image, rng, augment.color_jitter)
    elif augment.color_jitter is not None:
        steps = draw_jitter(rng, augment.color_jitter)
    if (flip := rng.random() < augment.flip) and not large:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, h, w = box = random_resized_crop_box(rng, image.height, image.width, augment.crop_scale, augment.crop_ratio)
    if not large:
        return [to_tensor(crop_resize(image, box, size, resample)) for size, resample in wanted]
    values, left = values_of(image), image.width - left - w if flip else left
    made = [resize(values[:, top : top + h, left : left + w], size, resample) for size, resample in wanted]
    made = recoloured(values, made, steps) if steps else made
    made = [planar(view) for view in made]
    return [view.flip(2) for view in made] if flip else made


def draw_jitter(rng: np.random.Generator, strength: tuple[float, float, float]) -> list[tuple[int, float]]:
    """What `harness.augment.color_jitter` draws, as steps: brightness (0), contrast (1) and saturation (2) in random order, each with its factor."""
    return [(int(i), rng.uniform(max(0.0, 1 - strength[i]), 1 + strength[i])) for i in rng.permutation(3) if strength[i] > 0]


def recoloured(whole: Tensor, made: Sequence[Tensor], steps: Sequence[tuple[int, float]]) -> list[Tensor]:
    """Views uint8 (3, h, w) of an image after the steps of `draw_jitter`. Contrast turns about the mean grey of `whole`, as PIL's does.

    The views lie one behind the other in one array of pixels, so that a step is one pass over all; of `whole` every eighth row goes along up to contrast.
    """
    import cv2

    cv2.setNumThreads(0)  # a loader process has one core
    pixels = np.concatenate([view.permute(1, 2, 0).contiguous().view(1, -1, 3).numpy() for view in made], axis=1)
    rows = np.array(whole[:, ::8].permute(1, 2, 0).numpy(), order="C") if any(kind == CONTRAST for kind, _ in steps) else None
    for kind, factor in steps:
        if kind == CONTRAST and rows is not None:
            pivot = int(sum(weight * mean for weight, mean in zip(LUMA, cv2.mean(rows), strict=False)) + 0.5)
            cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * pivot + DOWN, dst=pixels)
            rows = None
            continue
        for values in (pixels,) if rows is None else (pixels, rows):
            if kind == SATURATION:
                grey = cv2.cvtColor(cv2.cvtColor(values, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
                cv2.addWeighted(values, factor, grey, 1 - factor, DOWN, dst=values)
            else:
                cv2.convertScaleAbs(values, values, factor, DOWN)
    ends = np.cumsum([view.shape[1] * view.shape[2] for view in made])
    return [torch.from_numpy(pixels[0, end - v[0].numel() : end].reshape(*v.shape[1:], 3)).permute(2, 0, 1) for v, end in zip(made, ends, strict=True)]
