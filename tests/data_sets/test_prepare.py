"""From archives as downloaded to the layout: whole or not at all, each image in its right class, nothing written elsewhere."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_sets.prepare import prepare, whole
from harness.cli import main
from harness.data import read_images
from harness.spec import UserError

IDS = ("n01", "n02", "n03")
VALIDATION = {"ILSVRC2012_val_00000001.JPEG": "n03", "ILSVRC2012_val_00000002.JPEG": "n01", "ILSVRC2012_val_00000003.JPEG": "n03"}


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format="JPEG")
    return stream.getvalue()


def tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar archive, compressed where its name says so."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as body:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            body.addfile(info, io.BytesIO(content))
    return path


def development_kit(path: Path) -> Path:
    """ImageNet's, whose own numbers of the classes are in another order than the sorted ids."""
    synsets = np.array([(1, "n03"), (2, "n01"), (3, "n02")], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = b"1\n2\n1\n"
    return tar(path, {"ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth, "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue()})


def imagenet_archives(folder: Path) -> Path:
    """An archive of archives for train, a flat one for val."""
    folder.mkdir()
    inner = {f"{i}.tar": tar(folder / "one", {f"{i}_1.JPEG": picture()}).read_bytes() for i in IDS}
    (folder / "one").unlink()
    tar(folder / "ILSVRC2012_img_train.tar", inner)
    tar(folder / "ILSVRC2012_img_val.tar", dict.fromkeys(VALIDATION, picture()))
    return folder


def validation(root: Path) -> dict[str, str]:
    images = read_images("imagenet", "val", root)
    return {Path(f).name: f.split("/")[0] for f in images.files}


LISTS: dict[str, str] = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n" + "".join(f"{f[:-5]},{c} 1 2 3 4 {c} 5 6 7 8\n" for f, c in VALIDATION.items()),
    "val.txt": "".join(f"{f} {IDS.index(c)}\n" for f, c in VALIDATION.items()),
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{c}\n" for c in VALIDATION.values()),
}


@pytest.mark.parametrize("kind", ["ILSVRC2012_devkit_t12.tar.gz", *LISTS])
def test_imagenet_from_its_archives(kind: str, tmp_path: Path) -> None:
    """Each kind of list that comes with ImageNet puts the images into the same classes."""
    archives = imagenet_archives(tmp_path / "archives")
    if kind in LISTS:
        (archives / kind).write_text(LISTS[kind])
    else:
        development_kit(archives / kind)
    prepare("imagenet", archives, tmp_path / "imagenet")
    assert validation(tmp_path / "imagenet") == VALIDATION and read_images("imagenet", "train", tmp_path / "imagenet").classes == IDS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archives", "imagenet"]
    assert sorted(p.name for p in (tmp_path / "imagenet").iterdir()) == ["train", "val"]
    with pytest.raises(UserError, match="is there already"):
        prepare("imagenet", archives, tmp_path / "imagenet")


def test_a_validation_image_that_is_missing_does_not_shift_the_classes_of_those_behind_it(tmp_path: Path) -> None:
    """The development kit has a list without names."""
    archives = imagenet_archives(tmp_path / "archives")
    development_kit(archives / "ILSVRC2012_devkit_t12.tar.gz")
    tar(archives / "ILSVRC2012_img_val.tar", dict.fromkeys(list(VALIDATION)[1:], picture()))
    with pytest.raises(UserError, match="3 classes for 2 images"):
        prepare("imagenet", archives, tmp_path / "imagenet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archives"]


def flat(root: Path) -> Path:
    """ImageNet with class folders in train and a flat val, as people have it who unpacked by hand."""
    for path in [*(f"train/{i}/1.JPEG" for i in IDS), *(f"val/{f}" for f in VALIDATION)]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture())
    return root


def test_a_flat_validation_folder_is_sorted_where_it_is(harness: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """By the command line, with a list of the user's."""
    flat(tmp_path / "imagenet")
    (tmp_path / "mine.txt").write_text(LISTS["val.txt"])
    done = harness("data", "prepare", "imagenet", "--data", str(tmp_path), "--labels", str(tmp_path / "mine.txt"))
    assert done.returncode == 0 and "3 images" in done.stdout and "2 class folders" in done.stdout, done.stderr
    assert validation(tmp_path / "imagenet") == VALIDATION and sorted(p.name for p in (tmp_path / "imagenet").iterdir()) == ["train", "val"]
    done = harness("data", "prepare", "imagenet", "--data", str(tmp_path))
    assert done.returncode == 2 and "is there already" in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("content,words", [
    ("", "has no class for"), ("n03\nn01\n", "2 classes for 3 images"), ("1\n2\n1\n", "development kit's own"),
    (LISTS["val.txt"].replace(" 0", " n09"), "'n09' is no class of train"), (LISTS["val.txt"].split("\n")[0], "has no class for"),
])
def test_a_list_that_does_not_fit_changes_nothing(content: str, words: str, tmp_path: Path) -> None:
    """A shifted list would give a plausible data set with wrong labels."""
    root = flat(tmp_path / "imagenet")
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=words):
        prepare("imagenet", tmp_path, root, tmp_path / "list.txt")
    assert sorted(p.name for p in (root / "val").iterdir()) == sorted(VALIDATION) and sorted(p.name for p in root.iterdir()) == ["train", "val"]


