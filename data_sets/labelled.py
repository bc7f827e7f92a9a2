"""Labelled images in the layouts as downloaded: ImageNet's class folders, iNaturalist's json, the lists of Places, a user's own folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_sets import shards
from harness.data import SUFFIXES, BadImage, Count, ImageList, folder_names, images_below, read_json_file
from harness.spec import UserError, suggest


class Labelled:
    """What labelled sets have in common: both splits are there, their files too, and no image is in two splits."""

    folder: ClassVar[str | None] = None
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    official: ClassVar[Mapping[str, Count]] = {}
    label_files: ClassVar[tuple[str, ...]] = ()

    def read(self, split: str, root: Path) -> ImageList:
        """Images of a split; a layout's own."""
        raise UserError(f"{root}: {type(self).__name__} is not a set of labelled images: name another one")

    def count(self, split: str, root: Path) -> tuple[int, int]:
        """Images and classes of a split."""
        listed = self.read(split, root)
        return len(listed), len(listed.classes)

    def check(self, root: Path) -> None:
        """Both splits can be listed, and the first, middle and last file of each is there."""
        for split in self.splits:
            listed = self.read(split, root)
            if len(listed) == 0:
                raise UserError(f"{root}: no images in {split}")
            for i in (0, len(listed) // 2, len(listed) - 1):
                if listed.pixels is None and not listed.path(i).is_file():
                    raise UserError(f"{listed.path(i)}: missing: the list of {split} names it")

    def problems(self, root: Path, step: Callable[[int], None]) -> Iterator[str]:
        """Missing and undecodable images, a class without training images, an image in two splits."""
        seen: dict[str, str] = {}
        for split in self.splits:
            images = self.read(split, root)
            for index in range(len(images)):
                step(1)
                if problem := undecodable(images, index):
                    yield problem
            if images.labels is None:
                continue
            counts = np.bincount(images.labels, minlength=len(images.classes))
            if split == "train" and (counts == 0).any():
                yield f"{images.root}: class {images.classes[int(np.argmin(counts))]!r} has no training image"
            paths = [str(images.path(i)) for i in range(len(images))]
            if both := sorted(p for p in paths if p in seen):
                yield f"{both[0]}: is in {seen[both[0]]} and in {split}"
            seen |= dict.fromkeys(paths, split)


def undecodable(images: ImageList, index: int) -> str:
    """What is wrong with an image, "" when it can be read."""
    if images.pixels is None and not images.path(index).is_file():
        return f"{images.path(index)}: missing"
    try:
        images.load(index)
    except BadImage as error:
        return str(error).split(": mend")[0]
    return ""


def labels_of(names: list[str], classes: tuple[str, ...]) -> np.ndarray:
    """Places of names among the classes, int64 (n,)."""
    index = {c: i for i, c in enumerate(classes)}
    return np.array([index[n] for n in names], dtype=np.int64)


def class_names(folder: Path) -> tuple[str, ...]:
    """Sorted names of the folders in a folder, hidden ones left out."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


class Folder(Labelled):
    """Any nested folder of images, without labels (--pretrain-data)."""

    splits = ("train",)

    def read(self, split: str, root: Path) -> ImageList:
        """All images below the folder."""
        files = images_below(root)
        if not files:
            raise UserError(f"{root}: no images: expected {', '.join(SUFFIXES[:4])}, ... in it or below")
        return ImageList(root, files, None, ())


class ImageNet(Labelled):
    """ImageNet-1K: SPLIT/<class>/*.JPEG; a class's index is its place among the sorted folder names of train. Or shards: see `data_sets.shards`."""

    folder = "imagenet"
    official: ClassVar[Mapping[str, Count]] = {"train": Count(1_281_167, 1000), "val": Count(50_000, 1000)}

    def read(self, split: str, root: Path) -> ImageList:
        """Images of train or val, in class folders or in tar shards; the flat validation archive is refused."""
        train, folder = root / "train", root / split
        if not train.is_dir() and shards.tars(root, "train"):
            return shards.read(split, root)
        for needed in (train, folder):
            if not needed.is_dir():
                raise UserError(f"{needed}: no such folder: expected train/<class>/*.jpg and val/<class>/*.jpg, or train-*.tar and val-*.tar, in {root}")
        classes = class_names(train)
        if not classes:
            raise UserError(f"{train}: no class folders: expected train/<class>/*.jpg")
        files = images_below(folder)
        if loose := [f for f in files if "/" not in f]:
            raise UserError(f"{folder / loose[0]}: is in no class folder and {loose[0]!r} is no class of train: sort it with `harness data prepare imagenet`")
        if unknown := sorted({f.split("/")[0] for f in files} - set(classes)):
            raise UserError(f"{folder}: {unknown[0]!r} is no class of train: {suggest(unknown[0], classes[:20])}")
        if not files:
            raise UserError(f"{folder}: no images: expected {split}/<class>/*.jpg")
        return ImageList(folder, files, labels_of([f.split("/")[0] for f in files], classes), classes)


class ImageFolder(ImageNet):
    """A user's class folder: train and val as ImageNet has them, or classes alone, of which a fifth is then held out as val."""

    folder = None
    official: ClassVar[Mapping[str, Count]] = {}

    def read(self, split: str, root: Path) -> ImageList:
        """Images of train or val."""
        if (root / "train").is_dir() or shards.tars(root, "train"):
            return super().read(split, root)
        if sets := sorted(name for name in folder_names().values() if (root / name).is_dir()):  # they would be learned to be told apart
            raise UserError(f"{root}: holds data sets ({', '.join(sets)}), no classes: --data {root} reads them; imagefolder: wants a folder of classes")
        classes = class_names(root)
        files = [f for f in images_below(root) if "/" in f]
        if len(classes) < 2 or len(files) < 2:
            raise UserError(f"{root}: fewer than two class folders with images: expected <class>/*.jpg, or train/<class> and val/<class>")
        everything = ImageList(root, files, labels_of([f.split("/")[0] for f in files], classes), classes)
        return everything.split(0.2)[0 if split == "train" else 1]


class INaturalist(Labelled):
    """iNaturalist's json of a split (COCO-like: images, annotations, categories).

    The split is the json's: the archive's tree holds train and val together. Paths in the json begin with the archive's folder
    (train_val2018/...; train_val_images/ in 2017); a tree that torchvision renamed to the bare year is found too.
    """

    year: ClassVar[str]

    def read(self, split: str, root: Path) -> ImageList:
        """Images of train or val; classes are the categories by id."""
        path = root / f"{split}{self.year}.json"
        body = read_json_file(path)
        try:
            categories = sorted(body["categories"], key=lambda c: c["id"])
            index = {c["id"]: i for i, c in enumerate(categories)}
            label = {a["image_id"]: a["category_id"] for a in body["annotations"]}
            images = [i for i in body["images"] if i["id"] in label]
            files = [str(i["file_name"]) for i in images]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: not in iNaturalist's layout ({error} is missing)") from error
        if wrong := sorted({label[i["id"]] for i in images} - set(index)):
            raise UserError(f"{path}: label {wrong[0]} is no category: the file has {len(index)} categories")
        top = files[0].split("/")[0] if files else ""
        if (root / self.year).is_dir() and not (root / top).is_dir():
            files = [f"{self.year}/{f.partition('/')[2]}" for f in files]
        labels = np.array([index[label[i["id"]]] for i in images], dtype=np.int64)
        return ImageList(root, files, labels, tuple(str(c.get("name", c["id"])) for c in categories))


class INat2017(INaturalist):
    """iNaturalist 2017."""

    folder, year = "inat2017", "2017"
    official: ClassVar[Mapping[str, Count]] = {"train": Count(579_184, 5089), "val": Count(95_986, 5089)}


class INat2018(INaturalist):
    """iNaturalist 2018."""

    folder, year = "inat2018", "2018"
    official: ClassVar[Mapping[str, Count]] = {"train": Count(437_513, 8142), "val": Count(24_426, 8142)}


class INat2019(INaturalist):
    """iNaturalist 2019."""

    folder, year = "inat2019", "2019"
    official: ClassVar[Mapping[str, Count]] = {"train": Count(265_213, 1010), "val": Count(3030, 1010)}


def listing(path: Path) -> list[tuple[str, int]]:
    """(path, label) of the lines of a list; the two are separated by the last space of a line.

    Raises:
        UserError: the file is missing or has other lines.
    """
    try:
        rows = [line.rsplit(" ", 1) for line in path.read_text().splitlines() if line.strip()]
        return [(name, int(label)) for name, label in rows]
    except OSError:
        raise UserError(f"{path}: missing: download the lists of the set, or give another --data") from None
    except ValueError as error:
        raise UserError(f"{path}: not lines of `path label` separated by a space ({error})") from error


def place_of(root: Path, options: tuple[str, ...]) -> Path:
    """The first of several folders that is there. Raises UserError."""
    found = next((root / o for o in options if (root / o).is_dir()), None)
    if found is None:
        raise UserError(f"{root}: no folder {' or '.join(options)}: unpack the images there")
    return found


def within(rows: list[tuple[str, int]], classes: int, path: Path) -> np.ndarray:
    """Labels of a list, int64 (n,). Raises UserError when one is no class."""
    labels = np.array([label for _, label in rows], dtype=np.int64)
    if len(labels) and (labels.max() >= classes or labels.min() < 0):
        wrong = labels.max() if labels.max() >= classes else labels.min()
        raise UserError(f"{path}: label {wrong} is above the number of classes ({classes}) or below 0")
    return labels


class Places365(Labelled):
    """Places365-Standard: categories_places365.txt, places365_train_standard.txt, places365_val.txt; the 256-pixel or the large images."""

    folder = "places365"
    official: ClassVar[Mapping[str, Count]] = {"train": Count(1_803_460, 365), "val": Count(36_500, 365)}

    def read(self, split: str, root: Path) -> ImageList:
        """Images of train or val; paths of train begin with a slash."""
        path = root / ("places365_train_standard.txt" if split == "train" else "places365_val.txt")
        rows = listing(path)
        classes = tuple(name for name, _ in sorted(listing(root / "categories_places365.txt"), key=lambda n: n[1]))
        labels = within(rows, len(classes), path)
        images = place_of(root, ("data_256_standard", "data_large_standard") if split == "train" else ("val_256", "val_large"))
        return ImageList(images, [name.lstrip("/") for name, _ in rows], labels, classes)


class Places205(Labelled):
    """Places205: trainvalsplit_places205/{train,val}_places205.csv, whose lines separate path and label by a space, and the 256-pixel images."""

    folder = "places205"
    official: ClassVar[Mapping[str, Count]] = {"train": Count(2_448_873, 205), "val": Count(20_500, 205)}

    def read(self, split: str, root: Path) -> ImageList:
        """Images of train or val; a class is called as the folder of its training images."""
        lists = place_of(root, ("trainvalsplit_places205", "."))
        train = listing(lists / "train_places205.csv")
        names = {label: name.lstrip("/").rsplit("/", 1)[0] for name, label in reversed(train)}
        if sorted(names) != list(range(len(names))):
            raise UserError(f"{lists / 'train_places205.csv'}: labels are not 0 to {len(names) - 1}: a class without a training image?")
        path = lists / f"{split}_places205.csv"
        rows = train if split == "train" else listing(path)
        labels = within(rows, len(names), path)
        images = place_of(root, ("data/vision/torralba/deeplearning/images256", "images256"))
        return ImageList(images, [name.lstrip("/") for name, _ in rows], labels, tuple(names[i] for i in range(len(names))))
