"""The generated world: textured shapes on smooth backgrounds, drawn from a seed.

One world for all sets, so that pre-training transfers: ten shapes are the object classes, four textures and six kinds of background
vary freely. Every scene is a function of its own seed; nothing is shared between images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

TEXTURES = ("flat", "gradient", "stripes", "checks")
BACKGROUNDS = ("sky", "grass", "water", "sand", "wall", "night")
OVERSAMPLING = 2
TYPICAL, HUE_SPREAD = 0.8, 0.035  # fraction of things with the hue of their shape, and its standard deviation in turns


def _regular(corners: int, inner: float | None = None, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when an inner radius is given."""
    radii = [1.0] if inner is None else [1.0, inner]
    count = corners * len(radii)
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


def _crescent() -> list[tuple[float, float]]:
    """A moon: an outer arc and a flatter one back."""
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(math.radians(50), math.radians(310), 24)]
    inner = [(0.42 + 0.72 * math.cos(a), 0.98 * 0.8 * math.sin(a)) for a in np.linspace(math.radians(285), math.radians(75), 20)]
    return outer + inner


def _heart() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    return [(math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16) for a in angles]


SHAPES: dict[str, list[tuple[float, float]]] = {
    "arrow": [(0, -1), (0.8, -0.1), (0.32, -0.1), (0.32, 1), (-0.32, 1), (-0.32, -0.1), (-0.8, -0.1)],
    "bar": [(-0.32, -1), (0.32, -1), (0.32, 1), (-0.32, 1)],
    "crescent": _crescent(),
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "disc": _regular(32),
    "ell": [(-0.8, -1), (-0.2, -1), (-0.2, 0.4), (0.8, 0.4), (0.8, 1), (-0.8, 1)],
    "heart": _heart(),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "star": _regular(5, 0.42),
    "triangle": _regular(3),
}
SHAPE_NAMES = tuple(SHAPES)


@dataclass(frozen=True)
class Thing:
    """One object: shape and texture by name, centre and size (half extent) in pixels, rotation in radians, two colours in 0..255."""

    shape: str
    texture: str
    centre: tuple[float, float]
    size: float
    angle: float
    colours: np.ndarray

    def corners(self) -> np.ndarray:
        """Corners (n, 2) as x, y in pixels."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        return np.array(SHAPES[self.shape]) @ np.array([[c, s], [-s, c]]) * self.size + np.array(self.centre)


def colour(rng: np.random.Generator, hue: float) -> np.ndarray:
    """A colour of a hue (in turns of the colour circle) with random saturation and brightness, (3,) in 0..255."""
    sat, val = rng.uniform(0.4, 1.0), rng.uniform(0.35, 1.0)
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return 255 * (val - val * sat * np.clip(np.minimum(k, 4 - k), 0, 1))


def smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise (height, width) in about -1..1 with `cells` bumps along a side."""
    small = Image.fromarray(rng.standard_normal((cells + 2, cells + 2)).astype(np.float32), mode=None)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def background(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    """A background of a kind, float (height, width, 3) in 0..255. Kinds differ in colour range and in the statistics of their texture."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    drift = smooth(rng, height, width, 2)[..., None] * 12
    jitter = rng.uniform(-22, 22, 3)
    if kind == "sky":
        base = np.array([120.0, 165, 220]) + (y / height)[..., None] * np.array([60.0, 45, 20]) + np.clip(smooth(rng, height, width, 4), 0, 2)[..., None] * 28
    elif kind == "grass":
        base = np.array([80.0, 140, 60]) + rng.standard_normal((height, width, 1)) * 20
        base = base + np.sin(x * rng.uniform(1.2, 1.8) + smooth(rng, height, width, 5) * 2)[..., None] * 10
    elif kind == "water":
        wave = np.sin(y * rng.uniform(0.5, 0.9) + 2.0 * smooth(rng, height, width, 4) + rng.uniform(0, 6))
        base = np.array([40.0, 105, 150]) + wave[..., None] * np.array([18.0, 24, 26])
    elif kind == "sand":
        base = np.array([205.0, 180, 130]) + (rng.random((height, width, 1)) > 0.85) * -42 + smooth(rng, height, width, 6)[..., None] * 8
    elif kind == "wall":
        h, w = rng.uniform(8, 13), rng.uniform(16, 26)
        row = np.floor(y / h)
        mortar = ((y % h) < 1.6) | (((x + (row % 2) * w / 2) % w) < 1.6)
        base = np.array([160.0, 95, 80]) + (np.sin(row * 12.9 + np.floor((x + (row % 2) * w / 2) / w) * 78.2) * 12)[..., None] + mortar[..., None] * 55
    else:  # night
        stars = (rng.random((height, width, 1)) > 0.985) * 170
        base = np.array([28.0, 26, 58]) + (1 - y / height)[..., None] * 22 + stars
    return base + drift + jitter


def texture(rng: np.random.Generator, thing: Thing, height: int, width: int) -> np.ndarray:
    """The thing's texture over the whole picture, float (height, width, 3); patterns turn with the thing."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    c, s = math.cos(thing.angle), math.sin(thing.angle)
    u = ((x - thing.centre[0]) * c + (y - thing.centre[1]) * s) / thing.size
    v = (-(x - thing.centre[0]) * s + (y - thing.centre[1]) * c) / thing.size
    if thing.texture == "flat":
        mix = np.zeros_like(u)
    elif thing.texture == "gradient":
        mix = np.clip((v + 1) / 2, 0, 1)
    elif thing.texture == "stripes":
        mix = (np.sin(u * rng.uniform(7, 10)) > 0).astype(np.float32)
    else:
        step = rng.uniform(3.0, 4.2)
        mix = ((np.floor(u * step) + np.floor(v * step)) % 2).astype(np.float32)
    return thing.colours[0] + mix[..., None] * (thing.colours[1] - thing.colours[0])


def draw_mask(thing: Thing, height: int, width: int) -> np.ndarray:
    """Coverage of the thing, float (height, width) in 0..1."""
    canvas = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in (thing.corners() * OVERSAMPLING).tolist()], fill=255)
    return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32) / 255


