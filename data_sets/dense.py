"""ADE20K and COCO 2017 as downloaded: what is wrong with a copy, quickly before a run and thoroughly in `data verify`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_sets.labelled import Labelled
from harness.data import BadImage, Count, load_rgb, read_json_file
from harness.spec import UserError

LABELS_LOOKED_AT = 1000  # annotation pictures that a quick check opens
IGNORED = 255  # what label 0 becomes when all labels are shifted by one for training
ENOUGH = 100  # pictures in which each class of a set should occur
ONE_CHANNEL = ("1", "L", "P", "I", "I;16")
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
THIN = 100  # sides in a ratio above which resizing leaves nothing of the shorter one: large-scale jitter goes down to a tenth of the input
FAR = 100  # image sides beyond which a coordinate is none: pycocotools walks along every outline pixel by pixel


class ADE20K(Labelled):
    """ADEChallengeData2016: images/ and annotations/ with training and validation, objectInfo150.txt."""

    folder = "ADEChallengeData2016"
    splits = ("training", "validation")
    official: ClassVar[Mapping[str, Count]] = {"training": Count(20_210, 150), "validation": Count(2000, 150)}

    def count(self, split: str, root: Path) -> tuple[int, int]:
        """Images and classes of a split."""
        return len(list((root / "images" / split).glob("*.jpg"))), len(self.classes(root))

    def classes(self, root: Path) -> tuple[str, ...]:
        """Class names 1..n of objectInfo150.txt (tab-separated: Idx, Ratio, Train, Val, Stuff, Name)."""
        path = root / "objectInfo150.txt"
        try:
            rows = [line.split("\t") for line in path.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            raise UserError(f"{path}: missing: it is part of the ADEChallengeData2016 archive") from None
        names = tuple(row[-1].strip() for row in rows if row[0].strip().isdigit())
        if not names:
            raise UserError(f"{path}: no rows of Idx, Ratio, Train, Val, Stuff, Name")
        return names

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
                check_labels(labels / f"{stem}.png", classes, images / f"{stem}.jpg")

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
                    with Image.open(path) as label:
                        mode, shape, values = label.mode, label.size, np.unique(np.asarray(label))
                    size = load_rgb(image, shape).size
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

    def classes(self, root: Path) -> tuple[tuple[int, str], ...]:
        """(category id, name) of the training annotations, by id; ids may have gaps."""
        path = root / "annotations" / "instances_train2017.json"
        body = read_json_file(path)
        if not isinstance(body, dict):
            raise UserError(f"{path}: not in COCO's layout (a list, expected images, annotations, categories)")
        return tuple(sorted((int(c["id"]), str(c["name"])) for c in body.get("categories", ())))

    def check(self, root: Path) -> None:
        """Both annotation files: their references, their instances, the image files that they name; and the categories are the same."""
        named = []
        for split in self.splits:
            path = root / "annotations" / f"instances_{split}.json"
            body = read_json_file(path)
            check_coco(path, body, root / split, scored=split == "val2017")
            named.append({(c["id"], c["name"]) for c in body["categories"]})
        if other := sorted(named[1] - named[0]):
            raise UserError(f"{path}: category {other[0][0]} {other[0][1]!r} is none of instances_train2017.json: both files must list the same categories")

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
                    size = load_rgb(file, (image["width"], image["height"])).size
                except BadImage as error:
                    yield str(error).split(": mend")[0]
                    continue
                if size != (image["width"], image["height"]):
                    yield f"{file}: {size[0]}x{size[1]} pixels, {path.name} says {image['width']}x{image['height']}"
            for a in body["annotations"]:
                name = f"{path}: annotation {a.get('id')}"
                if refused := unusable(a, images, categories, scored=split == "val2017"):
                    yield f"{name} {refused}"
                    continue
                image, (x, y, w, h) = images[a["image_id"]], a["bbox"]
                if w <= 0 or h <= 0:
                    yield f"{name} has a box without area"
                elif x < -1 or y < -1 or x + w > image["width"] + 1 or y + h > image["height"] + 1:
                    yield f"{name} has a box outside its image"
                if flat(a.get("segmentation")):
                    yield f"{name} has a polygon with fewer than three corners"


def number_of_classes(root: Path) -> int:
    """Classes of a set in ADE20K's layout. Raises UserError for more than the shifted labels can number."""
    classes = len(ADE20K().classes(root))
    if classes > IGNORED:
        raise UserError(f"{root / 'objectInfo150.txt'}: {classes} classes: at most {IGNORED}, shifted by one the next would be {IGNORED}, which is ignored")
    return classes


def wrong_labels(mode: str, values: np.ndarray, classes: int) -> str | None:
    """What is wrong with the labels that occur in an annotation picture of ADE20K, before and after the shift by one, or None."""
    if mode not in ONE_CHANNEL:
        return f"mode {mode}, expected one channel of class numbers"
    if values.min() < 0:
        return f"label {values.min()} is negative"
    if values.max() > classes:
        shifted = ": shifted by one already?" if values.max() == IGNORED and classes < IGNORED and (values[values < IGNORED] < classes).all() else ""
        return f"label {values.max()} is above the number of classes ({classes} in objectInfo150.txt){shifted}"
    return None


