"""The short way from a JPEG file to a crop gives PIL's pixels, and torchvision's crops."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

import harness.pictures
from harness.augment import EvalTransform, crop_resize, random_resized_crop_box, to_tensor
from harness.data import BadImage, load_rgb
from harness.pictures import Picture, decode_jpeg, headers, planar, resize, values_of
from harness.plugins import build
from harness.randomness import generator
from harness.spec import Augment, Recipe, ViTConfig, pixels
from harness.vit import ViT
from methods.mae import MAE
from methods.views import by_opencv, by_torch, draw_jitter, jittered, places, recoloured, same_box, sample_of

BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


def scene(height: int = 301, width: int = 403, mode: str = "RGB") -> Image.Image:
    """A picture with fine and coarse detail."""
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((width, height), BICUBIC)
    return Image.fromarray((np.asarray(coarse) * 0.8 + rng.integers(0, 50, (height, width, 3))).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **how)
    return stream.getvalue()


KINDS = [*({"subsampling": s} for s in (0, 1, 2)), {"keep_rgb": True}, {"quality": 40}, {"progressive": True}, {"restart_marker_rows": 2}]


@pytest.mark.parametrize("how", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_decoder_is_pils_to_the_bit(mode: str, how: dict[str, Any]) -> None:
    """simplejpeg installed or not must not change a number: it is in no key."""
    data = jpeg(scene(mode=mode), **how)
    ours = decode_jpeg(data)
    assert isinstance(ours, Picture) and np.array_equal(np.asarray(ours), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_what_simplejpeg_cannot_do_is_pils(tmp_path: Path) -> None:
    """CMYK, images that EXIF turns, and damaged files: converted, upright, and refused as before."""
    exif = Image.Exif()
    exif[harness.pictures.ORIENTATION] = 6
    late = jpeg(scene(), exif=exif, icc_profile=bytes(200_000))  # profiles come before it in some files
    xmp = jpeg(scene(), xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>')
    filled = b"\xff\xd8\xff" + jpeg(scene(), exif=exif)[2:]  # a byte that may stand before any marker
    cases = {"cmyk": jpeg(scene(mode="CMYK")), "turned": jpeg(scene(), exif=exif), "late": late, "xmp": xmp, "png": b"\x89PNG", "cut": jpeg(scene())[:-900],
             "filled": filled}
    assert all(len(headers(data)) < 1000 for data in (cases["turned"], xmp)) and headers(filled) == filled and len(late) > len(headers(late)) > 200_000
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        assert decode_jpeg(data) is None
    assert load_rgb(tmp_path / "cmyk").size == (403, 301) and {load_rgb(tmp_path / n).size for n in ("turned", "late", "xmp", "filled")} == {(301, 403)}
    for name in ("png", "cut"):
        with pytest.raises(BadImage, match=rf"{name}: cannot be read as an image \((?!.*object at)"):
            load_rgb(tmp_path / name)


def test_without_simplejpeg_the_pixels_are_the_same_and_a_notice_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(scene()))
    view = to_tensor(crop_resize(load_rgb(tmp_path / "a.jpg"), (5, 9, 200, 250), (224, 224)))
    monkeypatch.setattr(harness.pictures, "simplejpeg", None)
    with pytest.warns(UserWarning, match="pip install simplejpeg"):
        plain = load_rgb(tmp_path / "a.jpg")
    assert not isinstance(plain, Picture) and torch.equal(view, to_tensor(crop_resize(plain, (5, 9, 200, 250), (224, 224))))


def test_a_picture_is_an_image_of_pils() -> None:
    """Plugins get one where they had PIL's: what they call works, and what they draw is not lost."""
    plain, picture = scene(), Picture(to_tensor(scene()))
    assert picture.size == plain.size and picture.mode == "RGB" and np.array_equal(np.asarray(picture.convert("L")), np.asarray(plain.convert("L")))
    assert np.array_equal(np.asarray(picture.rotate(90)), np.asarray(plain.rotate(90))) and picture.copy().tobytes() == plain.tobytes()
    for image in (plain, picture):
        ImageDraw.Draw(image).rectangle((0, 0, 300, 200), fill=(1, 2, 3))
    assert torch.equal(to_tensor(picture), to_tensor(plain)) and to_tensor(picture)[:, 5, 5].tolist() == [1, 2, 3]


