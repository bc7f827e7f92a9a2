"""Data sets on disk: where they lie, what they hold, how an image is read.

Readers take the layouts as downloaded (ImageNet's class folders, iNaturalist's json, Places365's lists, ADE20K, COCO); the demo's
generated sets have the same layouts and go through the same code. Class names and counts are read from the data, never assumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.randomness import generator
from harness.spec import JobFailed, UserError, suggest
from harness.spec import Protocol as Setting

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
FOLDERS = {
    "imagenet": "imagenet", "ade20k": "ADEChallengeData2016", "coco": "coco", "inat2017": "inat2017", "inat2018": "inat2018", "inat2019": "inat2019",
    "places205": "places205", "places365": "places365",
}



class BadImage(JobFailed):
    """An image file that cannot be read."""


@dataclass(frozen=True)
class ImageList:
    """Images of one split. `files` are relative to `root`; `labels` is int64 or None; `classes` are the names that labels index."""

    root: Path
    files: Sequence[str]
    labels: np.ndarray | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Full path of an image."""
        return self.root / self.files[index]

    def subset(self, indices: Iterable[int]) -> ImageList:
        """The images at these positions, in this order; the classes stay."""
        chosen = list(indices)
        return ImageList(self.root, [self.files[i] for i in chosen], None if self.labels is None else self.labels[chosen], self.classes)

    def split(self, fraction: float, seed: int = 0) -> tuple[ImageList, ImageList]:
        """(rest, held out): a fraction drawn at random, the same for the same files and seed, at least one image each."""
        held = min(len(self) - 1, max(1, round(fraction * len(self))))
        order = generator(seed, "held out", len(self)).permutation(len(self))
        return self.subset(sorted(order[held:].tolist())), self.subset(sorted(order[:held].tolist()))


