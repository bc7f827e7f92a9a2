"""Views of an image. For methods that compare views: crop, colour jitter with hue, grey, blur, solarisation, flip (BYOL's set; recipes A13, A14).
For BEiT: one box at two sizes, from one decode (`same_box`; recipes A6),
jittered in the batch on the device (`jittered`, `recoloured`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from harness.augment import BICUBIC, color_jitter, crop_resize, random_resized_crop_box, to_tensor
from harness.pictures import planar, resize, values_of
from harness.spec import LARGE, Augment

HUE, JITTERED, GREY = 0.1, 0.8, 0.2
CONTRAST, SATURATION = 1, 2
SIDE = 100  # of the square of pixels whose mean grey stands for an image's: 0.2 grey levels from it in photographs of 500 x 375
DOWN = -0.499  # added where OpenCV rounds to the nearest and PIL down
LUMA = (0.299, 0.587, 0.114)
LUMA_15 = (9798.0, 19235.0, 3735.0)  # of 2^15, as OpenCV has them
VIEWS = ("image", "tokenizer_image")
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


def drawn(views: Iterable[tuple[int, int]], augment: Augment) -> str:
    """What a key says of how views of these sizes are drawn, where the recipe does not: "" as ever. All of them large: jittered on the device."""
    late = augment.color_jitter is not None and min(map(min, views)) >= LARGE
    return "jitter by PIL's steps, on the views, about the grey of 10,000 pixels" if late else ""


def same_box(
    image: Image.Image, rng: np.random.Generator, augment: Augment, wanted: Mapping[str, tuple[tuple[int, int], Image.Resampling]]
) -> dict[str, Tensor]:
    """An image jittered, mirrored, cut to a random box and resized to each (size, filter): uint8 (3, h, w) each; see `jittered` where all are large."""
    large = min(min(size) for size, _ in wanted.values()) >= LARGE
    image, left_over = jittered(image, rng, augment.color_jitter, later=large)
    if (flip := rng.random() < augment.flip) and not large:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, h, w = box = random_resized_crop_box(rng, image.height, image.width, augment.crop_scale, augment.crop_ratio)
    if not large:
        return {name: to_tensor(crop_resize(image, box, *how)) for name, how in wanted.items()}
    left = image.width - left - w if flip else left
    crop = values_of(image)[:, top : top + h, left : left + w]
    return sample_of({name: resize(crop, *how) for name, how in wanted.items()}, flip, left_over)


def sample_of(views: Mapping[str, Tensor], flip: bool, left_over: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views uint8 (3, h, w), mirrored where `flip` says so. Where the device has to jitter them it mirrors them, too, and gets them as (h, w, 3), as they are
    in memory: to take them apart there costs nothing on a GPU, and less on a CPU where it is the only work at hand."""
    if left_over:
        return {name: view.permute(1, 2, 0).contiguous() for name, view in views.items()} | {**left_over, "mirrored": torch.tensor(flip)}
    return {name: planar(view).flip(2) if flip else planar(view) for name, view in views.items()}


def jittered(
    image: Image.Image, rng: np.random.Generator, strength: tuple[float, float, float] | None, later: bool
) -> tuple[Image.Image, dict[str, Tensor]]:
    """An image after `harness.augment.color_jitter`; or, `later`, as it is, and what `recoloured` needs to do the same to views of it (`sample_of`).

    That is {"jitter": float32 (steps, 2), which step and its factor, "whole": uint8 (SIDE, SIDE, 3), pixels from all over the image, about whose mean grey
    contrast turns}. Views are fewer pixels, so that later is a tenth of the work; what is clipped is clipped after the resize then.
    """
    if strength is None:
        return image, {}
    if not later:
        return color_jitter(image, rng, strength), {}
    whole = values_of(image).permute(1, 2, 0).contiguous().numpy().reshape(-1, 3).take(places(image.height, image.width), axis=0)
    steps = np.array(draw_jitter(rng, strength), dtype=np.float32).reshape(-1, 2)
    return image, {"jitter": torch.from_numpy(steps), "whole": torch.from_numpy(whole)}


@lru_cache(64)
def places(height: int, width: int) -> np.ndarray:
    """Pixels (SIDE, SIDE) of an image, row by row: one in each cell of a grid, at places that no stripes or checks keep step with: the golden ratio's multiples
    and those of the plastic number."""
    cell, five = np.arange(SIDE), np.arange(SIDE) // 5  # five neighbours share a row: a line of the cache holds as many where images are as large as ImageNet's
    rows = cell[:, None] + (cell[:, None] * 0.6180339887 + five * 0.5698402910) % 1
    columns = cell + (cell * 0.6180339887 + cell[:, None] * 0.7548776662) % 1
    made: np.ndarray = (rows * height / SIDE).astype(np.int64) * width + (columns * width / SIDE).astype(np.int64)
    return made