def random_thing(rng: np.random.Generator, height: int, width: int, size: tuple[float, float], shape: str | None = None, tex: str | None = None) -> Thing:
    """A thing of random place, rotation and colours; `size` is the range of its half extent as a fraction of the shorter side.

    As with real objects, colour tells something of the class and not all: most things have the hue of their shape, give or take, the
    others any hue. Shape alone is beyond what a small ViT learns in a minute: fine-tuned for 5,000 images it stays at chance.
    """
    half = rng.uniform(*size) * min(height, width)
    margin = 0.55 * half
    shape = shape or SHAPE_NAMES[rng.integers(len(SHAPE_NAMES))]
    own = SHAPE_NAMES.index(shape) / len(SHAPE_NAMES)
    hue = rng.normal(own, HUE_SPREAD) if rng.random() < TYPICAL else rng.random()
    first, second = colour(rng, hue), colour(rng, rng.normal(hue, HUE_SPREAD))
    for _ in range(10):  # two colours that can be told apart
        if np.abs(first - second).sum() >= 120:
            break
        second = colour(rng, rng.normal(hue, 2 * HUE_SPREAD))
    return Thing(
        shape, tex or TEXTURES[rng.integers(len(TEXTURES))],
        (rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)), half, rng.uniform(0, 2 * math.pi), np.stack([first, second]),
    )


@dataclass(frozen=True)
class Scene:
    """A picture uint8 (H, W, 3); its things from back to front with visible masks (bool, H, W); the stuff map (index of the background's kind)."""

    image: np.ndarray
    things: tuple[Thing, ...]
    visible: tuple[np.ndarray, ...]
    stuff: np.ndarray


def compose(rng: np.random.Generator, ground: np.ndarray, stuff: np.ndarray, things: list[Thing]) -> Scene:
    """Draw things over a background, back to front, with a soft shadow of light and a little noise."""
    height, width = stuff.shape
    picture, visible = ground, []
    for thing in things:
        cover = draw_mask(thing, height, width)
        shade = 1 + 0.12 * smooth(rng, height, width, 2)[..., None]
        picture = picture * (1 - cover[..., None]) + texture(rng, thing, height, width) * shade * cover[..., None]
        solid = cover > 0.5
        visible = [m & ~solid for m in visible] + [solid]
    picture = picture * rng.uniform(0.88, 1.1) + rng.standard_normal((height, width, 3)) * 4
    return Scene(np.clip(picture, 0, 255).astype(np.uint8), tuple(things), tuple(visible), stuff)


def scene(rng: np.random.Generator, height: int, width: int, count: int, size: tuple[float, float] = (0.16, 0.34)) -> Scene:
    """A scene of `count` things, occluding one another, on one kind of background or on two that meet at a horizon."""
    kinds = [int(k) for k in rng.permutation(len(BACKGROUNDS))[:2]]
    ground, stuff = background(rng, BACKGROUNDS[kinds[0]], height, width), np.full((height, width), kinds[0])
    if rng.random() < 0.5:
        other = background(rng, BACKGROUNDS[kinds[1]], height, width)
        line = height * rng.uniform(0.35, 0.7) + smooth(rng, 1, width, 2)[0] * height * 0.06
        below = np.mgrid[0:height, 0:width][0] > line[None]
        ground, stuff = np.where(below[..., None], other, ground), np.where(below, kinds[1], stuff)
    return compose(rng, ground, stuff, [random_thing(rng, height, width, size) for _ in range(count)])
