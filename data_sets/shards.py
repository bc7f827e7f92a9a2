"""Images in tar shards (webdataset's format): train-000000.tar, ... and val-*.tar in one folder, read at random places and so in any order.

A member KEY.jpg is an image; its class is the number in the member KEY.cls, or else the folder that it lies in (CLASS/NAME.jpg). Names of the classes are
the lines of classes.txt, or else the sorted folders of train. Images count in the order of their names, as in class folders: the same images with the
same labels make the same samples. Where each image begins is looked up once and kept beside the shards (.train.index.npz), or in the user's cache
folder where that cannot be written; an index that is older than a shard is made anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from harness.checkpoint import write_atomically
from harness.data import SUFFIXES, BadImage, ImageList, load_rgb
from harness.spec import UserError

OPEN = 256  # shards that a process keeps open
NONE = -1  # label of an image without KEY.cls


def tars(root: Path, split: str) -> list[Path]:
    """The shards of a split, sorted: its name begins a word of theirs, so that neither trainval-0.tar nor carnival-train-0.tar is one of val."""
    return sorted(p for p in root.glob(f"*{split}*-[0-9]*.tar") if re.search(rf"(?<![A-Za-z]){split}", p.name))


class Shards:
    """Images by index: `offset` and `size` in bytes (n,) within the shards `paths[which]`. An array of indices gives those images."""

    def __init__(self, paths: list[Path], names: Any, which: np.ndarray, offset: np.ndarray, size: np.ndarray) -> None:
        self.paths, self.names, self.which, self.offset, self.size = paths, names, which, offset, size
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, index: int | Iterable[int]) -> Any:
        if not isinstance(index, (int, np.integer)):
            chosen = np.asarray(list(index), dtype=np.int64)
            return Shards(self.paths, self.names[chosen], self.which[chosen], self.offset[chosen], self.size[chosen])
        path = self.paths[self.which[index]] / str(self.names[index])
        try:
            data = os.pread(self._shard(int(self.which[index])), int(self.size[index]), int(self.offset[index]))  # moves nothing that a forked process shares
        except OSError as error:
            raise BadImage(f"{self.paths[self.which[index]]}: cannot be read ({error.strerror}): put the shard back") from error
        return load_rgb(path, data=data)

    def _shard(self, which: int) -> int:
        if which not in self._open:
            if len(self._open) >= OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[which] = os.open(self.paths[which], os.O_RDONLY)
        return self._open[which]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def read(split: str, root: Path) -> ImageList:
    """Images of a split.

    Raises:
        UserError: a shard is cut or no tar, holds no images, or an image has no label or one that is no class.
    """
    names, label, which, offset, size = index(split, root)
    classes = class_names(root, *((names, label) if split == "train" else index("train", root)[:2]))
    if (label == NONE).any():
        place = {name: i for i, name in enumerate(classes)}
        of_folder = np.array([place.get(str(name).rpartition("/")[0], NONE) for name in names], dtype=np.int64)
        label = np.where(label == NONE, of_folder, label)
    if (wrong := np.flatnonzero((label < 0) | (label >= len(classes)))).size:
        i = int(wrong[0])
        what = f"label {label[i]}" if label[i] != NONE else "no label: neither a .cls beside it nor the folder of a class"
        raise UserError(f"{tars(root, split)[which[i]]}: {names[i]} has {what}; there are {len(classes)} classes (classes.txt, or the folders of train)")
    return ImageList(root / split, names, label, classes, Shards(tars(root, split), names, which, offset, size))


def class_names(root: Path, names: Any, label: np.ndarray) -> tuple[str, ...]:
    """Lines of classes.txt; without it the folders of the training images, or the numbers where all have one."""
    path = root / "classes.txt"
    if path.is_file():
        found = tuple(line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip())
        if len(set(found)) != len(found) or not found:
            raise UserError(f"{path}: {'is empty' if not found else 'names a class twice'}: expected the name of one class in each line")
        return found
    if (label != NONE).all():
        return tuple(str(i) for i in range(int(label.max()) + 1))
    return tuple(sorted({str(name).rpartition("/")[0] for name in names} - {""}))


def index(split: str, root: Path) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(names, label, which shard, offset, size) of the images of a split by name, from the index file if it fits the shards."""
    found = tars(root, split)
    if not found:
        raise UserError(f"{root}: no shards of {split}: expected {split}-000000.tar, ...")
    stamp = "\n".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in found)
    cache = Path(platformdirs.user_cache_dir("vision-harness")) / "shards"
    places = [root / f".{split}.index.npz", cache / f"{hashlib.sha256(f'{root.resolve()} {split}'.encode()).hexdigest()[:24]}.npz"]
    for place in places:
        try:
            with open(place, "rb") as stream, np.load(stream) as kept:
                if str(kept["stamp"]) == stamp:
                    names = kept["names"].tobytes().decode().split("\0")
                    return np.array(names, dtype=np.dtypes.StringDType()), kept["label"], kept["which"], kept["offset"], kept["size"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    print(f"{root}: looking up the images in {len(found)} shards of {split}, once", file=sys.stderr)
    rows = sorted(row for number, path in enumerate(found) for row in members(path, number, split))
    if not rows:
        raise UserError(f"{found[0]}: no images in the shards of {split}: expected members KEY.jpg and KEY.cls")
    if twice := next((b for a, b in pairwise(rows) if a[0] == b[0]), None):
        raise UserError(f"{found[twice[2]]}: {twice[0]} is in the shards twice: give each image a name of its own")
    columns = list(zip(*rows, strict=True))
    label, which, offset, size = (np.array(column, dtype=np.int64) for column in columns[1:])
    text = np.frombuffer("\0".join(columns[0]).encode(), dtype=np.uint8)
    for place in places:
        with suppress(OSError):
            write_atomically(place, lambda s: np.savez(s, stamp=np.array(stamp), names=text, label=label, which=which, offset=offset, size=size))
            break
    return np.array(columns[0], dtype=np.dtypes.StringDType()), label, which, offset, size


def members(path: Path, number: int, split: str) -> Iterable[tuple[str, int, int, int, int]]:
    """(name, label, number, offset, size) of the images of a shard. Raises UserError when it is cut or no tar, or two images are of one sample."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    doubled = ""
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                name = member.name.encode("utf8", "replace").decode().removeprefix("./").removeprefix(f"{split}/")
                folder, _, base = name.rpartition("/")
                key, _, kind = base.partition(".")
                if not member.isfile() or base.startswith("."):
                    continue
                if member.offset_data + member.size > path.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                if f".{kind.rpartition('.')[2].lower()}" in SUFFIXES:
                    doubled = doubled or (f"{images[f'{folder}/{key}'][0]} and {name}" if f"{folder}/{key}" in images else "")
                    images[f"{folder}/{key}"] = (name, member.offset_data, member.size)
                elif kind == "cls":
                    with open(path, "rb") as stream:
                        stream.seek(member.offset_data)
                        labels[f"{folder}/{key}"] = int(stream.read(member.size))
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a whole tar file ({error}): copy or make the shard again") from error
    except ValueError as error:
        raise UserError(f"{path}: {name} is no number ({error}): a .cls holds the number of a class") from error
    if doubled:  # the name of a sample ends at the first dot: of two images one would be lost
        raise UserError(f"{path}: {doubled} are two images of one sample, which is named by what stands before the first dot: rename one, or leave it out")
    return [(name, labels.get(key, NONE), number, offset, size) for key, (name, offset, size) in images.items()]
