"""Tiny ADE20K and COCO folders in the real layouts: coloured rectangles on a plain ground, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = ((3, "red"), (7, "blue"))  # ids with a gap, as COCO's
COLOURS = ((200, 40, 40), (40, 40, 200))


def picture(index: int) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """An image (H, W, 3) of one of several sizes, and its rectangles (colour, (top, left, height, width)); every fifth has none."""
    rng = np.random.default_rng(index)
    height, width = ((48, 64), (64, 48), (50, 37), (40, 40))[index % 4]
    image = np.full((height, width, 3), 120, np.uint8) + rng.integers(0, 9, (height, width, 3), dtype=np.uint8)
    boxes = []
    for half in range(0 if index % 5 == 4 else 2):
        colour, h, w = int(rng.integers(2)), int(rng.integers(12, 24)), int(rng.integers(10, 16))
        top, left = int(rng.integers(0, height - h)), half * (width // 2) + int(rng.integers(0, width // 2 - w))
        image[top : top + h, left : left + w] = COLOURS[colour]
        boxes.append((colour, (top, left, h, w)))
    return image, boxes


def make_ade20k(root: Path, train: int = 9, val: int = 5) -> Path:
    """Labels: 0 nothing (a frame), 1 ground, 2 red, 3 blue."""
    root.mkdir(parents=True)
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0\t1\t1\t0\t{name}" for i, name in enumerate(("ground", "red", "blue"), 1))]
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    for split, count, start in (("training", train, 0), ("validation", val, 1000)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(start, start + count):
            image, boxes = picture(i)
            labels = np.ones(image.shape[:2], np.uint8)
            for colour, (top, left, h, w) in boxes:
                labels[top : top + h, left : left + w] = 2 + colour
            labels[:2] = 0
            Image.fromarray(image).save(root / "images" / split / f"ADE_{i:04}.jpg")
            Image.fromarray(labels).save(root / "annotations" / split / f"ADE_{i:04}.png")
    return root


def make_coco(root: Path, train: int = 9, val: int = 5) -> Path:
    """Rectangles as polygons, one crowd region as RLE in the first image of each split, some images without objects."""
    (root / "annotations").mkdir(parents=True)
    for split, count, start in (("train2017", train, 0), ("val2017", val, 1000)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(start, start + count):
            image, boxes = picture(i)
            Image.fromarray(image).save(root / split / f"{i:012}.jpg")
            height, width = image.shape[:2]
            images.append({"id": i, "file_name": f"{i:012}.jpg", "height": height, "width": width})
            for colour, (top, left, h, w) in boxes:
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i, "category_id": CATEGORIES[colour][0], "bbox": [left, top, w, h], "area": w * h,
                    "iscrowd": 0, "segmentation": [[left, top, left + w, top, left + w, top + h, left, top + h]],
                })
            if i == start:
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i, "category_id": 3, "bbox": [0, 0, 4, height], "area": 4 * height, "iscrowd": 1,
                    "segmentation": {"size": [height, width], "counts": [0, 4 * height, (width - 4) * height]},
                })
        body = {"images": images, "annotations": annotations, "categories": [{"id": n, "name": name} for n, name in CATEGORIES]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(body))
    return root
