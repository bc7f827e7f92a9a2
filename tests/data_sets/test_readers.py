"""Sets beside ImageNet in their official layouts: a mistake here trains on wrong labels, or runs what a downloaded file asks for."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sets.robustness import CORRUPTIONS
from data_sets.verify import compare_counts, verify
from harness.data import Count, data_set, folder_names, locate, read_images
from harness.layout import check_layout, fingerprint
from harness.plugins import installed
from harness.spec import Protocol, UserError, ViTConfig

ANY = Protocol("paper", "paper", "", {"v": ViTConfig()}, "v")


def picture(path: Path, shade: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (shade,) * 3).save(path)
    return path


def cifar(root: Path, count: int = 6, protocol: int = 2, text: bool = False) -> Path:
    """CIFAR-100's three files; pixel 0 of image i is (i, 50 + i, 100 + i)."""
    root.mkdir(parents=True, exist_ok=True)
    data = np.zeros((count, 3, 32, 32), dtype=np.uint8)
    data[:, :, 0, 0] = np.arange(count)[:, None] + np.array([0, 50, 100])
    body = {"data": data.reshape(count, -1), "fine_labels": [i % 3 for i in range(count)], "filenames": ["x.png"] * count}
    names = {"fine_label_names": ["apple", "bear", "cloud"]}
    for file, content in (("train", body), ("test", body), ("meta", names)):
        written = content if text else {k.encode(): v for k, v in content.items()}
        (root / file).write_bytes(pickle.dumps(written, protocol=protocol))
    return root


# ---------------------------------------------------------------------------------------------------------- CIFAR-100


@pytest.mark.parametrize("protocol,text", [(2, False), (2, True), (4, True), (5, False)])
def test_cifars_pixels_are_stored_channel_by_channel(protocol: int, text: bool, tmp_path: Path) -> None:
    """Read as height, width, channel, every image would be colour noise, and nothing would say so."""
    images = read_images("cifar100", "train", cifar(tmp_path, protocol=protocol, text=text))
    assert images.classes == ("apple", "bear", "cloud") and images.labels is not None and images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.load(3).size == (32, 32) and images.load(3).getpixel((0, 0)) == (3, 53, 103) and images.load(3).getpixel((1, 0)) == (0, 0, 0)
    part = images.subset([4, 1])
    assert part.load(0).getpixel((0, 0)) == (4, 54, 104) and part.labels is not None and part.labels.tolist() == [1, 1]
    check_layout("cifar100", tmp_path)
    assert verify("cifar100", tmp_path) == []


