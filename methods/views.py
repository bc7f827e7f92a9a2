"""Views of an image for methods that compare views: crop, colour jitter with hue, grey, blur, solarisation, flip (BYOL's set; recipes A13, A14)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from harness.augment import BICUBIC, color_jitter, crop_resize, random_resized_crop_box, to_tensor
from harness.spec import Augment

HUE, JITTERED, GREY = 0.1, 0.8, 0.2
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
