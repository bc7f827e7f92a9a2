"""Is a data set what its layout says, and is it the same as before: quick checks before anything is launched, and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from harness.data import ade20k_classes, read_images, read_json_file
from harness.spec import UserError

LABEL_FILES = (".json", ".txt", ".csv", ".toml")
MANY_FILES = 50_000  # from here on a fingerprint is cached
LABELS_LOOKED_AT = 1000  # annotation pictures that a quick check opens


def check_layout(name: str, folder: Path) -> None:
    """What can be found wrong with a data set without decoding it.

    Raises:
        UserError: missing, empty or of another layout; labels or references that do not fit.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: needed for {name}; give its place with --data")
    if name == "ade20k":
        classes = len(ade20k_classes(folder))
        for split in ("training", "validation"):
            images, labels = folder / "images" / split, folder / "annotations" / split
            have = {p.stem for p in images.glob("*.jpg")}
            if not have:
                raise UserError(f"{images}: no images: expected the layout of ADEChallengeData2016 (images/{split}/*.jpg)")
            if without := sorted(have - {p.stem for p in labels.glob("*.png")}):
                raise UserError(f"{images / without[0]}.jpg: has no annotation {labels / without[0]}.png")
            stems = sorted(have)
            for stem in stems[:: max(1, len(stems) // LABELS_LOOKED_AT)]:
                check_labels(labels / f"{stem}.png", classes)
    elif name == "coco":
        for split in ("train2017", "val2017"):
            path = folder / "annotations" / f"instances_{split}.json"
            check_coco(path, read_json_file(path), folder / split)
    elif name == "folder":
        read_images(name, "train", folder)
    else:
        for split in ("train", "val"):
            listed = read_images(name, split, folder)
            if len(listed) == 0:
                raise UserError(f"{folder}: no images in {split}")
            for i in (0, len(listed) // 2, len(listed) - 1):
                if not listed.path(i).is_file():
                    raise UserError(f"{listed.path(i)}: missing: {name}'s list of {split} names it")


def check_labels(path: Path, classes: int) -> None:
    """One annotation picture of ADE20K: a single channel of numbers up to the number of classes. Raises UserError."""
    from PIL import Image

    try:
        with Image.open(path) as label:
            mode, highest = label.mode, int(np.asarray(label).max())
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}): mend or remove it with its image") from error
    if mode not in ("L", "P", "I", "I;16"):
        raise UserError(f"{path}: mode {mode}, expected one channel of class numbers")
    if highest > classes:
        raise UserError(f"{path}: label {highest} is above the number of classes ({classes} in objectInfo150.txt)")


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



def fingerprint(name: str, folder: Path) -> str:
    """sha256 over the sorted relative paths and sizes of a data set and the contents of its label files, 16 hex digits.

    The listing of a large set is cached in the user's cache folder under its path and the times of its folders.
    """
    entries, label_files = [], []
    stamp = _stamp(folder)
    import platformdirs

    cache = Path(platformdirs.user_cache_dir("vision-harness")) / "fingerprints" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(cache.read_text())
        if known["stamp"] == stamp and known["files"] >= MANY_FILES:
            return str(known["fingerprint"])
    except (OSError, ValueError, KeyError):
        pass
    stack = [str(folder)]
    while stack:
        with os.scandir(stack.pop()) as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    stack.append(entry.path)
                    continue
                relative = os.path.relpath(entry.path, folder)
                if entry.name == "complete.json":
                    continue  # bookkeeping of the generator, with a date in it
                entries.append(f"{relative}\0{entry.stat().st_size}")
                if entry.name.endswith(LABEL_FILES):
                    label_files.append(relative)
    total = hashlib.sha256("\n".join(sorted(entries)).encode())
    for relative in sorted(label_files):
        total.update((folder / relative).read_bytes())
    result = total.hexdigest()[:16]
    if len(entries) >= MANY_FILES:
        from harness.checkpoint import write_atomically

        body = json.dumps({"stamp": stamp, "files": len(entries), "fingerprint": result}).encode()
        write_atomically(cache, lambda stream: stream.write(body))
    return result


def _stamp(folder: Path) -> str:
    """Times of all folders (they change when a file is added or removed) and sizes and times of the label files; no image is looked at."""
    lines = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        lines.append(f"{parent} {Path(parent).stat().st_mtime_ns}")
        for file in sorted(f for f in files if f.endswith(LABEL_FILES)):
            found = Path(parent, file).stat()
            lines.append(f"{file} {found.st_size} {found.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
