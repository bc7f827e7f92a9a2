"""Sample pictures of a dense evaluation: a few scored images, each beside its ground truth and its prediction."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
from PIL import Image, ImageDraw, ImageFont

from evals.openmmlab.samples import size_of_labels
from harness.checkpoint import write_atomically
from harness.data import load_rgb

COUNT = 8
SIDE = 384  # longer side of an image in the picture, pixels
LINE = 18  # height of a line of text, pixels
SHOWN = 10  # detections of an image, the best ones
IGNORED = 255


class Thing(NamedTuple):
    """Something to draw on an image: a class, where it is (H, W) bool, a box in pixels or None, and a text."""

    label: int
    mask: np.ndarray
    box: Sequence[float] | None
    text: str


def places(count: int) -> list[int]:
    """The positions to draw of `count` scored images, evenly spaced: the same for every method and seed."""
    return sorted({round(p) for p in np.linspace(0, count - 1, min(COUNT, count))})


def colour(label: int) -> tuple[int, int, int]:
    """Colour of a class: hues a golden section apart, so that neighbours in the list differ; three steps of brightness."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.75, (0.95, 0.75, 0.55)[label % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(sample: Any, info: dict[str, Any], classes: Sequence[str], folder: Path) -> Path:
    """Write `folder`/NAME.png: image, ground truth and prediction side by side, and below the names of the colours.

    Args:
        sample: what mmseg's or mmdet's model gives for an image.
        info: the image's entry in its data set; has the ground truth of a detection.
    """
    image = load_rgb(Path(info["img_path"]), size_of_labels(info))
    if "pred_sem_seg" in sample:
        truth, found = (regions(sample.get(k).data.squeeze(0).cpu().numpy(), classes) for k in ("gt_sem_seg", "pred_sem_seg"))
    else:
        truth, found = objects(info, image.size, classes), detections(sample.pred_instances, classes)
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    legend = names(truth, found, classes, 3 * size[0])
    picture = Image.new("RGB", (3 * size[0], size[1] + LINE * (1 + len(legend))), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(LINE * 2 / 3)
    for column, (title, things) in enumerate(((Path(info["img_path"]).name, []), ("ground truth", truth), ("prediction", found))):
        picture.paste(panel(image, things, size), (column * size[0], LINE))
        pen.text((column * size[0] + 4, 2), title, "black", font)
    for row, line in enumerate(legend):
        x, y = 4.0, size[1] + LINE * (row + 1)
        for label in line:
            pen.rectangle((x, y + 4, x + 10, y + 14), colour(label))
            pen.text((x + 14, y + 2), classes[label], "black", font)
            x += 28 + font.getlength(classes[label])
    path = folder / f"{Path(info['img_path']).stem}.png"
    write_atomically(path, lambda stream: picture.save(stream, "PNG"))
    return path


def panel(image: Image.Image, things: Iterable[Thing], size: tuple[int, int]) -> Image.Image:
    """An image (RGB) at a size with things on it: masks half transparent, boxes with their texts above."""
    things = list(things)
    pixels = np.asarray(image).astype(np.float32)
    for thing in things:
        pixels[thing.mask] = 0.5 * pixels[thing.mask] + 0.5 * np.array(colour(thing.label), np.float32)
    shown = Image.fromarray(pixels.astype(np.uint8)).resize(size)
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(LINE * 2 / 3)
    for thing in things:
        if thing.box is not None:
            left, top, right, bottom = (v * size[i % 2] / image.size[i % 2] for i, v in enumerate(thing.box))
            pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour(thing.label), width=2)
            place = max(0.0, min(left, size[0] - font.getlength(thing.text))), max(0.0, top - LINE + 3)
            pen.rectangle(pen.textbbox(place, thing.text, font), colour(thing.label))
            pen.text(place, thing.text, "white", font)
    return shown


def names(truth: Iterable[Thing], found: Iterable[Thing], classes: Sequence[str], width: int) -> list[list[int]]:
    """The classes that are drawn, in lines that fit into a width in pixels."""
    font, lines, used = ImageFont.load_default(LINE * 2 / 3), list[list[int]](), 0.0
    for label in sorted({thing.label for thing in (*truth, *found)}):
        wide = 28 + font.getlength(classes[label])
        if not lines or used + wide > width:
            lines.append([])
            used = 4.0
        lines[-1].append(label)
        used += wide
    return lines


def regions(labels: np.ndarray, classes: Sequence[str]) -> list[Thing]:
    """The classes of a label map (H, W)."""
    return [Thing(int(label), labels == label, None, classes[label]) for label in np.unique(labels) if label != IGNORED]


def objects(info: dict[str, Any], size: tuple[int, int], classes: Sequence[str]) -> list[Thing]:
    """The instances of a data info; a crowd says so."""
    found = []
    for instance in info["instances"]:
        mask, (width, height) = instance["mask"], size
        if isinstance(mask, list):
            mask = pycocotools.mask.merge(pycocotools.mask.frPyObjects(mask, height, width))
        elif isinstance(mask["counts"], list):
            mask = pycocotools.mask.frPyObjects(mask, height, width)
        text = classes[instance["bbox_label"]] + " (crowd)" * bool(instance["ignore_flag"])
        found.append(Thing(instance["bbox_label"], pycocotools.mask.decode(mask).astype(bool), instance["bbox"], text))
    return found


def detections(found: Any, classes: Sequence[str]) -> list[Thing]:
    """mmdet's instances of an image, the best SHOWN of them, the best one drawn last."""
    best = found.scores.argsort(descending=True)[:SHOWN].flip(0).tolist()
    scores, labels, boxes = found.scores.tolist(), found.labels.tolist(), found.bboxes.tolist()
    return [Thing(labels[i], found.masks[i].cpu().numpy().astype(bool), boxes[i], f"{classes[labels[i]]} {scores[i]:.2f}") for i in best]