def check_labels(path: Path, classes: int, image: Path) -> None:
    """One annotation picture of ADE20K: a single channel of numbers up to the number of classes, of its image's size. Raises UserError."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as label:
            mode, shape, values = label.mode, label.size, np.unique(np.asarray(label))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}): mend or remove it with its image") from error
    if (wrong := wrong_labels(mode, values, classes)) is not None:
        raise UserError(f"{path}: {wrong}")
    try:
        with Image.open(image) as picture:
            sizes = [picture.size] + [picture.size[::-1]] * (picture.getexif().get(ExifTags.Base.Orientation) in TURNED)
    except (OSError, ValueError, SyntaxError):
        return  # for --on-bad-image to decide
    if shape not in sizes:
        raise UserError(f"{path}: {shape[0]}x{shape[1]} pixels, its image has {sizes[0][0]}x{sizes[0][1]}: mend or remove both")


def flat(mask: Any) -> bool:
    """Whether an outline [x1, y1, x2, y2, ...] of a mask has fewer than three corners, or half a corner."""
    return isinstance(mask, list) and any(len(outline) < 6 or len(outline) % 2 for outline in mask)


def run_lengths(counts: str) -> list[int]:
    """Run lengths of a mask as COCO compresses them: digits of five bits, the lowest first, a sixth bit where more follow, a sign in the last; from the fourth
    run on the difference to the one two before. pycocotools reads what is cut off, or does not fill the mask, without a word or with an error at the end.

    Raises:
        TypeError: no such text.
    """
    runs: list[int] = []
    value = shift = 0
    for digit in (ord(letter) - 48 for letter in counts):
        if not 0 <= digit < 64:
            raise TypeError(f"{counts!r} has a letter that is none of 0 to o")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            runs.append(value - ((digit & 16) << (shift - 4)) + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise TypeError(f"{counts!r} ends within a number")
    return runs


def unusable(a: Mapping[str, Any], images: Mapping[Any, Any], categories: set[Any], scored: bool) -> str:
    """What makes an annotation of COCO unusable, "" when nothing does: wrong references, numbers that are none, a mask that is not its image's.

    `scored`: it is also read by COCO's own code at the end, after the training: that wants an area, iscrowd, an id above 0 (0 means "no match" there)
    and three corners, and would stop at, or misread, anything else. In training such an instance is left out.
    """
    if a["image_id"] not in images:
        return f"names image {a['image_id']}, which the file does not have"
    if a["category_id"] not in categories:
        return f"names category {a['category_id']}, which the file does not have"
    image, mask = images[a["image_id"]], a.get("segmentation")
    width, height = image["width"], image["height"]
    try:
        if len(a["bbox"]) != 4 or not all(map(math.isfinite, a["bbox"])):
            return "has a box that is not four numbers"
        if isinstance(mask, dict):
            if list(mask["size"]) != [height, width]:
                return f"has a mask of {mask['size'][1]}x{mask['size'][0]} pixels, its image has {width}x{height}"
            runs = mask["counts"] if isinstance(mask["counts"], list) else run_lengths(mask["counts"])
            if sum(runs) != height * width or min(runs) < 0:
                return "has a mask whose runs do not fill its image"
        for outline in mask if isinstance(mask, list) else ():
            if not all(map(math.isfinite, outline)) or (outline and max(max(outline), -min(outline)) > FAR * max(width, height)):
                return "has a polygon with corners that are nowhere"
    except (TypeError, KeyError):
        return "has a box or a mask that is not in COCO's layout"
    if a.get("iscrowd", 0) not in (0, 1):
        return f"has iscrowd {a['iscrowd']!r}, neither 0 nor 1"
    if not scored:
        return ""
    if isinstance(a["id"], bool) or not isinstance(a["id"], int) or a["id"] < 1:
        return "has no id above 0: number annotations from 1"
    if lacking := [key for key in ("area", "iscrowd", "segmentation") if key not in a]:
        return f"has no {lacking[0]}"
    if isinstance(a["area"], bool) or not isinstance(a["area"], int | float):
        return f"has area {a['area']!r}, which is no number"
    return "has a polygon with fewer than three corners" if not mask or flat(mask) else ""


def check_coco(path: Path, body: Any, images: Path, scored: bool) -> None:
    """References and instances of a COCO annotation file, and the image files that it names. Raises UserError for the first that is wrong."""
    try:
        ids, categories = {i["id"]: i for i in body["images"]}, {c["id"] for c in body["categories"]}
        files = [i["file_name"] for i in ids.values() if all(isinstance(i[side], int) and i[side] > 0 for side in ("width", "height"))]
        for a in body["annotations"]:
            if refused := unusable(a, ids, categories, scored):
                raise UserError(f"{path}: annotation {a.get('id')} {refused}: mend or remove it")
        if scored and len({a["id"] for a in body["annotations"]}) != len(body["annotations"]):
            raise UserError(f"{path}: two annotations have the same id: number them from 1")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not in COCO's layout ({error} is missing)") from error
    if not ids or not categories:
        raise UserError(f"{path}: no images or no categories")
    if odd := [number for number in (*ids, *categories) if not isinstance(number, int)]:
        raise UserError(f"{path}: the id {odd[0]!r} is no whole number: number images and categories")
    if len(files) != len(body["images"]):
        raise UserError(f"{path}: two images have the same id, or one has no width and height in whole pixels")
    if thin := [i for i in ids.values() if max(i["width"], i["height"]) > THIN * min(i["width"], i["height"])]:
        raise UserError(f"{path}: {thin[0]['file_name']} is {thin[0]['width']}x{thin[0]['height']} pixels, too thin to be resized: leave it out")
    there = {p.name for p in images.iterdir()} if images.is_dir() else set()
    if lost := sorted(f for f in files if f not in there):
        raise UserError(f"{images / lost[0]}: missing: {path.name} names it ({len(lost)} in all)")
