"""Procedural scenes: textured shapes, with occlusion, on smooth backgrounds. One world for every generated data set.

A scene is drawn from a numpy generator alone, so its content is a function of (seed, set, split, index). Shapes are the object
classes; texture (flat, gradient, stripes, checks), colour, size, rotation and position vary freely. Backgrounds are stuff classes
that differ in colour statistics and in texture; one kind fills the picture, or two meet at a horizon or in a valley.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("arrow", "crescent", "cross", "disc", "heart", "hourglass", "ring", "square", "star", "triangle")
TEXTURES = ("flat", "gradient", "stripes", "checks")
GROUNDS = ("sky", "night", "wall", "grass", "water", "sand", "snow", "wood")
UPPER, LOWER = ("sky", "night", "wall"), ("grass", "water", "sand", "snow", "wood")
LAYOUTS = ("open", "horizon", "valley")
SUPERSAMPLE = 4
BORDER = 0.08  # a pixel whose coverage by a shape is between this and one minus it belongs to neither side


@dataclass(frozen=True)
class Thing:
    """An object: indices into SHAPES and TEXTURES. `crowd`: the things of one crowd share an instance number."""

    shape: int
    texture: int
    crowd: bool = False


@dataclass
class Scene:
    """A picture with all that is known about it. `instances` holds positions in `things`, -1 for background; `border` marks thin object edges."""

    image: np.ndarray  # (H, W, 3) float32 while drawn, uint8 when finished
    ground: np.ndarray  # (H, W) uint8, index into GROUNDS
    instances: np.ndarray  # (H, W) int16
    border: np.ndarray  # (H, W) bool
    things: list[Thing] = field(default_factory=list)

    def cover(self) -> float:
        """Fraction of the picture that objects cover."""
        return float((self.instances >= 0).mean())


# ---------------------------------------------------------------------------------------------------------- backgrounds


def smooth(rng: np.random.Generator, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """(H, W) float32 noise of unit scale that varies over about H/rows and W/columns pixels."""
    grid = rng.standard_normal((min(rows, height), min(columns, width)), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _colour(rng: np.random.Generator, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """A colour (3,) in 0..255; the hue is in degrees."""
    return np.float32(255) * np.array(colorsys.hsv_to_rgb(rng.uniform(*hue) / 360 % 1, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def _sky(rng: np.random.Generator, h: int, w: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _colour(rng, (195, 225), (0.35, 0.65), (0.75, 1.0)), 30 * y / h + 22 * np.clip(smooth(rng, h, w, 4, 3), 0, 2)


def _night(rng: np.random.Generator, h: int, w: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stars = (rng.random((h, w), dtype=np.float32) > 0.988) * rng.uniform(60, 140)
    return _colour(rng, (215, 275), (0.4, 0.8), (0.12, 0.28)), 6 * smooth(rng, h, w, 3, 3) + stars


def _wall(rng: np.random.Generator, h: int, w: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tall = int(rng.integers(7, 11))
    row = (y + int(rng.integers(tall))) // tall
    mortar = ((y + int(rng.integers(tall))) % tall == 0) | ((x + row * tall) % (2 * tall) == 0)
    return _colour(rng, (-5, 25), (0.3, 0.6), (0.45, 0.75)), 26 * mortar + 7 * smooth(rng, h, w, 6, 5)


def _grass(rng: np.random.Generator, h: int, w: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _colour(rng, (80, 135), (0.4, 0.8), (0.35, 0.7)), 15 * smooth(rng, h, w, h // 6, w // 2) + 8 * smooth(rng, h, w, 4, 4)


def _water(rng: np.random.Generator, h: int, w: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    waves = np.sin(2 * np.pi * (y / rng.uniform(6, 11) + 0.35 * smooth(rng, h, w, 3, 4)))
    return _colour(rng, (170, 215), (0.45, 0.85), (0.4, 0.75)), 13 * waves


def _sand(rng: np.random.Generator, h: int, w: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _colour(rng, (32, 52), (0.3, 0.6), (0.7, 0.95)), 10 * rng.standard_normal((h, w), dtype=np.float32) + 6 * smooth(rng, h, w, 4, 3)


def _snow(rng: np.random.Generator, h: int, w: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _colour(rng, (190, 250), (0.02, 0.1), (0.82, 0.95)), 9 * smooth(rng, h, w, 5, 5)


def _wood(rng: np.random.Generator, h: int, w: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    plank = int(rng.integers(14, 22))
    gaps = (x + int(rng.integers(plank))) % plank == 0
    return _colour(rng, (20, 36), (0.45, 0.75), (0.35, 0.65)), 10 * smooth(rng, h, w, 3, w // 2) - 40 * gaps


_Painter = Callable[[np.random.Generator, int, int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
_PAINTERS: tuple[_Painter, ...] = (_sky, _night, _wall, _grass, _water, _sand, _snow, _wood)


def _paint(rng: np.random.Generator, kind: int, height: int, width: int) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    colour, relief = _PAINTERS[kind](rng, height, width, y, x)
    tint = rng.uniform(-12, 12, 3).astype(np.float32)
    drift = 12 * smooth(rng, height, width, 2, 2)
    return (colour + tint) + (relief + drift)[..., None].astype(np.float32)


def background(rng: np.random.Generator, height: int, width: int, lower: int, upper: int, layout: str) -> Scene:
    """An empty scene. `open`: `lower` fills it; `horizon`: `upper` above an almost level line; `valley`: `upper` fills a V."""
    image = _paint(rng, lower, height, width)
    ground = np.full((height, width), lower, np.uint8)
    if layout != "open":
        x = np.linspace(-1, 1, width, dtype=np.float32)
        if layout == "horizon":
            edge = rng.uniform(0.35, 0.6) + rng.uniform(-0.06, 0.06) * x
        else:
            edge = rng.uniform(0.7, 0.95) - rng.uniform(0.6, 0.85) * np.abs(x - rng.uniform(-0.25, 0.25))
        above = np.arange(height)[:, None] < (edge * height)[None, :]
        image = np.where(above[..., None], _paint(rng, upper, height, width), image)
        ground[above] = upper
    return Scene(image, ground, np.full((height, width), -1, np.int16), np.zeros((height, width), bool))


# --------------------------------------------------------------------------------------------------------------- shapes


def _around(count: int, radius: float | tuple[float, ...] = 1.0, turn: float = 0.0) -> np.ndarray:
    radii = np.resize(np.asarray(radius, np.float64), count)
    angle = 2 * np.pi * (np.arange(count) / count) + turn
    return np.stack([radii * np.sin(angle), -radii * np.cos(angle)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, -(y + 2) / 17], 1)


def _crescent() -> np.ndarray:
    outer = np.linspace(0.3 * np.pi, 1.7 * np.pi, 36)
    inner = outer[::-1]
    tip_x, tip_y = np.cos(outer[0]), np.sin(outer[0])
    centre = tip_x + 0.02  # inner arc through both tips, around a centre to the right of the outer one's
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1),
                           np.stack([centre + 0.72 * (np.cos(inner) - tip_x), tip_y * np.sin(inner) / np.sin(inner).max()], 1)]) + [0.2, 0.0]


def _outlines() -> dict[str, tuple[np.ndarray, ...]]:
    """Vertices of each shape (n, 2) in a disc of radius 1: the outline, then holes."""
    a, b = 0.34, 0.95
    cross = np.array([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)])
    arrow = np.array([(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.1), (-0.8, -0.1)])
    hourglass = np.array([(-0.72, -0.9), (0.72, -0.9), (0.14, 0), (0.72, 0.9), (-0.72, 0.9), (-0.14, 0)])
    return {"arrow": (arrow,), "crescent": (_crescent(),), "cross": (cross,), "disc": (0.88 * _around(40),), "heart": (_heart(),),
            "hourglass": (hourglass,), "ring": (0.95 * _around(40), 0.5 * _around(32)), "square": (_around(4, turn=np.pi / 4),),
            "star": (_around(10, (1.0, 0.42)),), "triangle": (1.05 * _around(3),)}


OUTLINES = _outlines()


def coverage(shape: int, centre: tuple[float, float], radius: float, angle: float, aspect: float, height: int, width: int,
             ) -> tuple[slice, slice, np.ndarray] | None:
    """Where a shape lies (rows, columns) and which part of each pixel it covers (h, w) in 0..1; None when it lies outside."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    loops = [(loop * [aspect, 1 / aspect]) @ turn * radius + centre for loop in OUTLINES[SHAPES[shape]]]
    low, high = np.floor(loops[0].min(0)).astype(int), np.ceil(loops[0].max(0)).astype(int) + 1
    x0, y0, x1, y1 = max(low[0], 0), max(low[1], 0), min(high[0], width), min(high[1], height)
    if x0 >= x1 or y0 >= y1:
        return None
    canvas = Image.new("L", ((x1 - x0) * SUPERSAMPLE, (y1 - y0) * SUPERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    for i, loop in enumerate(loops):
        pen.polygon(((loop - [x0, y0]) * SUPERSAMPLE - 0.5).ravel().tolist(), fill=0 if i else 255)
    return slice(y0, y1), slice(x0, x1), np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255


def _texture(rng: np.random.Generator, texture: int, rows: slice, columns: slice, centre: tuple[float, float], radius: float, behind: np.ndarray,
             ) -> np.ndarray:
    """Colours (h, w, 3) of a thing; its main colour keeps away from the mean colour behind it."""
    for _ in range(5):
        hue, value = rng.uniform(0, 360), rng.uniform(0.35, 1.0)
        first = _colour(rng, (hue, hue), (0.25, 1.0), (value, value))
        if np.abs(first - behind).mean() > 48:
            break
    dark = value - rng.uniform(0.35, 0.5)
    other = dark if dark > 0.05 else value + rng.uniform(0.4, 0.6)
    shift = hue + (rng.uniform(-60, 60) if rng.random() < 0.6 else rng.uniform(0, 360))
    second = _colour(rng, (shift, shift), (0.2, 0.9), (other, other))
    y, x = np.mgrid[rows, columns].astype(np.float32) - np.array(centre[::-1], np.float32)[:, None, None]
    turn = rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    if TEXTURES[texture] == "flat":
        mix = np.zeros_like(u)
    elif TEXTURES[texture] == "gradient":
        mix = np.clip(0.5 + 0.6 * u / radius, 0, 1)
    else:
        period = max(5.0, radius * rng.uniform(0.4, 0.6))
        wave = np.sin(2 * np.pi * u / period + rng.uniform(0, 6))
        if TEXTURES[texture] == "checks":
            wave = 2.5 * wave * np.sin(2 * np.pi * v / period + rng.uniform(0, 6))
        mix = 0.5 + 0.5 * np.clip(3 * wave, -1, 1)
    light = 1 + 0.14 * (x * np.cos(rng.uniform(0, 7)) - y) / (radius + 1)
    return (first + (second - first) * mix[..., None]) * light[..., None]


def place(scene: Scene, rng: np.random.Generator, thing: Thing, centre: tuple[float, float], radius: float, instance: int | None = None,
          least_visible: float = 0.45) -> bool:
    """Draw a thing over the scene, unless it would hide more than 1 - `least_visible` of another. Returns whether it was drawn.

    `centre` is (x, y) in pixels. `instance`: number of an existing entry of `things` (a member of a crowd), by default a new one.
    """
    height, width = scene.ground.shape
    spot = coverage(thing.shape, centre, radius, rng.uniform(0, 2 * np.pi), rng.uniform(0.88, 1.14), height, width)
    if spot is None:
        return False
    rows, columns, alpha = spot
    solid = alpha >= 0.5
    if solid.sum() < 24:
        return False
    counts = np.bincount(scene.instances[scene.instances >= 0], minlength=len(scene.things))
    under = scene.instances[rows, columns][solid]
    hidden = np.bincount(under[under >= 0], minlength=len(scene.things))
    if instance is None and len(counts) and np.any((hidden > 0) & ((counts - hidden < least_visible * counts) | (counts - hidden < 40))):
        return False
    behind = scene.image[rows, columns].reshape(-1, 3).mean(0)
    paint = _texture(rng, thing.texture, rows, columns, centre, radius, behind)
    scene.image[rows, columns] += alpha[..., None] * (paint - scene.image[rows, columns])
    if instance is None:
        instance = len(scene.things)
        scene.things.append(thing)
    scene.instances[rows, columns][solid] = instance
    edge = scene.border[rows, columns]
    edge[alpha >= 1 - BORDER] = False
    edge[(alpha > BORDER) & (alpha < 1 - BORDER)] = True
    return True


def scatter(scene: Scene, rng: np.random.Generator, target: float, at_most: int, sizes: tuple[float, float], shapes: int = len(SHAPES)) -> None:
    """Place things until they cover `target` of the scene or there are `at_most`; radii are `sizes` times the shorter side."""
    height, width = scene.ground.shape
    for _ in range(4 * at_most):
        if len(scene.things) >= at_most or scene.cover() >= target:
            return
        radius = rng.uniform(*sizes) * min(height, width)
        margin = 0.45 * radius
        centre = (rng.uniform(margin, width - margin), rng.uniform(margin, height - margin))
        place(scene, rng, Thing(int(rng.integers(shapes)), int(rng.integers(len(TEXTURES)))), centre, radius)


def finish(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture (H, W, 3) uint8: exposure and a little noise come last."""
    noise = rng.uniform(2, 5) * rng.standard_normal(scene.image.shape, dtype=np.float32)
    return np.clip(scene.image * rng.uniform(0.85, 1.1) + noise, 0, 255).astype(np.uint8)