class TorchDraws:
    """A generator that draws as torchvision's transforms do, from torch's global generator in single precision."""

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, end: int) -> int:
        return int(torch.randint(0, end, size=(1,)).item())


@pytest.mark.parametrize("height,width", [(375, 500), (500, 333), (40, 900)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
def test_boxes_are_torchvisions_for_the_same_seed(height: int, width: int, scale: tuple[float, float]) -> None:
    """The rule to the pixel, not only in distribution: the same draws give the same box, the central one of a panorama included."""
    image, ratio = torch.zeros(3, height, width), (3 / 4, 4 / 3)
    for seed in range(300):
        torch.manual_seed(seed)
        ours = random_resized_crop_box(TorchDraws(), height, width, scale, ratio)  # type: ignore[arg-type]
        torch.manual_seed(seed)
        assert ours == tuple(tv.RandomResizedCrop.get_params(image, scale, ratio))


@pytest.mark.parametrize("size,resample", [(224, BICUBIC), (112, LANCZOS), (384, BICUBIC)])
def test_views_are_within_a_twentieth_of_a_grey_level_of_pils(size: int, resample: Image.Resampling) -> None:
    """Every crop of a training, enlarged or shrunk: what differs is rounding. (With the two passes in another order than PIL's it would be 0.27.)"""
    apart = []
    for seed in range(40):
        box = random_resized_crop_box(generator(seed), 301, 403, (0.2, 1.0), (3 / 4, 4 / 3))
        theirs = tvf.pil_to_tensor(tvf.resized_crop(scene(), *box, [size, size], tvf.InterpolationMode(resample.name.lower())))
        apart.append((to_tensor(crop_resize(scene(), box, (size, size), resample)).int() - theirs.int()).abs())
    away = torch.stack(apart).float()
    assert 0 < away.mean((1, 2, 3)).max() < 0.05 and away.max() <= 2


@pytest.mark.parametrize("height,width", [(301, 403), (150, 900), (224, 224)])
def test_large_eval_views_are_torchvisions_crops(height: int, width: int) -> None:
    """A crop off by one pixel is far more than 0.05 grey levels."""
    theirs = tvf.pil_to_tensor(tv.Compose([tv.Resize(256, interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(224)])(scene(height, width)))
    ours = EvalTransform((224, 224))(scene(height, width))["image"]
    assert ours.shape == theirs.shape and (ours.float() - theirs.float()).abs().mean() < 0.05


@pytest.mark.parametrize("strength,apart", [(None, 0.05), ((0.4, 0.4, 0.4), 0.8)])
def test_large_views_of_one_box_are_those_of_the_long_way(strength: tuple[float, float, float] | None, apart: float) -> None:
    """BEiT's order is jitter, flip, crop; cut first and jittered in the batch, the same draws give the same picture: the grey of contrast is the whole's."""
    augment, away = Augment(crop_scale=(0.08, 1.0), color_jitter=strength), []
    wanted = {"image": ((224, 224), BICUBIC), "tokenizer_image": ((112, 112), LANCZOS)}
    short = recoloured(default_collate([same_box(scene(), generator(seed), augment, wanted) for seed in range(12)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.augment.LARGE", math.inf)
        patch.setattr("methods.views.LARGE", math.inf)
        long = default_collate([same_box(scene(), generator(seed), augment, wanted) for seed in range(12)])
    assert set(short) == set(long) == set(wanted)
    for name, views in long.items():
        assert short[name].shape == views.shape and short[name].is_contiguous()
        away.append(float((short[name].float() - views.float()).abs().mean()))
    assert np.mean(away) < apart


def left_over(seeds: range, view: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The grid of the whole and a view twice for each seed, the steps of its jitter, and every second one to be mirrored."""
    drawn = [jittered(Picture(view), generator(seed), (0.4, 0.4, 0.4), later=True)[1] for seed in seeds]
    batch = default_collate([sample_of({"image": view}, seed % 2 == 1, one) for seed, one in zip(seeds, drawn, strict=True)])
    return [batch["whole"], batch["image"], batch["image"]], batch["jitter"], batch["mirrored"]


def test_the_jitter_of_views_is_pils() -> None:
    """Step by step on the same pixels, each clipped and cut to whole values as PIL does, contrast about the grey of the whole."""
    enhancers, away = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), []
    given = left_over(range(40), values_of(scene(100, 100)))
    made = by_opencv(*given)
    for seed in range(40):
        expected = scene(100, 100)
        for kind, factor in draw_jitter(generator(seed), (0.4, 0.4, 0.4)):
            expected = enhancers[kind](expected).enhance(factor)
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if seed % 2 else expected
        away += [(view[seed].int() - values_of(expected).int()).abs().float() for view in made]
    apart = torch.stack(away)
    assert apart.max() <= 3 and apart.mean() < 0.01
    assert torch.equal(given[0][1][0].permute(2, 0, 1), values_of(scene(100, 100))), "what was given was written to"


def test_a_gpu_would_jitter_to_the_same_values() -> None:
    """torch's formulas, here on the processor: OpenCV multiplies and adds at once, so that one value in some ten thousand is rounded otherwise."""
    given = left_over(range(24), values_of(scene(224, 200)))
    apart = torch.stack([(a.int() - b.int()).abs() for a, b in zip(by_opencv(*given), by_torch(*given), strict=True)])
    assert apart.max() <= 3 and (apart > 0).float().mean() < 2e-4


def test_jitter_of_some_kinds_only_and_of_none_has_as_many_steps() -> None:
    for strength, count in (((0.4, 0.0, 0.4), 2), ((0.0, 0.0, 0.0), 0)):
        image, left = jittered(scene(), generator(1), strength, later=True)
        sample = sample_of({"image": values_of(image)}, False, left)
        made = recoloured({name: value[None] for name, value in sample.items()})
        assert left["jitter"].shape == (count, 2) and set(made) == {"image"} and torch.equal(made["image"][0], to_tensor(image)) == (count == 0)
    assert jittered(scene(), generator(1), None, later=True)[1] == {}


def test_no_pattern_keeps_step_with_the_pixels_that_stand_for_the_whole() -> None:
    """On an even grid stripes of 8 in an image 800 wide have a mean of 0 or 255."""
    for period in (2, 4, 5, 8, 16):
        stripes = np.arange(800) % period >= period // 2
        for picture in (np.tile(stripes, (600, 1)), np.tile(stripes[:600, None], (1, 800)), stripes[:600, None] ^ stripes):
            assert abs(picture.reshape(-1)[places(600, 800)].mean() - picture.mean()) < 0.03
    assert places(1, 3).max() == 2 and np.array_equal(np.sort(places(100, 100).reshape(-1)), np.arange(10_000))


def test_maes_jitter_of_large_views_is_left_to_the_device() -> None:
    """Table 1e's crop and jitter: the same crop and draws as where PIL jitters the whole image first."""
    method = MAE(augmentation="crop-jitter")
    recipe = Recipe(batch=4, lr=1.0, epochs=1, augment=Augment(crop_scale=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4)))
    short = recoloured(default_collate([method.transform(ViTConfig(), recipe)(scene(), generator(s)) for s in range(6)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("methods.views.LARGE", math.inf)
        long = default_collate([method.transform(ViTConfig(), recipe)(scene(), generator(s)) for s in range(6)])
    assert set(short) == set(long) and torch.equal(short["noise"], long["noise"])
    assert (short["image"].float() - long["image"].float()).abs().mean() < 0.8


@pytest.mark.parametrize("resample", [BICUBIC, LANCZOS])
@pytest.mark.parametrize("box", [(0, 0, 301, 403), (40, 60, 120, 200), (3, 5, 290, 120), (7, 9, 224, 224)])
def test_how_values_lie_in_memory_changes_none(box: tuple[int, int, int, int], resample: Image.Resampling) -> None:
    """Decoders give interleaved values, batches are of planes: a wrong stride would give a picture of stripes."""
    top, left, h, w = box
    interleaved = values_of(scene())[:, top : top + h, left : left + w]
    assert interleaved.stride(0) == 1
    made = resize(interleaved, (224, 224), resample)
    expected = resize(interleaved.contiguous(), (224, 224), resample)
    assert torch.equal(made, expected) and torch.equal(planar(made), expected) and planar(made).is_contiguous()
    assert torch.equal(planar(made.flip(2)), expected.flip(2)) and planar(expected) is expected


def test_a_picture_is_mirrored_as_pil_does() -> None:
    """Without filling PIL's storage, unless something has drawn there."""
    turned = Picture(values_of(scene())).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert isinstance(turned, Picture) and turned._im is None
    assert np.array_equal(np.asarray(turned), np.asarray(scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    drawn = Picture(values_of(scene()))
    ImageDraw.Draw(drawn).rectangle((0, 0, 20, 20), fill=(255, 0, 0))
    assert np.array_equal(np.asarray(drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[5, -5], (255, 0, 0))


def test_identities_say_which_resize_made_the_pixels() -> None:
    """The demo's keys and pixels are what they were; views of 96 pixels and more have another rounding and another key."""
    demo = ViTConfig(size=(64, 64), patch=8)
    assert pixels(demo) == {} and pixels(ViTConfig()) == pixels(demo, 384) == {"pixels": "torch"}
    assert pixels(ViTConfig(size=(64, 64), patch=4)) == {"pixels": "torch"}  # the tokenizer sees 8 pixels a patch: 128


@pytest.mark.parametrize("name", ["beit", "beit-pixel", "beit@intermediate", "beit-dino", "mae", "mae@aug-crop-jitter", "mae@tokens", "dino"])
def test_keys_say_what_the_loader_leaves_to_the_device(name: str) -> None:
    """Whatever switches the jitter on, and for no view that PIL jitters as ever."""
    method, seen = build("methods", name), set()
    for side, patch in ((64, 8), (112, 16), (112, 8), (160, 16), (224, 16)):
        for strength in (None, (0.4, 0.4, 0.4)):
            vit, recipe = ViTConfig(size=(side, side), patch=patch), Recipe(batch=4, lr=1.0, epochs=1, augment=Augment(color_jitter=strength))
            drawn = method.drawn(vit, recipe) if hasattr(method, "drawn") else ""
            assert bool(drawn) == ("jitter" in method.transform(vit, recipe)(scene(), generator(1)))
            seen.add((side, patch, bool(drawn)))
    assert ((224, 16, True) in seen) == (name not in ("beit@intermediate", "dino")) and (64, 8, True) not in seen


@pytest.mark.parametrize("name", ["beit-pixel", "mae@aug-crop-jitter", "mae@pca"])
def test_objectives_jitter_what_was_left_to_them(name: str, tmp_path: Path) -> None:
    """Loss, pictures and what is learned before the first step are those of the jittered views."""
    vit, augment = ViTConfig(size=(96, 96), patch=16, width=24, depth=1, heads=3), Augment(color_jitter=(0.4, 0.4, 0.4))
    recipe = Recipe(batch=4, lr=1.0, epochs=1, augment=augment)
    method = build("methods", name)
    given = default_collate([method.transform(vit, recipe)(scene(), generator(seed)) for seed in range(4)])
    plain = recoloured(given)
    assert given["image"].shape == (4, 96, 96, 3) and plain["image"].shape == (4, 3, 96, 96)
    objectives = []
    for batch in (given, plain):
        torch.manual_seed(0)
        objective = method.objective(ViT(vit), SimpleNamespace(assets={}, recipe=recipe, classes=(), total_steps=2))
        if hasattr(objective, "prepare"):
            objective.prepare(batch)
        objectives.append((objective(batch)["loss"].item(), objective.pictures(batch)))
    (loss, sheet), (expected, same) = objectives
    assert loss == expected and (np.array_equal(sheet, same) if isinstance(sheet, np.ndarray) else sheet == same)
