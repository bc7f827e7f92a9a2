"""ADE20K and COCO 2017 as downloaded: what is wrong with a copy, quickly before a run and thoroughly in `data verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_sets.labelled import Labelled
from harness.data import BadImage, Count, ade20k_classes, load_rgb, read_json_file
from harness.spec import UserError

LABELS_LOOKED_AT = 1000  # annotation pictures that a quick check opens
IGNORED = 255  # what label 0 becomes when all labels are shifted by one for training
ENOUGH = 100  # pictures in which each class of a set should occur


class ADE20K(Labelled):
    """ADEChallengeData2016: images/ and annotations/ with training and validation, objectInfo150.txt."""

    folder = "ADEChallengeData2016"
    splits = ("training", "validation")
    official: ClassVar[Mapping[str, Count]] = {"training": Count(20_210, 150), "validation": Count(2000, 150)}

    def count(self, split: str, root: Path) -> tuple[int, int]:
        """Images and classes of a split."""
        return len(list((root / "images" / split).glob("*.jpg"))), len(ade20k_classes(root))

    def check(self, root: Path) -> None:
        """Each image has its annotation; some annotations are opened."""
        classes = number_of_classes(root)
        for split in self.splits:
            images, labels = root / "images" / split, root / "annotations" / split
            have = {p.stem for p in images.glob("*.jpg")}
            if not have:
                raise UserError(f"{images}: no images: expected the layout of ADEChallengeData2016 (images/{split}/*.jpg)")
            if without := sorted(have - {p.stem for p in labels.glob("*.png")}):
                raise UserError(f"{images / without[0]}.jpg: has no annotation {labels / without[0]}.png")
            stems = sorted(have)
            for stem in stems[:: max(1, len(stems) // LABELS_LOOKED_AT)]:
                check_labels(labels / f"{stem}.png", classes)

    def problems(self, root: Path, step: Callable[[int], None]) -> Iterator[str]:
        """Pairs, sizes, and labels: 0 (unlabelled) and 1..n, which training shifts by one to 255 (ignored) and 0..n-1; not shifted already."""
        from PIL import Image

        classes = number_of_classes(root)
        for split in ("training", "validation"):
            images = sorted((root / "images" / split).glob("*.jpg"))
            if not images:
                yield f"{root / 'images' / split}: no images"
            occur: set[int] = set()
            for image in images:
                step(1)
                path = root / "annotations" / split / f"{image.stem}.png"
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
                if (wrong := wrong_labels(mode, values, classes)) is not None:
                    yield f"{path}: {wrong}"
                occur.update(values.tolist())
                if shape != size:
                    yield f"{path}: {shape[0]}x{shape[1]} pixels, its image has {size[0]}x{size[1]}"
            if split == "training" and len(images) >= ENOUGH and occur == set(range(classes)):
                yield (f"{root / 'annotations' / split}: all labels from 0 to {classes - 1} occur and {classes} never does: shifted by one already? "
                       f"0 must be unlabelled and 1 to {classes} the classes of objectInfo150.txt")
            for path in sorted((root / "annotations" / split).glob("*.png")):
                if not (root / "images" / split / f"{path.stem}.jpg").is_file():
                    yield f"{path}: has no image"


class COCO(Labelled):
    """COCO 2017: train2017/, val2017/, annotations/instances_{train,val}2017.json."""

    folder = "coco"
    splits = ("train2017", "val2017")
    official: ClassVar[Mapping[str, Count]] = {"train2017": Count(118_287, 80), "val2017": Count(5000, 80)}

    def count(self, split: str, root: Path) -> tuple[int, int]:
        """Images and categories of a split, as its annotations list them."""
        body = read_json_file(root / "annotations" / f"instances_{split}.json")
        return len(body["images"]), len(body["categories"])

    def check(self, root: Path) -> None:
        """References inside both annotation files, and the image files that they name."""
        for split in self.splits:
            path = root / "annotations" / f"instances_{split}.json"
            check_coco(path, read_json_file(path), root / split)

    def problems(self, root: Path, step: Callable[[int], None]) -> Iterator[str]:
        """Images and references of both annotation files, boxes and masks inside their image."""
        for split in ("train2017", "val2017"):
            path = root / "annotations" / f"instances_{split}.json"
            body = read_json_file(path)
            images: dict[Any, Any] = {i["id"]: i for i in body["images"]}
            categories = {c["id"] for c in body["categories"]}
            for image in images.values():
                step(1)
                file = root / split / image["file_name"]
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


def number_of_classes(root: Path) -> int:
    """Classes of a set in ADE20K's layout. Raises UserError for more than the shifted labels can number."""
    classes = len(ade20k_classes(root))
    if classes > IGNORED:
        raise UserError(f"{root / 'objectInfo150.txt'}: {classes} classes: at most {IGNORED}, shifted by one the next would be {IGNORED}, which is ignored")
    return classes


def wrong_labels(mode: str, values: np.ndarray, classes: int) -> str | None:
    """What is wrong with the labels that occur in an annotation picture of ADE20K, before and after the shift by one, or None."""
    if mode not in ("L", "P", "I", "I;16"):
        return f"mode {mode}, expected one channel of class numbers"
    if values.min() < 0:
        return f"label {values.min()} is negative"
    if values.max() > classes:
        shifted = ": shifted by one already?" if values.max() == IGNORED and classes < IGNORED and (values[values < IGNORED] < classes).all() else ""
        return f"label {values.max()} is above the number of classes ({classes} in objectInfo150.txt){shifted}"
    return None


def check_labels(path: Path, classes: int) -> None:
    """One annotation picture of ADE20K: a single channel of numbers up to the number of classes. Raises UserError."""
    from PIL import Image

    try:
        with Image.open(path) as label:
            mode, values = label.mode, np.unique(np.asarray(label))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}): mend or remove it with its image") from error
    if (wrong := wrong_labels(mode, values, classes)) is not None:
        raise UserError(f"{path}: {wrong}")


def check_coco(path: Path, body: Any, images: Path) -> None:
    """References inside a COCO annotation file, and the image files that it names. Raises UserError for the first that is wrong."""
    try:
        ids, categories = {i["id"]: i["file_name"] for i in body["images"]}, {c["id"] for c in body["categories"]}
        for a in body["annotations"]:
            if a["image_id"] not in ids:
                raise UserError(f"{path}: annotation {a['id']} names image {a['image_id']}, which the file does not have")
            if a["category_id"] not in categories:
                raise UserError(f"{path}: annotation {a['id']} names category {a['category_id']}, which the file does not have")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not in COCO's layout ({error} is missing)") from error
    if not ids or not categories:
        raise UserError(f"{path}: no images or no categories")
    there = {p.name for p in images.iterdir()} if images.is_dir() else set()
    if lost := sorted(f for f in ids.values() if f not in there):
        raise UserError(f"{images / lost[0]}: missing: {path.name} names it ({len(lost)} in all)")
