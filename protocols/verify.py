"""`harness data verify`: every file of a data set looked at, every problem listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.data import BadImage, ade20k_classes, images_below, load_rgb, read_images, read_json_file
from harness.layout import check_layout
from harness.spec import JobFailed, UserError

Step = Callable[[int], None]


def decoded(paths: list[Path], step: Step) -> Iterator[str]:
    """Problems of image files: missing or undecodable."""
    for path in paths:
        step(1)
        if not path.is_file():
            yield f"{path}: missing"
            continue
        try:
            load_rgb(path)
        except BadImage as error:
            yield str(error).split(": mend")[0]


def verify_ade20k(folder: Path, step: Step) -> Iterator[str]:
    """Pairs, sizes and label ranges: 0 is unlabelled, 1..n are classes; after the shift by one they are 0..n-1 and 255."""
    classes = len(ade20k_classes(folder))
    for split in ("training", "validation"):
        images = sorted((folder / "images" / split).glob("*.jpg"))
        if not images:
            yield f"{folder / 'images' / split}: no images"
        for image in images:
            step(1)
            path = folder / "annotations" / split / f"{image.stem}.png"
            if not path.is_file():
                yield f"{path}: missing"
                continue
            try:
                size = load_rgb(image).size
                with Image.open(path) as label:
                    mode, shape, values = label.mode, label.size, np.unique(np.asarray(label))
            except (BadImage, OSError, ValueError) as error:
                yield f"{path if not isinstance(error, BadImage) else image}: cannot be read ({error})"
                continue
            if mode not in ("L", "P", "I", "I;16"):
                yield f"{path}: mode {mode}, expected one channel of class numbers"
            elif values.max() > classes:
                yield f"{path}: label {values.max()} is above the number of classes ({classes} in objectInfo150.txt)"
            if shape != size:
                yield f"{path}: {shape[0]}x{shape[1]} pixels, its image has {size[0]}x{size[1]}"
        for path in sorted((folder / "annotations" / split).glob("*.png")):
            if not (folder / "images" / split / f"{path.stem}.jpg").is_file():
                yield f"{path}: has no image"


def verify_coco(folder: Path, step: Step) -> Iterator[str]:
    """Images and references of both annotation files, boxes and masks inside their image."""
    for split in ("train2017", "val2017"):
        path = folder / "annotations" / f"instances_{split}.json"
        body = read_json_file(path)
        images: dict[Any, Any] = {i["id"]: i for i in body["images"]}
        categories = {c["id"] for c in body["categories"]}
        for image in images.values():
            step(1)
            file = folder / split / image["file_name"]
            if not file.is_file():
                yield f"{file}: missing"
                continue
            try:
                size = load_rgb(file).size
            except BadImage as error:
                yield str(error).split(": mend")[0]
                continue
            if size != (image["width"], image["height"]):
                yield f"{file}: {size[0]}x{size[1]} pixels, {path.name} says {image['width']}x{image['height']}"
        for a in body["annotations"]:
            name = f"{path}: annotation {a.get('id')}"
            if a["image_id"] not in images:
                yield f"{name} names image {a['image_id']}, which the file does not have"
                continue
            if a["category_id"] not in categories:
                yield f"{name} names category {a['category_id']}, which the file does not have"
            image, (x, y, w, h) = images[a["image_id"]], a["bbox"]
            if w <= 0 or h <= 0:
                yield f"{name} has a box without area"
            elif x < -1 or y < -1 or x + w > image["width"] + 1 or y + h > image["height"] + 1:
                yield f"{name} has a box outside its image"
            mask = a["segmentation"]
            if isinstance(mask, dict) and list(mask["size"]) != [image["height"], image["width"]]:
                yield f"{name} has a mask of {mask['size'][1]}x{mask['size'][0]} pixels, its image has {image['width']}x{image['height']}"
            elif isinstance(mask, list) and any(len(p) < 6 or len(p) % 2 for p in mask):
                yield f"{name} has a polygon with fewer than three corners"


def verify_classes(name: str, folder: Path, step: Step) -> Iterator[str]:
    """Images of a classification set; a class without images; an image in both splits."""
    if name == "folder":
        yield from decoded([folder / f for f in images_below(folder)], step)
        return
    seen: dict[str, set[str]] = {}
    for split in ("train", "val"):
        images = read_images(name, split, folder)
        assert images.labels is not None
        yield from decoded([images.path(i) for i in range(len(images))], step)
        counts = np.bincount(images.labels, minlength=len(images.classes))
        if split == "train" and (counts == 0).any():
            yield f"{images.root}: class {images.classes[int(np.argmin(counts))]!r} has no training image"
        seen[split] = {str(images.path(i)) for i in range(len(images))}
    if both := seen["train"] & seen["val"]:
        yield f"{min(both)}: is in train and in val"


def verify(name: str, folder: Path, step: Step = lambda images: None) -> list[str]:
    """All problems of a data set, one line each; an empty list when it is in order."""
    try:
        check_layout(name.partition(":")[0], folder)
    except (UserError, JobFailed) as error:
        first = [" ".join(str(error).split())]
    else:
        first = []
    try:
        if name == "ade20k":
            found = list(verify_ade20k(folder, step))
        elif name == "coco":
            found = list(verify_coco(folder, step))
        else:
            found = list(verify_classes(name.partition(":")[0], folder, step))
    except (UserError, KeyError, TypeError, ValueError) as error:
        found = [] if first else [f"{folder}: not in the layout of {name} ({error})"]
    return found + [f for f in first if not any(f.startswith(g.partition(": ")[0]) for g in found)]  # each file's problem once
