"""Tar shards give what class folders give: the same images, labels and order, so the same number."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_sets import shards
from data_sets.verify import verify
from harness.augment import TrainTransform
from harness.data import BadImage, ImageList, read_images
from harness.layout import check_layout, fingerprint
from harness.samples import Samples, loader
from harness.spec import Augment, UserError

CLASSES = ("ant", "bee", "wasp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders with 18 pictures to train on and 6 to score."""
    rng = np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 2)):
        for name in CLASSES:
            for i in range(each):
                path = tmp_path / "folder" / split / name / f"{split}_{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path, "JPEG")
    return tmp_path / "folder"


def pack(folder: Path, root: Path, cls: bool = True, split_names: bool = False) -> Path:
    """The folder's pictures, shuffled, in shards of five, with KEY.cls where `cls` says so."""
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.JPEG"))
        order = np.random.default_rng(1).permutation(len(files))
        for number, first in enumerate(range(0, len(files), 5)):
            with tarfile.open(root / f"{split}-{number:06}.tar", "w") as shard:
                for i in order[first : first + 5]:
                    name = str(files[i].relative_to(folder if split_names else folder / split))
                    shard.add(files[i], name)
                    if cls:
                        text = str(CLASSES.index(files[i].parent.name)).encode()
                        info = tarfile.TarInfo(name.replace(".JPEG", ".cls"))
                        info.size = len(text)
                        shard.addfile(info, io.BytesIO(text))
    if cls:
        (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def epoch_of(images: ImageList, workers: int = 0) -> list[dict[str, torch.Tensor]]:
    """Two epochs of training batches."""
    samples = Samples(images, TrainTransform((32, 32), Augment(color_jitter=(0.4, 0.4, 0.4))), 3, 12, False)
    return list(loader(samples, [range(i, i + 6) for i in range(0, 24, 6)], workers, False))


@pytest.mark.parametrize("cls,split_names", [(True, False), (False, False), (False, True)])
def test_shards_give_the_samples_of_class_folders(cls: bool, split_names: bool, folder: Path, tmp_path: Path) -> None:
    """Shuffled exactly and not within a buffer, whatever the order in the shards and the number of workers."""
    packed = pack(folder, tmp_path / "shards", cls, split_names)
    for split in ("train", "val"):
        plain, images = (read_images("imagenet", split, root) for root in (folder, packed))
        assert list(images.files) == list(plain.files) and images.classes == plain.classes == CLASSES
        for batch, same, again in zip(epoch_of(plain), epoch_of(images), epoch_of(images, 2), strict=True):
            assert batch.keys() == same.keys() and all(torch.equal(batch[k], same[k]) and torch.equal(batch[k], again[k]) for k in batch)
    part = pickle.loads(pickle.dumps(images.subset([4, 1])))  # a spawned worker gets a pickle
    assert [np.asarray(part.load(i)).tobytes() for i in (0, 1)] == [np.asarray(plain.load(i)).tobytes() for i in (4, 1)]
    check_layout("imagenet", packed)
    assert verify("imagenet", packed) == [] and list(read_images("imagefolder", "val", packed).files) == list(plain.files)


def test_the_index_is_made_once_and_changes_no_key(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking through 150 GB of shards at each start would take minutes; an index of other shards would read rubbish."""
    packed = pack(folder, tmp_path / "shards")
    before = fingerprint("imagenet", packed)
    first = [read_images("imagenet", "train", packed) for _ in range(2)][1]
    assert capsys.readouterr().err.count("shards of train, once") == 1 and (packed / ".train.index.npz").is_file()
    assert fingerprint("imagenet", packed) == before
    (packed / "train-000003.tar").unlink()
    assert len(read_images("imagenet", "train", packed)) == len(first) - 3 and "once" in capsys.readouterr().err
    with pytest.raises(BadImage, match=r"train-000003\.tar: cannot be read \(No such file"):
        for i in range(len(first)):
            first.load(i)


@pytest.mark.parametrize("left", [0, 100, -30])
def test_a_damaged_index_is_made_anew(left: int, folder: Path, tmp_path: Path) -> None:
    """A disk that filled up leaves half a file; what it says of the shards is not worth a traceback."""
    packed = pack(folder, tmp_path / "shards")
    names = list(read_images("imagenet", "train", packed).files)
    place = packed / ".train.index.npz"
    place.write_bytes(place.read_bytes()[:left])
    assert list(read_images("imagenet", "train", packed).files) == names


def test_an_index_that_cannot_be_kept_beside_the_shards_is_kept_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data of a cluster is read-only for most."""
    packed = pack(folder, tmp_path / "shards")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (packed / ".train.index.npz").mkdir()  # root may write everywhere, but not here
    for _ in range(2):
        assert len(read_images("imagenet", "train", packed)) == 18
    assert capsys.readouterr().err.count("once") == 1 and list((tmp_path / "cache").rglob("*.npz"))


def test_no_shard_of_train_is_one_of_val(tmp_path: Path) -> None:
    """A model would be scored on what it was trained on."""
    names = ("carnival-train-0.tar", "imagenet1k-train-00.tar", "imagenet1k-validation-00.tar", "trainval-0.tar", "val-000000.tar", "val_small-1.tar")
    for name in names:
        (tmp_path / name).touch()
    found = {split: [p.name for p in shards.tars(tmp_path, split)] for split in ("train", "val")}
    assert found == {"train": [names[0], names[1], names[3]], "val": [names[2], names[4], names[5]]}


def cut(root: Path) -> None:
    with tarfile.open(root / "train-000001.tar") as shard:
        last = [m for m in shard if m.name.endswith(".JPEG")][-1]
    os.truncate(root / "train-000001.tar", last.offset_data + last.size // 2)


def no_tar(root: Path) -> None:
    (root / "train-000002.tar").write_bytes(b"<html>not found</html>" * 100)


def too_few_classes(root: Path) -> None:
    (root / "classes.txt").write_text("ant\nbee\n")


def doubled_class(root: Path) -> None:
    (root / "classes.txt").write_text("ant\nant\nbee\n")


def unlabelled(root: Path) -> None:
    Image.new("RGB", (8, 8)).save(root / "loose.jpg")
    with tarfile.open(root / "train-000009.tar", "w") as shard:
        shard.add(root / "loose.jpg", "loose.jpg")


def worded_label(root: Path) -> None:
    (root / "wrong.cls").write_text("wasp")
    with tarfile.open(root / "train-000009.tar", "w") as shard:
        shard.add(root / "wrong.cls", "wrong.cls")


def dotted_names(root: Path) -> None:
    with tarfile.open(root / "train-000009.tar", "w") as shard:
        for name in ("photo.1.jpg", "photo.2.jpg"):
            Image.new("RGB", (8, 8)).save(root / name)
            shard.add(root / name, f"ant/{name}")


def unreadable(root: Path) -> None:
    (root / "train-000009.tar").mkdir()


def no_val(root: Path) -> None:
    for path in root.glob("val-*"):
        path.unlink()


@pytest.mark.parametrize("spoil,message", [
    (cut, r"train-000001\.tar: not a whole tar file"), (no_tar, r"train-000002\.tar: not a whole tar file"),
    (too_few_classes, r"wasp/.*JPEG has label 2; there are 2 classes"), (doubled_class, r"classes\.txt: names a class twice"),
    (unlabelled, r"train-000009\.tar: loose\.jpg has no label"), (worded_label, r"train-000009\.tar: wrong\.cls is no number"),
    (dotted_names, r"train-000009\.tar: ant/photo\.1\.jpg and ant/photo\.2\.jpg are two images of one sample"),
    (unreadable, r"train-000009\.tar: not a whole tar file .*[Dd]irectory"), (no_val, r"no shards of val"),
])
def test_wrong_shards_are_one_line(spoil: Callable[[Path], None], message: str, folder: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "shards")
    spoil(packed)
    with pytest.raises(UserError, match=message) as error:
        check_layout("imagenet", packed)
    assert "\n" not in str(error.value)