class Evil:
    """A pickle of it creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    """A download is not trusted: nothing that it names is imported or called."""
    cifar(tmp_path / "set")
    for content in (Evil(tmp_path / "made"), {"data": np.array([Evil(tmp_path / "made")], dtype=object), "fine_labels": [0]}):
        (tmp_path / "set" / "train").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"train: not a file of CIFAR-100 \(it names posix\.mkdir\)"):
            read_images("cifar100", "train", tmp_path / "set")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"data": np.zeros((2, 5), np.uint8), "fine_labels": [0, 1]})])
def test_a_file_that_is_not_cifars_is_named(content: bytes, tmp_path: Path) -> None:
    """Truncated, or another pickle."""
    (cifar(tmp_path) / "train").write_bytes(content)
    with pytest.raises(UserError, match="train: not"):
        read_images("cifar100", "train", tmp_path)


def test_labels_inside_a_pickle_are_part_of_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrected labels leave the file's size as it is; the old scores must not be shown for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = cifar(tmp_path / "set")
    before = fingerprint("cifar100", root)
    body = (root / "train").read_bytes()
    (root / "train").write_bytes(body.replace(b"x.png", b"y.png"))
    assert fingerprint("cifar100", root) != before


# ------------------------------------------------------------------------------------------------------------- Places


def places205(root: Path) -> Path:
    lists, images = root / "trainvalsplit_places205", root / "data/vision/torralba/deeplearning/images256"
    lists.mkdir(parents=True)
    (lists / "train_places205.csv").write_text("a/abbey/gsun_1.jpg 0\nb/bar/outdoor/gsun 2.jpg 1\n")
    (lists / "val_places205.csv").write_text("b/bar/outdoor/gsun_3.jpg 1\n")
    for file in ("a/abbey/gsun_1.jpg", "b/bar/outdoor/gsun 2.jpg", "b/bar/outdoor/gsun_3.jpg"):
        picture(images / file)
    return root


def test_places205_lists_are_separated_by_a_space_whatever_their_name(tmp_path: Path) -> None:
    """They end in .csv and have no comma; class names come from the folders."""
    for split, labels in (("train", [0, 1]), ("val", [1])):
        images = read_images("places205", split, places205(tmp_path) if split == "train" else tmp_path)
        assert images.classes == ("a/abbey", "b/bar/outdoor") and images.labels is not None and images.labels.tolist() == labels
        assert images.path(0).is_file()
    assert verify("places205", tmp_path) == []


@pytest.mark.parametrize("line,words", [("a/abbey/1.jpg,0", "separated by a space"), ("a/abbey/1.jpg 7", "label 7 is above")])
def test_a_wrong_line_of_a_list_is_named(line: str, words: str, tmp_path: Path) -> None:
    """One of 2.4 million lines."""
    (places205(tmp_path) / "trainvalsplit_places205" / "val_places205.csv").write_text(line + "\n")
    with pytest.raises(UserError, match=f"val_places205.csv: .*{words}"):
        read_images("places205", "val", tmp_path)


# -------------------------------------------------------------------------------------------------------- iNaturalist


@pytest.mark.parametrize("name,top", [("inat2017", "train_val_images"), ("inat2019", "train_val2019"), ("inat2019", "2019")])
def test_inaturalist_of_every_year_and_as_torchvision_renames_it(name: str, top: str, tmp_path: Path) -> None:
    """The json says train_val2019/..., the tree may be called 2019/."""
    year = name.removeprefix("inat")
    for split, image in (("train", 1), ("val", 2)):
        written = "train_val_images" if year == "2017" else f"train_val{year}"
        body = {"images": [{"id": image, "file_name": f"{written}/Aves/Wren/{image}.jpg"}], "categories": [{"id": 0, "name": "Wren"}],
                "annotations": [{"id": 1, "image_id": image, "category_id": 0}]}
        (tmp_path / f"{split}{year}.json").write_text(json.dumps(body))
        picture(tmp_path / top / f"Aves/Wren/{image}.jpg")
    for split in ("train", "val"):
        assert read_images(name, split, tmp_path).path(0).is_file()
    assert verify(name, tmp_path) == []


# --------------------------------------------------------------------------------------------------------- robustness


@pytest.mark.parametrize("name,below", [("imagenet-a", "."), ("imagenet-r", "."), ("imagenet-sketch", "sketch"), ("imagenet-sketch", ".")])
def test_test_sets_of_imagenets_classes(name: str, below: str, tmp_path: Path) -> None:
    """Archives bring a README beside the classes; the sketches lie one folder deeper."""
    for file in ("n02/1.JPEG", "n01/2.JPEG"):
        picture(tmp_path / below / file.replace("JPEG", "jpeg"))
    (tmp_path / "README.txt").write_text("")
    images = read_images(name, "val", tmp_path)
    assert images.classes == ("n01", "n02") and images.labels is not None and images.labels.tolist() == [0, 1] and images.path(0).is_file()
    check_layout(name, tmp_path)


def test_corrupted_images_need_all_corruptions_at_all_severities(tmp_path: Path) -> None:
    """An mCE over fourteen corruptions is another number; the extra corruptions are no part of it."""
    for corruption in (*CORRUPTIONS, "saturate"):
        for severity in range(1, 6):
            (tmp_path / corruption / str(severity) / "n01").mkdir(parents=True)
    check_layout("imagenet-c", tmp_path)
    assert len(data_set("imagenet-c").splits) == 75 and "saturate/1" not in data_set("imagenet-c").splits
    (tmp_path / "fog/3/n01").rename(tmp_path / "fog/3/n02")
    with pytest.raises(UserError, match="fog/3: other classes"):
        check_layout("imagenet-c", tmp_path)
    (tmp_path / "fog/3/n02").rmdir()
    (tmp_path / "fog/3").rmdir()
    with pytest.raises(UserError, match="fog/3: no such folder"):
        check_layout("imagenet-c", tmp_path)


# ------------------------------------------------------------------------------------------------------------- counts


def test_counts_are_compared_with_the_official_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image short is a damaged copy; another number of classes another set; a number from memory no verdict."""
    for file in ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"):
        picture(tmp_path / file)
    problems, remarks = compare_counts("imagenet", tmp_path)
    assert problems == [] and len(remarks) == 2 and "1281167 of 1000" in remarks[0] and "another set" in remarks[0]
    for split in data_set("imagenet-c").splits:
        picture(tmp_path / "c" / split / "n01" / "1.jpg")
    assert [line.count("gaussian_noise/1 (and 74 more) has 1 images of 1 classes") for line in compare_counts("imagenet-c", tmp_path / "c")[1]] == [1]
    layout = type(data_set("imagenet"))
    monkeypatch.setattr(layout, "official", {"train": Count(2, 2), "val": Count(2, 2)})
    problems, remarks = compare_counts("imagenet", tmp_path)
    assert remarks == [] and len(problems) == 1 and "val has 1 images of 2 classes, the official imagenet 2 of 2" in problems[0]
    monkeypatch.setattr(layout, "official", {"val": Count(2, 2, sure=False)})
    assert compare_counts("imagenet", tmp_path)[0] == [] and "from memory" in compare_counts("imagenet", tmp_path)[1][0]


