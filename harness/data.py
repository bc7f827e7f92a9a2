"""Data sets on disk: where they lie, what a layout is asked for, how an image is read.

Layouts are plugins (entry points of `harness.datasets`; ours are in data_sets/). They take the files as downloaded; the demo's generated
sets have the same layouts and go through the same code. Class names and counts are read from the data, never assumed.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from harness.plugins import importable, load
from harness.randomness import generator
from harness.spec import JobFailed, UserError, suggest
from harness.spec import Protocol as Setting

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


class BadImage(JobFailed):
    """An image file that cannot be read."""


@dataclass(frozen=True)
class ImageList:
    """Images of one split. `files` are relative to `root`; `labels` is int64 or None; `classes` are the names that labels index.

    Where the images are no files of their own, `files` are names only: `pixels` gives an image, uint8 (H, W, 3) or PIL's, by its index, and some by an
    array of them, as an array (n, H, W, 3) does (CIFAR) and `data_sets.shards` too.
    """

    root: Path
    files: Sequence[str]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    pixels: Any = None

    def __post_init__(self) -> None:
        with suppress(UnicodeEncodeError):  # one buffer instead of a million counted strings: loader processes share it, and their memory stays flat
            object.__setattr__(self, "files", np.asarray(self.files, dtype=np.dtypes.StringDType()))

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Full path of an image."""
        return self.root / self.files[index]

    def load(self, index: int) -> Any:
        """An image as PIL RGB; BadImage when it cannot be read."""
        if self.pixels is None:
            return load_rgb(f"{self.root}{os.sep}{self.files[index]}")  # building a Path and opening by it would be a fiftieth of an image's time
        from PIL import Image

        found = self.pixels[index]
        return Image.fromarray(found) if isinstance(found, np.ndarray) else found

    def subset(self, indices: Iterable[int]) -> ImageList:
        """The images at these positions, in this order; the classes stay."""
        chosen = list(indices)
        labels, pixels = (None if a is None else a[chosen] for a in (self.labels, self.pixels))
        return ImageList(self.root, [self.files[i] for i in chosen], labels, self.classes, pixels)

    def split(self, fraction: float, seed: int = 0) -> tuple[ImageList, ImageList]:
        """(rest, held out): a fraction drawn at random, the same for the same files and seed, at least one image each."""
        held = min(len(self) - 1, max(1, round(fraction * len(self))))
        order = generator(seed, "held out", len(self)).permutation(len(self))
        return self.subset(sorted(order[held:].tolist())), self.subset(sorted(order[:held].tolist()))


