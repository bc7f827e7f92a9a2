"""Crops, resizes and normalisation equal torchvision's; every draw comes from the sample's own generator."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from harness.augment import (
    EvalTransform,
    Normalize,
    TrainTransform,
    color_jitter,
    crop_resize,
    erase,
    posterize,
    random_resized_crop_box,
    to_tensor,
)
from harness.randomness import generator, seed_all
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Augment, UserError

EVERYTHING = Augment(
    crop_scale=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4), rand_augment="rand-m9-mstd0.5-inc1", erasing=1.0,
)


def picture(height: int = 75, width: int = 100, seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("height,width", [(75, 100), (100, 75), (64, 64), (300, 41)])
@pytest.mark.parametrize("size,fraction", [(64, 0.875), (56, 1.0), (64, 0.9)])
def test_eval_transform_is_torchvisions(height: int, width: int, size: int, fraction: float) -> None:
    """A crop off by one pixel would make published accuracies unreachable."""
    image = picture(height, width)
    theirs = tv.Compose([tv.Resize(int(size / fraction), interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(size)])(image)
    ours = EvalTransform((size, size), fraction)(image)["image"]
    assert ours.dtype == torch.uint8 and torch.equal(ours, tvf.pil_to_tensor(theirs))


def test_eval_transform_covers_sizes_that_are_not_square() -> None:
    """A ViT for wide images would be given black borders, or fail."""
    assert EvalTransform((32, 64), 1.0)(picture(50, 50))["image"].shape == (3, 32, 64)
    assert EvalTransform((64, 32), 0.875)(picture(40, 200))["image"].shape == (3, 64, 32)


def test_crop_resize_is_torchvisions() -> None:
    """PIL's own resize(box=...) lets pixels outside of the box in."""
    theirs = tvf.resized_crop(picture(), 11, 23, 40, 51, [64, 48], tvf.InterpolationMode.BICUBIC)
    assert np.array_equal(np.array(crop_resize(picture(), (11, 23, 40, 51), (64, 48))), np.array(theirs))


def test_random_crops_follow_torchvisions_rule() -> None:
    """Another distribution of areas is another augmentation: compared with torchvision over 4,000 draws."""
    rng, shape, scale, ratio = generator(0, "crops"), (75, 100), (0.2, 1.0), (3 / 4, 4 / 3)
    ours = np.array([random_resized_crop_box(rng, *shape, scale, ratio) for _ in range(4000)])
    torch.manual_seed(0)
    image = torch.zeros(3, *shape)
    theirs = np.array([tv.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)])
    assert (ours[:, 0] + ours[:, 2] <= 75).all() and (ours[:, 1] + ours[:, 3] <= 100).all() and (ours[:, 2:] > 0).all()
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = quantity(ours), quantity(theirs)
        assert ks_2samp(a, b).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10)])
def test_extreme_shapes_get_the_central_box(shape: tuple[int, int]) -> None:
    """A panorama, for which no box fits in ten tries."""
    top, left, h, w = random_resized_crop_box(generator(1), *shape, (0.9, 1.0), (3 / 4, 4 / 3))
    assert (top, left) == ((shape[0] - h) // 2, (shape[1] - w) // 2) and 3 / 4 <= w / h <= 4 / 3 + 0.1


def test_probe_sampler_does_not_retry() -> None:
    """MAE's linear probe cuts a box that does not fit instead of drawing again."""
    for i in range(50):
        top, left, h, w = random_resized_crop_box(generator(i), 10, 1000, (0.5, 1.0), (3 / 4, 4 / 3), retry=False)
        assert h == 10 and 0 <= top <= 10 - h and 0 <= left <= 1000 - w
    assert random_resized_crop_box(generator(0), 1, 1, (0.01, 0.02), (1.0, 1.0), retry=False) == (0, 0, 1, 1)


def test_every_draw_comes_from_the_samples_generator() -> None:
    """A resumed job would see other crops or colours than an uninterrupted one."""
    transform = TrainTransform((48, 48), EVERYTHING)
    first = [transform(picture(), generator(3, "sample", i))["image"] for i in range(20)]
    random.seed(1)
    seed_all("another place")
    again = [transform(picture(), generator(3, "sample", i))["image"] for i in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert len({a.numpy().tobytes() for a in first}) == 20
    assert all(a.shape == (3, 48, 48) and a.dtype == torch.uint8 for a in first)


def test_rand_augment_survives_its_strongest_setting() -> None:
    """timm's posterize asks Pillow for 0 bits there, which new versions refuse: one image in some hundred would kill a job."""
    transform = TrainTransform((16, 16), Augment(rand_augment="rand-m10-n6-p1-inc1"))
    for i in range(150):
        transform(picture(), generator(i))
    assert np.array(posterize(picture(), 0)).max() == 0
    assert set(np.unique(np.array(posterize(picture(), 1)))) <= {0, 128}


def test_transforms_travel_to_loader_workers() -> None:
    """On a GPU the workers are spawned and get the transform as a pickle."""
    transform = pickle.loads(pickle.dumps(TrainTransform((32, 32), EVERYTHING)))
    assert torch.equal(transform(picture(), generator(1))["image"], TrainTransform((32, 32), EVERYTHING)(picture(), generator(1))["image"])


def test_unknown_rand_augment_is_refused_in_one_line() -> None:
    """A typing error would otherwise end in an AssertionError of timm without text."""
    with pytest.raises(UserError, match=r"rand_augment: 'rnd-m9'") as error:
        TrainTransform((32, 32), Augment(rand_augment="rnd-m9"))
    assert "\n" not in str(error.value)


def test_parts_can_be_switched_off() -> None:
    """With everything off, the sample is the image itself."""
    off = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    assert torch.equal(TrainTransform((60, 60), off)(picture(60, 60), generator(0))["image"], to_tensor(picture(60, 60)))
    assert color_jitter(picture(), generator(0), (0.0, 0.0, 0.0)).tobytes() == picture().tobytes()
    flipped = TrainTransform((60, 60), Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=1.0))(picture(60, 60), generator(0))["image"]
    assert torch.equal(flipped, to_tensor(picture(60, 60)).flip(2))


def test_erasing_changes_one_box_of_the_stated_area() -> None:
    """Areas outside 0.02..1/3 would be another augmentation."""
    areas = []
    for i in range(100):
        erased = erase(torch.zeros(3, 64, 64, dtype=torch.uint8), generator(i), 1.0).sum(0) > 0
        rows, cols = erased.any(1).nonzero()[:, 0], erased.any(0).nonzero()[:, 0]
        areas.append(float((rows[-1] - rows[0] + 1) * (cols[-1] - cols[0] + 1)) / 64**2)
    assert 0.015 < min(areas) < 0.08 and 0.25 < max(areas) < 0.345
    untouched = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert erase(untouched, generator(0), 0.0).sum() == 0


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_normalize_is_torchvisions(kind: torch.dtype) -> None:
    """A factor of 255 forgotten would go unseen: training still works, transfer does not."""
    images = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)(images.float() / 255)
    module = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    assert torch.allclose(module(images.to(kind)), theirs, atol=1e-5) and not module.state_dict()