def cifar_archive(path: Path) -> Path:
    body = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]}, protocol=2)
    meta = pickle.dumps({b"fine_label_names": [b"apple", b"bear"]}, protocol=2)
    return tar(path, {"cifar-100-python/train": body, "cifar-100-python/test": body, "cifar-100-python/meta": meta, "cifar-100-python/file.txt~": b""})


def test_cifar_and_others_from_their_archives(tmp_path: Path) -> None:
    """The archive's own top folder is not doubled; annotations in archives of their own end in the root."""
    cifar_archive(tmp_path / "cifar-100-python.tar.gz")
    prepare("cifar100", tmp_path, tmp_path / "made" / "cifar-100-python")
    assert len(read_images("cifar100", "val", tmp_path / "made" / "cifar-100-python")) == 2
    tar(tmp_path / "train_val2018.tar.gz", {f"train_val2018/Aves/0/{i}.jpg": picture() for i in (1, 2)})
    for split, image in (("train", 1), ("val", 2)):
        body = {"images": [{"id": image, "file_name": f"train_val2018/Aves/0/{image}.jpg"}], "categories": [{"id": 0}],
                "annotations": [{"image_id": image, "category_id": 0}]}
        tar(tmp_path / f"{split}2018.json.tar.gz", {f"{split}2018.json": json.dumps(body).encode()})
    prepare("inat2018", tmp_path, tmp_path / "inat2018")
    assert read_images("inat2018", "val", tmp_path / "inat2018").path(0).is_file()
    with zipfile.ZipFile(tmp_path / "ImageNet-Sketch.zip", "w") as body:
        body.writestr("sketch/n01/a.JPEG", picture())
    prepare("imagenet-sketch", tmp_path, tmp_path / "imagenet-sketch")
    assert read_images("imagenet-sketch", "val", tmp_path / "imagenet-sketch").classes == ("n01",)


def test_the_root_need_not_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first data set of a new disk; a failure leaves no empty folder behind."""
    (tmp_path / "archives").mkdir()
    line = ["data", "prepare", "cifar100", "--data", str(tmp_path / "new" / "root"), "--archives", str(tmp_path / "archives")]
    assert main(line) == 2 and not (tmp_path / "new" / "root").exists()
    cifar_archive(tmp_path / "archives" / "cifar-100-python.tar.gz")
    assert main(line) == 0 and (tmp_path / "new" / "root" / "cifar-100-python" / "meta").is_file()
    capsys.readouterr()
    assert main(["data", "prepare", "cifar100", "--data", str(tmp_path / "sets.toml"), "--archives", str(tmp_path / "archives")]) == 2
    assert "no such folder or file" in capsys.readouterr().err


def test_nothing_is_left_half_done(tmp_path: Path) -> None:
    """A damaged archive, one that lacks files, one that would write elsewhere, an interrupt: no folder, and one line that names the file."""
    archive = cifar_archive(tmp_path / "cifar-100-python.tar.gz")
    body = archive.read_bytes()
    archive.write_bytes(body[: len(body) // 2])
    with pytest.raises(UserError, match=r"cifar-100-python\.tar\.gz: cannot be unpacked .* download it again"):
        prepare("cifar100", tmp_path, tmp_path / "cifar-100-python")
    tar(archive, {"cifar-100-python/train": b"x"})
    with pytest.raises(UserError, match=r"/cifar-100-python/meta: cannot be read") as error:
        prepare("cifar100", tmp_path, tmp_path / "cifar-100-python")
    assert ".tmp" not in str(error.value)
    tar(archive, {"../outside": b"x"})
    with pytest.raises(UserError, match="cannot be unpacked"):
        prepare("cifar100", tmp_path, tmp_path / "deep" / "cifar-100-python")
    with pytest.raises(UserError, match=r"no imagenet-a\.tar: download it there"):
        prepare("imagenet-a", tmp_path, tmp_path / "imagenet-a")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "set") as made:
        (made / "file").write_text("half")
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cifar-100-python.tar.gz", "deep"]