def load_rgb(path: Path | str, size: tuple[int, int] | None = None, data: bytes | None = None) -> Any:
    """An image file, or its content, as a PIL RGB image, turned upright by its EXIF orientation; gray, palette and CMYK are converted.

    Labels of pixels are made for the upright image or for the stored one (facebookresearch/detectron2#788, #5366): with `size`, the (width, height)
    that they are for, an image that has it as stored only is not turned. detectron2 and mmcv always turn, torchvision and pycocotools never.

    Raises:
        BadImage: it is missing, truncated or no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    from harness.pictures import decode_jpeg

    try:
        if data is None:
            with open(path, "rb", buffering=0) as file:
                data = file.read()
        if (picture := decode_jpeg(data)) is not None:
            return picture
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright: Any = ImageOps.exif_transpose(image) if image.getexif() else image
            if upright.size != size == image.size:
                upright = image
            if upright.mode.startswith("I"):  # 16 bits a channel: PIL would clip at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")
            return upright if upright.mode == "RGB" else upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise BadImage(f"{path}: cannot be read as an image ({reason}): mend or remove it, or add --retry --on-bad-image skip") from error


class Count(NamedTuple):
    """Official number of images and classes of a split. `sure` is False where no primary source was found."""

    images: int
    classes: int
    sure: bool = True


class DataSet(Protocol):
    """A layout on disk, an entry point of `harness.datasets`.

    Attributes:
        folder: its name below --data; None where the user names the place (imagefolder:DIR).
        splits: what `read` takes; ("train", "val") for a set that something can be trained on.
        official: split -> what a complete copy has; empty where nobody says.
        label_files: names of files whose content, and not only their size, is part of the data's fingerprint, besides .json, .txt and .csv.
    Those of dense tasks have `classes(root)` as well.
    """

    folder: ClassVar[str | None]
    splits: ClassVar[tuple[str, ...]]
    official: ClassVar[Mapping[str, Count]]
    label_files: ClassVar[tuple[str, ...]]

    def read(self, split: str, root: Path) -> ImageList:
        """Images of a split. Raises UserError when the folder is empty or of another layout."""
        ...

    def count(self, split: str, root: Path) -> tuple[int, int]:
        """Images and classes of a split, as compared with `official`."""
        ...

    def check(self, root: Path) -> None:
        """What can be found wrong without decoding every image. Raises UserError."""
        ...

    def problems(self, root: Path, step: Callable[[int], None]) -> Iterator[str]:
        """Everything that is wrong, every image decoded; `step` is told of each image looked at."""
        ...


@cache
def data_set(name: str) -> DataSet:
    """The layout behind a name such as imagenet, or imagefolder:DIR.

    Raises:
        UserError: there is none.
    """
    found: DataSet = load("datasets", name.partition(":")[0], "data")()
    return found


@cache
def folder_names() -> Mapping[str, str]:
    """Name -> folder below --data, of all data sets that have a place there."""
    return {name: cls.folder for name, cls in importable("datasets").items() if cls.folder is not None}


def generated_root(setting: Setting) -> Path:
    """Where a protocol's generated data lies: $HARNESS_DATA, else the user's cache folder, below a folder named after protocol and version."""
    import platformdirs

    base = os.environ.get("HARNESS_DATA") or platformdirs.user_cache_dir("vision-harness")
    if Path(base).is_file():
        raise UserError(f"HARNESS_DATA={base}: is a file: name a folder, or unset it")
    return Path(base) / f"{setting.name}-{setting.data_version}"


def folders_below(root: Path) -> dict[str, Path]:
    """Name -> folder of every data set in the layout of one root."""
    return {name: root / folder for name, folder in folder_names().items()}


def locate(data: str | None, setting: Setting) -> dict[str, Path]:
    """Name -> folder of every data set that --data, or the protocol, offers.

    Raises:
        UserError: --data is missing, or its TOML is wrong.
    """
    if data is None:
        return {n: f for n, f in folders_below(generated_root(setting)).items() if n in setting.generates}
    path = Path(data)
    if not path.exists():
        raise UserError(f"--data {data}: no such folder or file: name the folder that holds {', '.join(sorted(folder_names().values())[:4])}, ...")
    if path.is_dir():
        return folders_below(path)
    import tomllib

    try:
        body = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--data {data}: not a TOML file ({error}): it maps names to folders, as in imagenet = \"/data/imagenet\"") from error
    found = {}
    for name, value in body.items():
        if name not in folder_names():
            raise UserError(f"--data {data}: unknown data set {name!r}: {suggest(name, folder_names())}")
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
        raise UserError(f"--data: no folder for {name}: give a root that holds {folder_names().get(name, name)}, or a TOML with {name} = \"FOLDER\"")
    return folders[name]


def missing(names: Iterable[str], folders: Mapping[str, Path]) -> list[str]:
    """The names whose folder is not there."""
    return [n for n in names if ":" not in n and n in folders and not folders[n].is_dir()]


def images_below(folder: Path) -> list[str]:
    """Relative paths of all image files below a folder: those of `files_below` with the suffix of an image."""
    return [f for f in files_below(folder) if f.lower().endswith(SUFFIXES)]


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, nested, links followed once, hidden ones left out, sorted."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        base = os.path.relpath(parent, folder)
        found += [f if base == "." else f"{base}/{f}" for f in files if not f.startswith(".")]
    return sorted(found)


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


def read_images(name: str, split: str, folder: Path) -> ImageList:
    """Images of a split of a data set ("train" or "val"; the sets of corrupted images have others).

    Raises:
        UserError: the folder is missing, empty or of another layout.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: needed for {name}; give its place with --data")
    return data_set(name).read(split, folder)