def draw_jitter(rng: np.random.Generator, strength: tuple[float, float, float]) -> list[tuple[int, float]]:
    """What `harness.augment.color_jitter` draws, as steps: brightness (0), contrast (1) and saturation (2) in random order, each with its factor."""
    lowest = [max(0.0, 1 - s) for s in strength]
    return [(i, lowest[i] + (1 + strength[i] - lowest[i]) * rng.random()) for i in rng.permutation(3).tolist() if strength[i] > 0]


def recoloured(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A batch of `sample_of` as the network takes it: views uint8 (B, 3, h, w), jittered and mirrored, if the loader has not done it.

    It runs on the batch's device without waiting for it: on a CPU by OpenCV, where torch takes ten times as long; elsewhere by torch, to the same values
    but for one in 50,000, which differ in rounding.
    """
    if "jitter" not in batch:
        return batch
    views = {name: batch[name] for name in VIEWS if name in batch}
    work = by_opencv if batch["jitter"].device.type == "cpu" else by_torch
    made = work([batch["whole"], *views.values()], batch["jitter"], batch["mirrored"])
    return {name: value for name, value in batch.items() if name not in ("jitter", "whole", "mirrored")} | dict(zip(views, made, strict=True))


def by_opencv(views: Sequence[Tensor], jitter: Tensor, mirrored: Tensor) -> list[Tensor]:
    """The whole's pixels and views, uint8 (B, h, w, 3), and steps (B, steps, 2) -> the views uint8 (B, 3, h, w) after them, as many images at a time as torch
    has threads."""
    import cv2

    cv2.setNumThreads(0)
    made = [torch.empty(len(v), 3, *v.shape[1:3], dtype=torch.uint8) for v in views[1:]]

    def work(i: int) -> None:
        images, first, pivot = [view[i].numpy() for view in views], 0, 0
        for kind, factor in jitter[i].tolist():
            if kind == CONTRAST:  # from here on nobody asks for the whole's grey
                first, pivot = 1, int(sum(weight * mean for weight, mean in zip(LUMA, cv2.mean(images[0]), strict=False)) + 0.5)
            for n, image in enumerate(images[first:], start=first):
                if kind == SATURATION:
                    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
                    images[n] = cv2.addWeighted(image, factor, grey, 1 - factor, DOWN)
                elif kind == CONTRAST:
                    images[n] = cv2.addWeighted(image, factor, image, 0, (1 - factor) * pivot + DOWN)
                else:
                    images[n] = cv2.convertScaleAbs(image, None, factor, DOWN)
        for view, image in zip(made, images[1:], strict=True):
            cv2.split(cv2.flip(image, 1) if mirrored[i] else image, list(view[i].numpy()))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(len(jitter))) if torch.get_num_threads() > 1 else map(work, range(len(jitter))))
    return made


def by_torch(views: Sequence[Tensor], jitter: Tensor, mirrored: Tensor) -> list[Tensor]:
    """The same in single precision. Sums of whole values below 2^24 are exact in it: the whole's mean, and OpenCV's grey, whose weights have 15 bits."""
    made = [view.permute(0, 3, 1, 2).float() for view in views]
    for step in jitter[..., None, None, None].unbind(1):
        kind, factor = step.unbind(1)
        pivot = (weighed(made[0].sum((2, 3), keepdim=True) / SIDE**2, LUMA) + 0.5).floor_()
        offset = torch.where(kind == CONTRAST, (1 - factor) * pivot, 0) + DOWN
        for i, x in enumerate(made):
            grey = ((weighed(x, LUMA_15) + 2**14) / 2**15).floor_()
            made[i] = (x * factor + (torch.where(kind == SATURATION, (1 - factor) * grey, 0) + offset)).round_().clamp_(0, 255)
    return [torch.where(mirrored[:, None, None, None], x.flip(3), x).to(torch.uint8).contiguous() for x in made[1:]]


def weighed(x: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted sum over channels (B, 3, h, w) -> (B, 1, h, w), by plain numbers: weights in a tensor would have to be copied to the device, and waited for."""
    return x[:, :1] * weights[0] + x[:, 1:2] * weights[1] + x[:, 2:] * weights[2]
