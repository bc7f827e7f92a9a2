"""ImageNet-A, -R, -Sketch and -C: test images of ImageNet's classes that nothing is trained on. Their folders are named by WordNet id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from data_sets.labelled import Labelled, class_names, labels_of
from harness.data import Count, ImageList, images_below
from harness.spec import UserError

CORRUPTIONS = (  # in the order of AlexNet's errors; the four extra ones of the archive are no part of mCE
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog",
    "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)


def read_classes(folder: Path) -> ImageList:
    """<class>/*.jpg; labels index the sorted names of the class folders that are there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected {folder.name}/<class>/*.jpg")
    classes = class_names(folder)
    files = [f for f in images_below(folder) if "/" in f]
    if not files:
        raise UserError(f"{folder}: no images: expected <class>/*.jpg in it")
    return ImageList(folder, files, labels_of([f.split("/")[0] for f in files], classes), classes)


class ImageNetA(Labelled):
    """ImageNet-A: imagenet-a/<class>/, 200 classes."""

    folder = "imagenet-a"
    splits = ("val",)
    official: ClassVar[Mapping[str, Count]] = {"val": Count(7500, 200, sure=False)}

    def read(self, split: str, root: Path) -> ImageList:
        """All images."""
        return read_classes(root)


class ImageNetR(ImageNetA):
    """ImageNet-R: imagenet-r/<class>/, 200 classes."""

    folder = "imagenet-r"
    official: ClassVar[Mapping[str, Count]] = {"val": Count(30_000, 200)}


class ImageNetSketch(ImageNetA):
    """ImageNet-Sketch: the archive's folder sketch/<class>/ in its folder, or the classes at once."""

    folder = "imagenet-sketch"
    official: ClassVar[Mapping[str, Count]] = {"val": Count(50_889, 1000, sure=False)}

    def read(self, split: str, root: Path) -> ImageList:
        """All images."""
        return read_classes(root / "sketch" if (root / "sketch").is_dir() else root)


class ImageNetC(Labelled):
    """ImageNet-C: <corruption>/<severity 1 to 5>/<class>/; a split is "corruption/severity"."""

    folder = "imagenet-c"
    splits = tuple(f"{c}/{s}" for c in CORRUPTIONS for s in range(1, 6))
    official: ClassVar[Mapping[str, Count]] = {f"{c}/{s}": Count(50_000, 1000) for c in CORRUPTIONS for s in range(1, 6)}

    def read(self, split: str, root: Path) -> ImageList:
        """The images of one corruption at one severity."""
        return read_classes(root / split)

    def check(self, root: Path) -> None:
        """All 75 folders are there and have the same classes; 3.75 million images are not listed for it."""
        known: tuple[str, ...] = ()
        for split in self.splits:
            if not (root / split).is_dir():
                raise UserError(f"{root / split}: no such folder: ImageNet-C needs 15 corruptions at severities 1 to 5: unpack noise, blur, weather, digital")
            classes = class_names(root / split)
            if not classes or (known and classes != known):
                raise UserError(f"{root / split}: {'other classes than ' + self.splits[0] if classes else 'no class folders'}: unpack the archive again")
            known = classes
