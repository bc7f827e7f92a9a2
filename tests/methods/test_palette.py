"""The palette: k-means finds the colours that are there, the same ones for the same seed, and codes are of the nearest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from protocols_for_tests import family
from torch import Tensor

from harness.data import ImageList
from harness.plugins import Session, TrainContext
from harness.randomness import seed_all
from harness.spec import Interrupted, JobFailed, UserError, ViTConfig
from harness.train import fit
from methods.palette import Palette, PaletteObjective, closest, for_grid, load_colours, reduce

KNOWN = torch.tensor([[250.0, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 20], [20, 20, 20], [240, 240, 240]])
VIT = ViTConfig(size=(16, 16), patch=8, width=32, depth=1, heads=2)


@pytest.fixture
def images(tmp_path: Path) -> ImageList:
    """24 noisy images of two of the known colours each, in blocks of 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    for i in range(24):
        colours = KNOWN[rng.permutation(len(KNOWN))[:2]].numpy()
        blocks = colours[rng.integers(2, size=(8, 8))].repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(np.clip(blocks + rng.normal(0, 3, blocks.shape), 0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    return ImageList(tmp_path, tuple(f"{i}.png" for i in range(24)), None, ())


def make(maker: Palette, images: ImageList, folder: Path, seed: int = 7, stop_after: int | None = None) -> PaletteObjective:
    """A palette as the harness makes it, in a job's folder."""
    looks = iter(range(1000))
    session = Session(folder, seed, torch.device("cpu"), torch.float32, {}, should_stop=lambda: stop_after is not None and next(looks) >= stop_after)
    recipe = maker.recipe(family("smoke"), VIT)
    assert recipe is not None
    recipe = dataclasses.replace(recipe, batch=16, iterations=6)
    seed_all(seed, "init")
    objective = maker.objective(None, TrainContext(VIT, recipe, 6))
    folder.mkdir(exist_ok=True)
    fit(objective, images, maker.transform(VIT, recipe), recipe, session)
    return objective


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest distance of a wanted colour to the nearest found one."""
    return float((wanted - found[closest(wanted, found)]).norm(dim=1).max())


def test_known_colours_are_found_and_held_out_pixels_are_near_them(images: ImageList, tmp_path: Path) -> None:
    """24 colours for pixels of six, and of mixtures at their borders: each of the six has one, and what is left is noise."""
    maker = Palette(24, (64, 64), (32, 32))
    palette = make(maker, images, tmp_path / "job")
    assert distance(palette.colours.detach(), KNOWN) < 12
    recipe = maker.recipe(family("smoke"), VIT)
    assert recipe is not None
    sample = maker.transform(VIT, recipe)(Image.open(images.path(3)), np.random.default_rng(3))
    assert sample["pixels"].shape == (256, 3) and sample["pixels"].dtype == torch.float32
    scores = palette.check([{"pixels": sample["pixels"][None]}])
    assert scores["mse"] < 0.05 * scores["mean_colour_mse"] and 2 <= scores["colours_used"] <= 24 == scores["colours"]


def test_the_same_seed_gives_the_same_palette_to_the_bit_also_when_interrupted(images: ImageList, tmp_path: Path) -> None:
    maker = Palette(16, (64, 64), (32, 32), pixels=64)
    whole, again, other = (make(maker, images, tmp_path / name, seed).colours for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert torch.equal(whole, again) and not torch.equal(whole, other)
    with pytest.raises(Interrupted):
        make(maker, images, tmp_path / "d", stop_after=2)
    assert torch.equal(make(maker, images, tmp_path / "d").colours, whole)


def test_further_images_lower_the_error_on_them() -> None:
    """The loss is the error that k-means lowers, in whatever parts a batch comes: its gradient leads each colour to the mean of its pixels."""
    palette, many = PaletteObjective(Palette(8)), torch.cat([KNOWN.repeat(8, 1), KNOWN[:1].repeat(48, 1) + torch.arange(48)[:, None]])
    nearest = closest(many, palette.colours.detach())
    palette({"pixels": many[None]})["loss"].backward()
    for k in range(8):
        mine = many[nearest == k]
        wanted = 2 * (len(mine) * palette.colours[k] - mine.sum(dim=0)) / many.numel()
        assert torch.allclose(palette.colours.grad[k], wanted, atol=1e-3)
    optimizer, losses = torch.optim.AdamW(palette.parameters(), lr=5.0, weight_decay=0.0), []
    for _ in range(30):
        parts = [palette({"pixels": part[None]})["loss"] / 2 for part in many.chunk(2)]
        losses.append(sum(parts).item())
        optimizer.zero_grad()
        sum(parts).backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_no_more_distinct_colours_than_wanted_are_the_palette() -> None:
    palette = PaletteObjective(Palette(8))
    palette.prepare({"pixels": KNOWN.repeat(4, 1)[None]})
    assert distance(palette.colours.detach(), KNOWN) == 0
    with pytest.raises(JobFailed, match="one colour only"):
        palette.check([{"pixels": KNOWN[:1].repeat(1, 5, 1).reshape(1, 5, 3)}])
    with pytest.raises(JobFailed, match="no images were held out"):
        palette.check([])


def test_codes_are_of_the_nearest_colour_whatever_the_precision_around() -> None:
    seed_all(3)
    pixels, colours = 255 * torch.rand(2, 500, 3), 255 * torch.rand(64, 3)
    wanted = torch.cdist(pixels.double(), colours.double()).argmin(dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(closest(pixels, colours), wanted)


@pytest.mark.parametrize(("size", "patch", "side"), [(64, 8, 4), (224, 16, 4), (224, 14, 4)])
def test_a_code_sees_its_own_patch_alone(size: int, patch: int, side: int) -> None:
    """Also where the codes of a patch do not divide it (14 pixels by 4): a code of one patch that saw the next would give the answer away."""
    grid = size // patch
    ids = torch.arange(grid * grid, dtype=torch.float32).reshape(1, 1, grid, grid)
    whole = ids.repeat_interleave(patch, 2).repeat_interleave(patch, 3).expand(1, 3, size, size)
    assert torch.equal(reduce(whole, (side * grid, side * grid))[:, :1], ids.repeat_interleave(side, 2).repeat_interleave(side, 3))


def test_files(tmp_path: Path) -> None:
    palette = PaletteObjective(Palette(8))
    palette.save_asset(tmp_path / "asset.pt")
    assert torch.equal(load_colours(tmp_path / "asset.pt"), palette.colours)
    (tmp_path / "broken.pt").write_bytes((tmp_path / "asset.pt").read_bytes()[:100])
    with pytest.raises(JobFailed, match="no readable palette"):
        load_colours(tmp_path / "broken.pt")
    torch.save({"format": "palette 0", "colours": torch.zeros(8, 3)}, tmp_path / "old.pt")
    with pytest.raises(JobFailed, match="has format palette 0"):
        load_colours(tmp_path / "old.pt")


def test_sizes_follow_the_backbone() -> None:
    """512 colours (recipes A15), fewer in the demo; 32 x 32 codes there, 56 x 56 at 224 pixels: iGPT's range is 32 to 64."""
    demo, base = ViTConfig(size=(64, 64), patch=8, width=128, depth=6, heads=4), ViTConfig()
    assert for_grid(family("demo"), demo, 4) == Palette(128, (64, 64), (32, 32)) and for_grid(family("paper"), base, 4) == Palette(512, (224, 224), (56, 56))
    recipe = Palette().recipe(family("paper"), base)
    assert recipe is not None and recipe.augment.crop_scale == pytest.approx((0.3403, 0.7656), abs=1e-4) and recipe.augment.flip == 0
    with pytest.raises(UserError, match="palette's colours"):
        Palette(1)
