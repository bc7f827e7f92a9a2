"""`harness data prepare NAME --data DIR`: from archives as downloaded to the layout, whole or not at all."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data_sets.labelled import class_names
from harness.data import folder_names, images_below
from harness.layout import check_layout
from harness.spec import UserError, suggest

# data set -> what is needed: the names under which an archive is found (the first that is there is taken)
ARCHIVES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "cifar100": (("cifar-100-python.tar.gz",),),
    "inat2017": (("train_val_images.tar.gz",), ("train_val2017.zip", "train2017.zip", "train2017.json"), ("val2017.zip", "val2017.json", "train_val2017.zip")),
    **{f"inat{y}": ((f"train_val{y}.tar.gz",), *((f"{s}{y}.json.tar.gz", f"{s}{y}.json.gz", f"{s}{y}.json") for s in ("train", "val"))) for y in (2018, 2019)},
    "places205": (("imagesPlaces205_resize.tar.gz",), ("trainvalsplit_places205.tar.gz",)),
    "places365": (
        ("train_256_places365standard.tar", "train_large_places365standard.tar"), ("val_256.tar", "val_large.tar"), ("filelist_places365-standard.tar",),
    ),
    "imagenet-a": (("imagenet-a.tar",),),
    "imagenet-r": (("imagenet-r.tar",),),
    "imagenet-c": (("noise.tar",), ("blur.tar",), ("weather.tar",), ("digital.tar",)),
    "imagenet-sketch": (("ImageNet-Sketch.zip",),),
    "ade20k": (("ADEChallengeData2016.zip",),),
    "coco": (("train2017.zip",), ("val2017.zip",), ("annotations_trainval2017.zip",)),
}
VALIDATION_LISTS = ("ILSVRC2012_devkit_t12.tar.gz", "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "val.txt")


def prepare(name: str, archives: Path, folder: Path, labels: Path | None = None) -> str:
    """Make a data set's folder from the archives in a folder; what was done, as a line.

    Args:
        labels: for ImageNet, the list that says which class each validation image has; else one of VALIDATION_LISTS beside the archives.

    Raises:
        UserError: an archive is missing or damaged, the folder is there already, or what came out is not the layout.
    """
    if name == "imagenet" and (folder / "val").is_dir() and (flat := [f for f in images_below(folder / "val") if "/" not in f]):
        classes = classes_of(flat, class_names(folder / "train") if (folder / "train").is_dir() else (), archives, labels)
        with whole(folder / "val") as made:
            for file, cls in classes.items():
                move(folder / "val" / file, made / cls / file, copy=True)
        return f"{len(flat)} images of {folder / 'val'} sorted into {len(set(classes.values()))} class folders"
    if folder.exists():
        raise UserError(f"{folder}: is there already: `harness data verify {name}` looks at it; move it away to prepare it anew")
    with whole(folder) as made:
        try:
            if name == "imagenet":
                imagenet(archives, made, labels)
            else:
                chosen = [find(archives, names) for names in ARCHIVES[name]]
                for archive in dict.fromkeys(chosen):
                    unpack(archive, made)
                lift(made, name)
            check_layout(name, made)
        except UserError as error:
            raise UserError(str(error).replace(str(made), str(folder))) from None
    return f"made from {archives}"


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its place in the end; a failure or an interrupt leaves everything as it was."""
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
        with suppress(ValueError):
            if not alive(int(leftover.name.split(".")[-2])):
                shutil.rmtree(leftover, ignore_errors=True)
    made, old = (folder.with_name(f".{folder.name}{word}.{os.getpid()}.tmp") for word in ("", ".before"))
    made.mkdir(parents=True)
    try:
        yield made
        if folder.exists():
            folder.rename(old)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def find(archives: Path, names: tuple[str, ...]) -> Path:
    """The first of several files that is there. Raises UserError."""
    found = next((archives / n for n in names if (archives / n).is_file()), None)
    if found is None:
        raise UserError(f"{archives}: no {' or '.join(names)}: download it there, or name the folder that holds it with --archives")
    return found


def guarded(archive: Path, work: Callable[[], Any]) -> Any:
    """Run a piece of work on an archive; damage becomes a UserError."""
    try:
        return work()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, KeyError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({' '.join(str(error).split())[:100]}): download it again") from error
    except OSError as error:
        raise UserError(f"{archive}: cannot be unpacked ({error.strerror or error})") from error


def unpack(archive: Path, into: Path) -> None:
    """Unpack a .tar, .tar.gz, .zip or .json.gz, or copy a .json; nothing is written outside `into`."""

    def work() -> None:
        if archive.name.endswith(".json"):
            shutil.copy(archive, into / archive.name)
        elif archive.name.endswith(".json.gz"):
            with gzip.open(archive) as source, open(into / archive.name[:-3], "wb") as target:
                shutil.copyfileobj(source, target)
        elif archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as body:
                body.extractall(into)
        else:
            with tarfile.open(archive) as body:
                body.extractall(into, filter="data")

    guarded(archive, work)


