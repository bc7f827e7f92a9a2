"""Views: what is drawn is what the methods say, and hue turns as torchvision turns it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import adjust_hue

from harness.randomness import generator
from harness.spec import Augment
from methods.views import View, make, shift_hue

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
PLAIN = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.25, 1.25), flip=0.0)


def test_hue_turns_as_torchvisions() -> None:
    for turn in (-0.1, 0.0, 0.07):
        np.testing.assert_array_equal(np.asarray(shift_hue(IMAGE, turn)), np.asarray(adjust_hue(IMAGE, turn)))


def test_blur_and_solarisation_are_drawn_as_often_as_said() -> None:
    """A first view that is not always blurred, or a second that never is solarised, would be another method."""
    size = (40, 50)
    whole = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1)
    grey = torch.from_numpy(np.array(IMAGE.convert("L").convert("RGB"))).permute(2, 0, 1)
    found = {"blurred": 0, "solarised": 0, "grey": 0}
    for i in range(100):
        blurred, solarised, plain = (
            make(IMAGE, generator(i, name), View(size, (1.0, 1.0), *chances), PLAIN) for name, chances in (("a", (1.0,)), ("b", (0.0, 1.0)), ("c", (0.0,)))
        )
        found["grey"] += int(torch.equal(plain, grey))
        assert torch.equal(plain, whole) or torch.equal(plain, grey)
        found["blurred"] += int(not torch.equal(blurred, whole) and not torch.equal(blurred, grey))
        found["solarised"] += int(solarised.max() < 128)
    assert found["blurred"] == found["solarised"] == 100 and 8 <= found["grey"] <= 34
    jittered = make(IMAGE, generator(1, "d"), View(size, (1.0, 1.0), 0.0), Augment(crop_ratio=(1.25, 1.25), flip=0.0, color_jitter=(0.4, 0.4, 0.2)))
    assert not torch.equal(jittered, whole) and jittered.shape == whole.shape
