"""The generated world: what a model learns from it is only worth something if pictures and labels say the same."""

from __future__ import annotations

import numpy as np
import pytest

from harness.randomness import generator
from protocols import scenes


def test_a_scene_is_a_function_of_its_seed() -> None:
    """The same seed draws the same picture; another one does not."""
    one, two, other = (scenes.scene(generator("test", s), 96, 112, 4) for s in (1, 1, 2))
    assert np.array_equal(one.image, two.image) and not np.array_equal(one.image, other.image)
    assert one.image.shape == (96, 112, 3) and one.image.dtype == np.uint8


def test_a_pixel_belongs_to_one_thing_at_most() -> None:
    """Occlusion: what lies behind gives its pixels up, or two classes would claim them."""
    hidden = 0
    for seed in range(30):
        scene = scenes.scene(generator("occlusion", seed), 96, 96, 5)
        assert np.sum(scene.visible, axis=0).max() <= 1
        whole = [scenes.draw_mask(t, 96, 96) > 0.5 for t in scene.things]
        assert np.array_equal(scene.visible[-1], whole[-1])  # the front one is complete
        hidden += sum(int(v.sum() < w.sum()) for v, w in zip(scene.visible, whole, strict=True))
    assert hidden > 15


def test_objects_cover_about_a_third() -> None:
    """Big enough to be learnt from, and the background is still most of a scene."""
    covers = [np.any(scenes.scene(generator("cover", s), 96, 112, 2 + s % 4).visible, axis=0).mean() for s in range(60)]
    assert 0.2 < np.mean(covers) < 0.45


def test_shapes_are_told_apart_by_their_outline() -> None:
    """Shape is the class: no two may look the same after any rotation (compared in steps of five degrees, and mirrored)."""
    def mask(shape: str, angle: float) -> np.ndarray:
        return scenes.draw_mask(scenes.Thing(shape, "flat", (32.0, 32.0), 24.0, angle, np.zeros((2, 3))), 64, 64) > 0.5

    turned = {shape: [mask(shape, a) for a in np.deg2rad(np.arange(0, 360, 5))] for shape in scenes.SHAPE_NAMES}
    for i, first in enumerate(scenes.SHAPE_NAMES):
        for second in scenes.SHAPE_NAMES[i + 1:]:
            still = mask(first, 0.0)
            overlap = max((m & still).sum() / (m | still).sum() for t in turned[second] for m in (t, t[:, ::-1]))
            assert overlap < 0.85, (first, second, overlap)


def test_backgrounds_are_told_apart_by_simple_statistics() -> None:
    """The stuff classes can be learnt: a nearest mean over colour and roughness finds nearly all kinds."""
    def features(kind: str, seed: int) -> np.ndarray:
        picture = scenes.background(generator("ground", kind, seed), kind, 64, 64)
        rough = [np.abs(np.diff(picture, axis=a)).mean() for a in (0, 1)]
        return np.concatenate([picture.mean((0, 1)) / 40, np.log(rough)])

    means = np.stack([np.mean([features(k, s) for s in range(20)], axis=0) for k in scenes.BACKGROUNDS])
    right = [np.argmin(((means - features(k, s)) ** 2).sum(1)) == i for i, k in enumerate(scenes.BACKGROUNDS) for s in range(100, 120)]
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("texture", scenes.TEXTURES)
def test_textures_show(texture: str) -> None:
    """iNaturalist's fine classes are shape x texture: each texture but the flat one has both its colours in the picture."""
    thing = scenes.Thing("disc", texture, (40.0, 40.0), 30.0, 0.4, np.array([[200.0, 20, 20], [20, 20, 200]]))
    inside = scenes.texture(generator("texture", texture), thing, 80, 80)[scenes.draw_mask(thing, 80, 80) > 0.99]
    near = [(np.abs(inside - c).max(1) < 60).mean() for c in thing.colours]
    assert near[0] > 0.15 and (near[1] > 0.15) == (texture != "flat")