def lift(made: Path, name: str) -> None:
    """Take what an archive put into a folder of the set's own name (cifar-100-python/) or of its lists out of it."""
    for top in (folder_names()[name], "places365_standard", "filelist_places365-standard"):
        inner = made / top
        if inner.is_dir():
            inner.rename(made / ".inner")
            for path in (made / ".inner").iterdir():
                path.rename(made / path.name)
            (made / ".inner").rmdir()


def move(source: Path, target: Path, copy: bool = False) -> None:
    """Move a file, or put it at a second place: a hard link where the disk has them, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        source.rename(target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ---------------------------------------------------------------------------------------------------------- ImageNet


def imagenet(archives: Path, made: Path, labels: Path | None) -> None:
    """train/ from the archive of archives, val/ from the flat archive and a list of classes."""
    train, val = (find(archives, (f"ILSVRC2012_img_{split}.tar",)) for split in ("train", "val"))

    def work() -> None:
        with tarfile.open(train) as outer:
            for member in outer:
                if member.name.endswith(".tar"):
                    with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                        inner.extractall(made / "train" / Path(member.name).stem, filter="data")

    guarded(train, work)
    unpack(val, made / ".flat")
    files = images_below(made / ".flat")
    for file, cls in classes_of(files, class_names(made / "train") if (made / "train").is_dir() else (), archives, labels).items():
        move(made / ".flat" / file, made / "val" / cls / Path(file).name)
    shutil.rmtree(made / ".flat")


def classes_of(files: list[str], classes: tuple[str, ...], archives: Path, labels: Path | None) -> dict[str, str]:
    """Class of each validation image, from a list.

    The list is ImageNet's development kit, Kaggle's LOC_val_solution.csv, or lines of `file class` or of `class` alone (in the order of the
    sorted files); a class is a WordNet id or, beside a file's name, its place among the sorted ids.

    Raises:
        UserError: no list, or one that does not fit the files or the classes.
    """
    path = labels if labels is not None else find(archives, VALIDATION_LISTS)
    if not path.is_file():
        raise UserError(f"--labels {path}: no such file: name ILSVRC2012_devkit_t12.tar.gz, or a list of lines `file class`")
    if not classes:
        raise UserError("imagenet: there are no classes in train/: prepare it first, the classes of val are checked against it")
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        ids = development_kit(path)
        if len(ids) != len(files):  # by place: one file that is missing would give all behind it another's class
            raise UserError(f"{path}: {len(ids)} classes for {len(files)} images: the archive of validation images is not whole, get it again")
        known = dict(zip(sorted(files), ids, strict=True))
    else:
        rows = [line.replace(",", " ").split()[:2] for line in path.read_text(errors="replace").splitlines() if line.strip() and not line.startswith("ImageId")]
        if rows and all(len(r) == 1 for r in rows):
            if rows[0][0].isdigit():
                raise UserError(f"{path}: numbers without file names are the development kit's own: give ILSVRC2012_devkit_t12.tar.gz with --labels")
            if len(rows) != len(files):
                raise UserError(f"{path}: {len(rows)} classes for {len(files)} images: it must have one line for each")
            known = dict(zip(sorted(files), (r[0] for r in rows), strict=True))
        else:
            named = {Path(r[0]).stem: r[-1] for r in rows if len(r) == 2}
            known = {f: named[Path(f).stem] for f in files if Path(f).stem in named}
            known = {f: classes[int(c)] if c.isdigit() and int(c) < len(classes) else c for f, c in known.items()}
    if lost := sorted(set(files) - set(known)):
        raise UserError(f"{path}: has no class for {lost[0]} ({len(lost)} images in all)")
    if wrong := sorted(set(known.values()) - set(classes)):
        raise UserError(f"{path}: {wrong[0]!r} is no class of train: {suggest(wrong[0], classes[:20])}")
    return {f: known[f] for f in files}


def development_kit(path: Path) -> list[str]:
    """WordNet ids of the validation images in order, from ILSVRC2012_devkit_t12.tar.gz: its own class numbers, and meta.mat that names them."""
    from scipy.io import loadmat

    def member(body: tarfile.TarFile, name: str) -> IO[bytes]:
        found = next((m for m in body.getmembers() if m.name.endswith(f"/data/{name}")), None)
        stream = None if found is None else body.extractfile(found)
        if stream is None:
            raise KeyError(f"{name} is missing")
        return stream

    def work() -> list[str]:
        with tarfile.open(path) as body:
            numbers = [int(line) for line in member(body, "ILSVRC2012_validation_ground_truth.txt").read().split()]
            synsets = loadmat(member(body, "meta.mat"), squeeze_me=True)["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [ids[n] for n in numbers]

    found: list[str] = guarded(path, work)
    return found
