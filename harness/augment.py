"""Image augmentation: PIL RGB images and a generator in, uint8 tensors out; normalisation is a module on the device.

Views from 96 pixels on are cut and resized by torch (`harness.pictures`). Every draw comes from the sample's own generator. RandAugment is timm's, which
draws from Python's and numpy's: these are seeded from the sample's right before the call (so one process must not transform in several threads).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn

from harness.pictures import BICUBIC, Picture, planar, resize, values_of
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, LARGE, Augment, UserError

Box = tuple[int, int, int, int]


class Normalize(nn.Module):
    """(x / 255 - mean) / std of images (B, 3, H, W) with values 0..255, uint8 or float. Has no state."""

    shift: Tensor
    scale: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(std).view(3, 1, 1) * 255), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float images (B, 3, H, W)."""
        wide = torch.promote_types(torch.float32, self.shift.dtype)
        return images.to(wide, copy=True).sub_(self.shift).mul_(self.scale)  # one copy: on a CPU its memory is most of the cost


def random_resized_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], retry: bool = True
) -> Box:
    """A random box (top, left, height, width) of an image.

    torchvision's rule: ten tries with the area uniform in `scale` and the aspect ratio w/h log-uniform in `ratio`, then the largest
    central box within `ratio`. With `retry` False one try, cut to the image: the sampler of MAE's linear probe (recipes A3).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10 if retry else 1):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not retry:
            w, h = max(1, min(w, width)), max(1, min(h, height))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(image: Image.Image, box: Box, size: tuple[int, int], resample: Image.Resampling = BICUBIC) -> Image.Image:
    """The box (top, left, height, width) of an image at `size` (height, width).

    Cropped first and resized then, as torchvision does: PIL's resize(box=...) would let pixels outside the box into its border.
    """
    top, left, h, w = box
    if min(size) >= LARGE:
        return Picture(resize(values_of(image)[:, top : top + h, left : left + w], size, resample))
    if (top, left, h, w) != (0, 0, image.height, image.width):
        image = image.crop((left, top, left + w, top + h))
    return image if (h, w) == size else image.resize((size[1], size[0]), resample)


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return planar(values_of(image))


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: tuple[float, float, float]) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each by a factor uniform in [max(0, 1 - s), 1 + s] (torchvision's ColorJitter)."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(3):
        if strength[i] > 0:
            image = enhancers[i](image).enhance(rng.uniform(max(0.0, 1 - strength[i]), 1 + strength[i]))
    return image


def erase(image: Tensor, rng: np.random.Generator, probability: float) -> Tensor:
    """Random erasing as timm's `pixel` mode with one box (area 0.02..1/3, aspect 0.3..3.3): normal noise in normalised space.

    The image is uint8 here, so the noise is mapped by ImageNet's mean and std and cut to 0..255 (timm does not cut).
    """
    if rng.random() >= probability:
        return image
    _, height, width = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = rng.standard_normal((3, h, w)) * np.reshape(IMAGENET_STD, (3, 1, 1)) + np.reshape(IMAGENET_MEAN, (3, 1, 1))
            image[:, top : top + h, left : left + w] = torch.from_numpy(np.clip(noise * 255, 0, 255).round().astype(np.uint8))
            break
    return image


def rand_augment(config: str, size: tuple[int, int]) -> Callable[[Image.Image], Any]:
    """timm's RandAugment, set up as timm's create_transform does (bicubic, mean colour as fill, translation up to 0.45 of the side).

    Raises:
        UserError: the string is none that timm knows, e.g. "rand-m9-mstd0.5-inc1" is one.
    """
    from timm.data.auto_augment import rand_augment_transform

    settings = {"translate_const": int(min(size) * 0.45), "img_mean": tuple(min(255, round(255 * m)) for m in IMAGENET_MEAN), "interpolation": BICUBIC}
    try:
        transform = rand_augment_transform(config, settings)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"augment.rand_augment: {config!r} is no RandAugment of timm: write it as in rand-m9-mstd0.5-inc1") from error
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = posterize
    return transform  # type: ignore[no-any-return]  # timm has no types


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper `bits` of each value, in place of timm's: timm asks for 0 bits at full strength, which Pillow 13 refuses (it gave black)."""
    mask = 0xFF & ~(2 ** (8 - bits) - 1)
    return image if bits >= 8 else image.point([value & mask for value in range(256)] * 3)


class TrainTransform:
    """Random resized crop to `size` (height, width), flip, colour jitter, RandAugment, erasing: what of it `augment` switches on.

    Mixup and cutmix need a batch and are the classifier's. `retry`: see `random_resized_crop_box`.
    """

    def __init__(self, size: tuple[int, int], augment: Augment, retry: bool = True) -> None:
        self.size, self.augment, self.retry = size, augment, retry
        self._rand_augment = rand_augment(augment.rand_augment, size) if augment.rand_augment else None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """{"image": uint8 (3, H, W)} of an RGB image; all randomness from `rng`."""
        a = self.augment
        box = random_resized_crop_box(rng, image.height, image.width, a.crop_scale, a.crop_ratio, self.retry)
        image = crop_resize(image, box, self.size)
        if rng.random() < a.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if a.color_jitter is not None:
            image = color_jitter(image, rng, a.color_jitter)
        if self._rand_augment is not None:
            random.seed(int(rng.integers(2**63)))
            np.random.seed(int(rng.integers(2**32)))  # timm draws from the global generator
            image = self._rand_augment(image)
        tensor = to_tensor(image)
        return {"image": erase(tensor, rng, a.erasing) if a.erasing > 0 else tensor}


class EvalTransform:
    """Short side to size / crop_fraction, central crop of `size` (height, width): torchvision's Resize and CenterCrop, bicubic.

    The papers use 0.875 (256 -> 224) up to 224 pixels and 1.0 above (recipes A2). A size that is not square is covered by its tighter side.
    """

    def __init__(self, size: tuple[int, int], crop_fraction: float = 0.875) -> None:
        self.size, self.crop_fraction = size, crop_fraction

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """{"image": uint8 (3, H, W)} of an RGB image; nothing is random."""
        (h, w), (cover_h, cover_w) = image.size[::-1], (int(s / self.crop_fraction) for s in self.size)
        if h * cover_w <= w * cover_h:
            new_h, new_w = cover_h, max(cover_w, int(cover_h * w / h))
        else:
            new_h, new_w = max(cover_h, int(cover_w * h / w)), cover_w
        image = crop_resize(image, (0, 0, h, w), (new_h, new_w))
        top, left = round((new_h - self.size[0]) / 2), round((new_w - self.size[1]) / 2)
        return {"image": to_tensor(crop_resize(image, (top, left, *self.size), self.size))}
