"""Pictures of masks: what the method's own transform hides is grey, and as much of it as the method says."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import written
from PIL import Image

from harness import plugins
from harness.canonical import canonical
from harness.jobs import Node
from harness.spec import Augment, Recipe, ViTConfig
from harness.store import Store
from results.attention import SIDE
from results.masks import picture

VIT = ViTConfig(size=(56, 56), patch=8, width=24, depth=2, heads=3)


def folder_of(root: Path, name: str, vit: ViTConfig = VIT, jitter: tuple[float, float, float] | None = None) -> Path:
    images = root / "images"
    images.mkdir(exist_ok=True)
    for i in range(3):
        Image.fromarray(np.full((60, 60, 3), (255, 0, 0), dtype=np.uint8)).save(images / f"{i}.png")
    recipe = Recipe(batch=4, lr=1e-3, iterations=4, augment=Augment(color_jitter=jitter))
    identity = {"plugin": canonical(plugins.build("methods", name)), "recipe": canonical(recipe), "vit": canonical(vit)}
    Store(root / "runs").prepare()
    return written(root / "runs", Node("pretrain", name, identity, where={"folders": {"folder": str(images)}}))


@pytest.mark.parametrize(("name", "least", "most"), [
    ("mae", 0.74, 0.78), ("mae@mask-block-50", 0.48, 0.55), ("mae@mask-grid-75", 0.72, 0.79), ("beit", 0.2, 0.45),
])
def test_as_much_is_grey_as_the_method_hides(name: str, least: float, most: float, tmp_path: Path) -> None:
    made = picture(folder_of(tmp_path, name))
    assert made is not None
    with Image.open(io.BytesIO(made)) as sheet:
        assert sheet.size == (3 * SIDE + 8, 2 * SIDE + 4)
        patches = np.asarray(sheet)[8:SIDE:16, 8:SIDE:16].astype(int)  # the middle of each of 7 x 7
    grey = (abs(patches - 128).max(axis=-1) < 8).mean()
    assert least <= grey <= most


@pytest.mark.parametrize("name", ["beit", "beit-pixel", "mae@aug-crop-jitter"])
def test_views_that_the_device_has_yet_to_jitter_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    made = picture(folder_of(tmp_path, name, replace(VIT, size=(112, 128)), (0.4, 0.4, 0.4)))
    assert made is not None
    with Image.open(io.BytesIO(made)) as sheet:
        shown = {tuple(pixel) for pixel in np.asarray(sheet)[8:SIDE:16, 8:SIDE:16].reshape(-1, 3)}
    assert (255, 0, 0) in shown and (128, 128, 128) in shown


def test_a_method_that_hides_nothing_has_no_picture(tmp_path: Path) -> None:
    assert picture(folder_of(tmp_path, "supervised")) is None