def test_every_layout_can_be_asked_for() -> None:
    """The names and folders of design.md, section 4."""
    expected = {
        "imagenet": "imagenet", "ade20k": "ADEChallengeData2016", "coco": "coco", "cifar100": "cifar-100-python",
        **{n: n for n in ("inat2017", "inat2018", "inat2019", "places205", "places365", "imagenet-a", "imagenet-c", "imagenet-r", "imagenet-sketch")},
    }
    assert {n: f for n, f in folder_names().items() if n in installed("datasets")} == expected
    assert locate(None, ANY) == {}


def test_official_counts_are_those_of_the_facts() -> None:
    """Read (or derived) numbers are errors when missed, recalled ones remarks."""
    import csv

    path = Path(__file__).parents[1] / "golden" / "dataset_counts.csv"
    names = {"ImageNet-1K": "imagenet", "iNaturalist 2017": "inat2017", "iNaturalist 2018": "inat2018", "iNaturalist 2019": "inat2019",
             "Places365-Standard": "places365", "Places365": "places365", "Places205": "places205", "ADE20K (ADEChallengeData2016)": "ade20k",
             "COCO 2017": "coco", "CIFAR-100": "cifar100", "ImageNet-A": "imagenet-a", "ImageNet-R": "imagenet-r", "ImageNet-Sketch": "imagenet-sketch"}
    splits = {"ade20k": {"train": "training", "val": "validation"}, "coco": {"train": "train2017", "val": "val2017"}}
    compared = 0
    for row in csv.DictReader(path.read_text().splitlines()):
        name = names.get(row["dataset"], "")
        split = "val" if row["split"] == "test" and name in ("cifar100", "imagenet-a", "imagenet-r", "imagenet-sketch") else row["split"]
        split = splits.get(name, {}).get(split, split)
        if name and split in data_set(name).official:
            assert data_set(name).official[split] == Count(int(row["images"]), int(row["classes"]), row["status"] != "recalled"), row
            compared += 1
    assert compared == 21