def load_rgb(path: Path) -> Any:
    """An image file as a PIL RGB image, turned upright by its EXIF orientation; gray, palette and CMYK are converted.

    Raises:
        BadImage: it is missing, truncated or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            upright: Any = ImageOps.exif_transpose(image) if image.getexif() else image
            if upright.mode.startswith("I"):  # 16 bits a channel: PIL would clip at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")
            return upright if upright.mode == "RGB" else upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: cannot be read as an image ({error}): mend or remove it, or add --retry --on-bad-image skip") from error


# --------------------------------------------------------------------------------------------------------------- places


def generated_root(setting: Setting) -> Path:
    """Where a protocol's generated data lies: $HARNESS_DATA, else the user's cache folder, below a folder named after protocol and version."""
    import platformdirs

    base = os.environ.get("HARNESS_DATA") or platformdirs.user_cache_dir("vision-harness")
    return Path(base) / f"{setting.name}-{setting.data_version}"


def folders_below(root: Path) -> dict[str, Path]:
    """Name -> folder of every data set in the layout of one root."""
    return {name: root / folder for name, folder in FOLDERS.items()}


def locate(data: str | None, setting: Setting) -> dict[str, Path]:
    """Name -> folder of every data set that --data, or the protocol, offers.

    Raises:
        UserError: --data is missing, or its TOML is wrong.
    """
    if data is None:
        return folders_below(generated_root(setting)) if setting.generator else {}
    path = Path(data)
    if not path.exists():
        raise UserError(f"--data {data}: no such folder or file: name the folder that holds {', '.join(sorted(set(FOLDERS.values()))[:4])}, ...")
    if path.is_dir():
        return folders_below(path)
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        body = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--data {data}: not a TOML file ({error}): it maps names to folders, as in imagenet = \"/data/imagenet\"") from error
    found = {}
    for name, value in body.items():
        if name not in FOLDERS:
            raise UserError(f"--data {data}: unknown data set {name!r}: {suggest(name, FOLDERS)}")
        if not isinstance(value, str):
            raise UserError(f"--data {data}: {name} must be the path of a folder, in quotes")
        found[name] = (path.parent / value).resolve()
    return found


def folder_of(name: str, folders: Mapping[str, Path]) -> Path:
    """Folder of a data set; a name such as imagefolder:DIR brings its own.

    Raises:
        UserError: none is known.
    """
    _, colon, rest = name.partition(":")
    if colon:
        return Path(rest)
    if name not in folders:
        raise UserError(f"--data: no folder for {name}: give a root that holds {FOLDERS.get(name, name)}, or a TOML with {name} = \"FOLDER\"")
    return folders[name]


def missing(names: Iterable[str], folders: Mapping[str, Path]) -> list[str]:
    """The names whose folder is not there."""
    return [n for n in names if ":" not in n and n in folders and not folders[n].is_dir()]


# -------------------------------------------------------------------------------------------------------------- readers


def images_below(folder: Path) -> list[str]:
    """Relative paths of all image files below a folder, nested, hidden ones left out, sorted."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        base = os.path.relpath(parent, folder)
        found += [f if base == "." else f"{base}/{f}" for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    return sorted(found)


def class_folders(root: Path, split: str) -> ImageList:
    """ImageNet's layout: SPLIT/<class>/*.jpg; a class's index is its place among the sorted folder names of train."""
    train, folder = root / "train", root / split
    for needed in (train, folder):
        if not needed.is_dir():
            raise UserError(f"{needed}: no such folder: expected train/<class>/*.jpg and val/<class>/*.jpg in {root}")
    classes = tuple(sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise UserError(f"{train}: no class folders: expected train/<class>/*.jpg")
    index, files = {c: i for i, c in enumerate(classes)}, images_below(folder)
    unknown = sorted({f.split("/")[0] for f in files} - set(classes))
    if unknown:
        raise UserError(f"{folder}: {unknown[0]!r} is no class of train: {suggest(unknown[0], classes[:20])}")
    if not files:
        raise UserError(f"{folder}: no images: expected {split}/<class>/*.jpg")
    return ImageList(folder, files, np.array([index[f.split("/")[0]] for f in files], dtype=np.int64), classes)


def image_folder(root: Path, split: str) -> ImageList:
    """A user's class folder: train/ and val/ as ImageNet has them, or classes alone, of which a fifth is then held out as val."""
    if (root / "train").is_dir():
        return class_folders(root, split)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder: expected <class>/*.jpg, or train/<class> and val/<class>")
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    files = [f for f in images_below(root) if "/" in f]
    if len(classes) < 2 or len(files) < 2:
        raise UserError(f"{root}: fewer than two class folders with images: expected <class>/*.jpg, or train/<class> and val/<class>")
    index = {c: i for i, c in enumerate(classes)}
    everything = ImageList(root, files, np.array([index[f.split("/")[0]] for f in files], dtype=np.int64), classes)
    return everything.split(0.2)[0 if split == "train" else 1]


def read_json_file(path: Path) -> Any:
    """A label file.

    Raises:
        UserError: missing or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: missing: download it, or give another --data") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): download it again") from error


def inaturalist(root: Path, split: str, year: str) -> ImageList:
    """iNaturalist's json of a split (COCO-like: images, annotations, categories); the split is the json's, not the folder tree's."""
    body = read_json_file(root / f"{split}{year}.json")
    try:
        categories = sorted(body["categories"], key=lambda c: c["id"])
        index = {c["id"]: i for i, c in enumerate(categories)}
        label = {a["image_id"]: a["category_id"] for a in body["annotations"]}
        images = [i for i in body["images"] if i["id"] in label]
    except (KeyError, TypeError) as error:
        raise UserError(f"{root / f'{split}{year}.json'}: not in iNaturalist's layout ({error} is missing)") from error
    if wrong := sorted({label[i["id"]] for i in images} - set(index)):
        raise UserError(f"{root / f'{split}{year}.json'}: label {wrong[0]} is no category: the file has {len(index)} categories")
    labels = np.array([index[label[i["id"]]] for i in images], dtype=np.int64)
    return ImageList(root, [i["file_name"] for i in images], labels, tuple(str(c.get("name", c["id"])) for c in categories))


def places365(root: Path, split: str) -> ImageList:
    """Places365's lists: categories_places365.txt, places365_train_standard.txt, places365_val.txt; the 256-pixel or the large images."""
    listing = root / ("places365_train_standard.txt" if split == "train" else "places365_val.txt")
    try:
        rows = [line.rsplit(" ", 1) for line in listing.read_text().splitlines() if line.strip()]
        names = [line.rsplit(" ", 1) for line in (root / "categories_places365.txt").read_text().splitlines() if line.strip()]
        classes = tuple(name for name, _ in sorted(names, key=lambda n: int(n[1])))
        labels = np.array([int(label) for _, label in rows], dtype=np.int64)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: missing: Places365 needs its category and split lists") from None
    except ValueError as error:
        raise UserError(f"{listing}: not lines of `path label` ({error})") from error
    if len(labels) and (labels.max() >= len(classes) or labels.min() < 0):
        raise UserError(f"{listing}: label {labels.max()} is above the number of classes ({len(classes)} in categories_places365.txt)")
    options = ("data_256_standard", "data_large_standard") if split == "train" else ("val_256", "val_large")
    folder = next((o for o in options if (root / o).is_dir()), None)
    if folder is None:
        raise UserError(f"{root}: no folder {options[0]} or {options[1]}: unpack the images there")
    return ImageList(root / folder, [path.lstrip("/") for path, _ in rows], labels, classes)


def read_images(name: str, split: str, folder: Path) -> ImageList:
    """Images of a split ("train" or "val") of a classification set; "folder" is any nested folder of images, without labels.

    Raises:
        UserError: the folder is missing, empty or of another layout.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: needed for {name}; give its place with --data")
    if name == "folder":
        files = images_below(folder)
        if not files:
            raise UserError(f"{folder}: no images: expected {', '.join(SUFFIXES[:4])}, ... in it or below")
        return ImageList(folder, files, None, ())
    if name == "imagenet":
        return class_folders(folder, split)
    if name == "imagefolder":
        return image_folder(folder, split)
    if name.startswith("inat"):
        return inaturalist(folder, split, name.removeprefix("inat"))
    if name == "places365":
        return places365(folder, split)
    raise UserError(f"{name}: not a set of labelled images: {suggest(name, ['imagenet', 'imagefolder', 'inat2018', 'places365', 'folder'])}")


def ade20k_classes(folder: Path) -> tuple[str, ...]:
    """Class names 1..n of objectInfo150.txt (tab-separated: Idx, Ratio, Train, Val, Stuff, Name)."""
    path = folder / "objectInfo150.txt"
    try:
        rows = [line.split("\t") for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        raise UserError(f"{path}: missing: it is part of the ADEChallengeData2016 archive") from None
    names = tuple(row[-1].strip() for row in rows if row[0].strip().isdigit())
    if not names:
        raise UserError(f"{path}: no rows of Idx, Ratio, Train, Val, Stuff, Name")
    return names


def coco_classes(folder: Path) -> tuple[tuple[int, str], ...]:
    """(category id, name) of COCO's training annotations, by id; ids may have gaps."""
    path = folder / "annotations" / "instances_train2017.json"
    body = read_json_file(path)
    if not isinstance(body, dict):
        raise UserError(f"{path}: not in COCO's layout (a list, expected images, annotations, categories)")
    return tuple(sorted((int(c["id"]), str(c["name"])) for c in body.get("categories", ())))
