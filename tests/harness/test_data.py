"""Readers of the layouts as downloaded: a mistake here trains on wrong labels, mixes train with val, or reuses stale results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import data, layout
from harness.data import BadImage, ImageList, load_rgb, read_images
from harness.spec import Protocol, UserError, ViTConfig

TINY = Protocol("tiny", "demo", "", {"v": ViTConfig()}, "v", generator="a:b", generates=("ade20k", "coco"), data_version="v7")


def picture(path: Path, shade: int = 128, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode in ("L", "P") else (shade,) * len(mode)).save(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the developer's own caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("HARNESS_DATA", raising=False)


# -------------------------------------------------------------------------------------------------------------- lists


def test_split_holds_out_without_overlap() -> None:
    """Tuning on a held-out part is honest only if nothing is in both parts and the part is the same every time."""
    images = ImageList(Path("r"), [f"{i}.jpg" for i in range(50)], np.arange(50), ("a",))
    rest, held = images.split(0.2, seed=3)
    assert (len(rest), len(held)) == (40, 10) and not set(rest.files) & set(held.files)
    again, other = (list(images.split(0.2, seed=s)[1].files) for s in (3, 4))
    assert again == list(held.files) != other
    assert held.labels is not None and [f"{i}.jpg" for i in held.labels] == list(held.files)


# ------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("mode,suffix", [("L", "png"), ("CMYK", "jpg"), ("P", "gif"), ("RGBA", "png"), ("RGB", "webp"), ("RGB", "bmp")])
def test_every_kind_of_picture_becomes_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    """ImageNet itself holds gray and CMYK files; a folder of the user's holds anything."""
    image = load_rgb(picture(tmp_path / f"a.{suffix}", mode=mode))
    assert image.mode == "RGB" and image.size == (6, 4)


def test_orientation_of_a_phone_is_respected(tmp_path: Path) -> None:
    """A portrait photograph that its camera stored lying must not be trained on lying."""
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise to view
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_rgb(tmp_path / "a.jpg").size == (4, 6)


@pytest.mark.parametrize("content", [None, b"", b"no image at all", "half"])
def test_bad_image_names_its_path(content: bytes | str | None, tmp_path: Path) -> None:
    """One broken file among a million: without its path nobody finds it."""
    path = tmp_path / "broken.jpg"
    if content == "half":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:900]
    if content is not None:
        path.write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(BadImage, match=r"broken\.jpg"):
        load_rgb(path)


def test_sixteen_bit_gray_keeps_its_shades(tmp_path: Path) -> None:
    """Medical and depth pictures are 16 bit: clipped, nearly all of one is plain white, and nothing says so."""
    Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(tmp_path / "a.png")
    assert len(np.unique(np.asarray(load_rgb(tmp_path / "a.png")))) > 30


# ------------------------------------------------------------------------------------------------------------- places


def test_locate_defaults_to_a_folder_of_protocol_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the generated data never passes for this one."""
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path))
    folders = data.locate(None, TINY)
    assert folders["ade20k"] == tmp_path / "tiny-v7" / "ADEChallengeData2016"
    folders["coco"].mkdir(parents=True)
    assert data.missing(["ade20k", "coco"], folders) == ["ade20k"]


def test_locate_of_a_toml_is_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same TOML works from any working directory."""
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "data.toml").write_text('imagenet = "../pictures"\n')
    monkeypatch.chdir("/")
    assert data.locate(str(tmp_path / "sets" / "data.toml"), TINY) == {"imagenet": tmp_path / "pictures"}


# ------------------------------------------------------------------------------------------------------------ readers


def test_classes_are_those_of_train_in_both_splits(tmp_path: Path) -> None:
    """A class without validation images must not shift the numbers of the classes after it."""
    for file in ("train/b/1.JPEG", "train/a/1.JPEG", "train/c/1.jpg", "val/c/9.jpg"):
        picture(tmp_path / file.replace("JPEG", "jpeg"))
    train, val = (read_images("imagenet", split, tmp_path) for split in ("train", "val"))
    assert train.classes == val.classes == ("a", "b", "c")
    assert train.labels is not None and val.labels is not None
    assert train.labels.tolist() == [0, 1, 2] and val.labels.tolist() == [2]


def test_flat_validation_archive_is_refused(tmp_path: Path) -> None:
    """The official ImageNet validation archive is flat: it has no classes until it is sorted into folders."""
    picture(tmp_path / "train/a/1.jpg")
    picture(tmp_path / "val/ILSVRC2012_val_00000001.jpg")
    with pytest.raises(UserError, match="no class of train"):
        read_images("imagenet", "val", tmp_path)


def test_imagefolder_without_splits_holds_some_out(tmp_path: Path) -> None:
    """A user's class folder is scored on images that were not trained on."""
    for i in range(20):
        picture(tmp_path / f"{'cat' if i % 2 else 'dog'}/{i}.png")
    train, val = (read_images("imagefolder", split, tmp_path) for split in ("train", "val"))
    assert train.classes == val.classes == ("cat", "dog") and len(train) + len(val) == 20
    assert len(val) == 4 and not set(train.files) & set(val.files)


def test_unlabelled_folder_nested_and_mixed(tmp_path: Path) -> None:
    """--pretrain-data takes what people have: nested, mixed formats, capital suffixes, hidden leftovers, other files."""
    for file in ("a.png", "x/b.JPG", "x/y/c.webp", ".trash/d.png", "x/._b.jpg"):
        picture(tmp_path / "new.png").rename(_made(tmp_path / file))
    (tmp_path / "notes.txt").write_text("")
    images = read_images("folder", "train", tmp_path)
    assert list(images.files) == ["a.png", "x/b.JPG", "x/y/c.webp"] and images.labels is None


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_link_to_a_parent_repeats_no_image(tmp_path: Path) -> None:
    """A link in the folder must not multiply the weight of its images."""
    picture(tmp_path / "a.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(read_images("folder", "train", tmp_path)) == 1


def test_inaturalist_takes_the_split_from_the_json(tmp_path: Path) -> None:
    """The archive's tree holds train and val together, and category ids need not be 0..n-1."""
    categories = [{"id": 9, "name": "wren"}, {"id": 4, "name": "adder"}]
    for split, image, category in (("train", 1, 9), ("val", 2, 4)):
        body = {"images": [{"id": image, "file_name": f"train_val2018/Aves/{category}/{image}.jpg"}], "categories": categories,
                "annotations": [{"id": 1, "image_id": image, "category_id": category}]}
        (tmp_path / f"{split}2018.json").write_text(json.dumps(body))
    train, val = (read_images("inat2018", split, tmp_path) for split in ("train", "val"))
    assert train.classes == val.classes == ("adder", "wren")
    assert [train.classes[i] for i in train.labels or ()] == ["wren"] and list(val.files) == ["train_val2018/Aves/4/2.jpg"]  # type: ignore[union-attr]


@pytest.mark.parametrize("folders", [("data_256_standard", "val_256"), ("data_large_standard", "val_large")])
def test_places365_lists(folders: tuple[str, str], tmp_path: Path) -> None:
    """Class numbers are those of categories_places365.txt, train paths begin with a slash, and both sizes of image are taken."""
    (tmp_path / "categories_places365.txt").write_text("/b/beach 1\n/s/swimming_pool/indoor 0\n")
    (tmp_path / "places365_train_standard.txt").write_text("/s/swimming_pool/indoor/00000001.jpg 0\n")
    (tmp_path / "places365_val.txt").write_text("Places365_val_00000001.jpg 1\n")
    for folder, file in zip(folders, ("s/swimming_pool/indoor/00000001.jpg", "Places365_val_00000001.jpg"), strict=True):
        picture(tmp_path / folder / file)
    for split, label in (("train", 0), ("val", 1)):
        images = read_images("places365", split, tmp_path)
        assert images.classes == ("/s/swimming_pool/indoor", "/b/beach") and images.path(0).is_file()
        assert images.labels is not None and images.labels.tolist() == [label]


def test_class_names_of_dense_sets(tmp_path: Path) -> None:
    """Names come from the archive: ADE20K's have commas and spaces, COCO's ids have gaps and any order."""
    rows = ("Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1576\t11664\t1172\t1\twall", "2\t0.1072\t6046\t612\t1\tbuilding, edifice")
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    assert data.data_set("ade20k").classes(tmp_path) == ("wall", "building, edifice")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps({"categories": [{"id": 7, "name": "train"}, {"id": 1, "name": "person"}]}))
    assert data.data_set("coco").classes(tmp_path) == ((1, "person"), (7, "train"))


# ------------------------------------------------------------------------------------------------------- quick checks


def ade20k(root: Path, label: int = 1) -> Path:
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0\t1\t1\t1\twall\n")
    for split in ("training", "validation"):
        picture(root / f"images/{split}/a.jpg")
        picture(root / f"annotations/{split}/a.png", label, mode="L")
    return root


def test_ade20k_without_an_annotation_is_refused(tmp_path: Path) -> None:
    """Found before anything is launched, not after hours of pre-training."""
    layout.check_layout("ade20k", ade20k(tmp_path))
    (tmp_path / "annotations/validation/a.png").unlink()
    with pytest.raises(UserError, match=r"a\.jpg: has no annotation"):
        layout.check_layout("ade20k", tmp_path)


def test_ade20k_label_above_the_classes_is_refused(tmp_path: Path) -> None:
    """A label above the number of classes is bad input: exit 2, nothing started."""
    with pytest.raises(UserError, match="label 9 is above"):
        layout.check_layout("ade20k", ade20k(tmp_path, label=9))


# ------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_follows_the_data_and_not_the_place(tmp_path: Path) -> None:
    """A copy elsewhere reuses results; a label, a file more or another size does not."""
    import shutil

    one = _made(tmp_path / "one" / "x").parent
    picture(one / "a/1.jpg")
    (one / "list.txt").write_text("a 0\n")
    first = layout.fingerprint("places365", one)
    shutil.copytree(one, tmp_path / "two")
    os.utime(tmp_path / "two" / "a/1.jpg", (1, 1))
    assert layout.fingerprint("places365", tmp_path / "two") == first
    (one / "list.txt").write_text("a 1\n")  # same size
    second = layout.fingerprint("places365", one)
    (one / "a/1.jpg").rename(one / "a/2.jpg")
    third = layout.fingerprint("places365", one)
    content = bytearray((one / "a/2.jpg").read_bytes())
    content[-3] ^= 1
    (one / "a/2.jpg").write_bytes(content)  # another picture of the same size
    assert len({first, second, third, layout.fingerprint("places365", one)}) == 4


def test_fingerprint_of_a_name_that_is_no_text(tmp_path: Path) -> None:
    """File systems keep bytes: old archives unpack to names in Latin-1."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"1")
    first = layout.fingerprint("folder", folder)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"1")
    assert layout.fingerprint("folder", folder) != first


def test_fingerprint_of_a_folder_with_links(tmp_path: Path) -> None:
    """A link to a folder above is followed once, as it is when images are read; one to nowhere is named."""
    picture(tmp_path / "sub/1.jpg")
    (tmp_path / "sub/up").symlink_to("..")
    assert layout.fingerprint("imagefolder", tmp_path) == layout.fingerprint("imagefolder", tmp_path)
    (tmp_path / "sub/2.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"2\.jpg: cannot be read"):
        layout.fingerprint("imagefolder", tmp_path)


def test_fingerprint_of_a_large_set_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of 1.3 million images are not asked for at each start. The price, on large sets only: an image rewritten in place is not noticed."""
    image = picture(tmp_path / "train/a/1.jpg")
    small = layout.fingerprint("imagenet", tmp_path)
    image.write_bytes(image.read_bytes() + b"more")
    assert layout.fingerprint("imagenet", tmp_path) != small
    monkeypatch.setattr(layout, "MANY_FILES", 1)
    first = layout.fingerprint("imagenet", tmp_path)
    image.write_bytes(image.read_bytes() + b"more")
    assert layout.fingerprint("imagenet", tmp_path) == first  # from the cache
    picture(tmp_path / "train/b/1.jpg")
    assert layout.fingerprint("imagenet", tmp_path) != first


def test_fingerprint_of_a_large_set_sees_new_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO has 123,000 images: corrected annotations written over the old ones must not reuse the old scores."""
    monkeypatch.setattr(layout, "MANY_FILES", 1)
    path = _made(tmp_path / "annotations" / "instances_train2017.json")
    path.write_text("{}")
    first = layout.fingerprint("coco", tmp_path)
    path.write_text('{"images": []}')
    assert layout.fingerprint("coco", tmp_path) != first


def test_fingerprint_of_a_large_set_sees_new_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """iNaturalist's images lie in train_val2018/<super>/<class>/."""
    monkeypatch.setattr(layout, "MANY_FILES", 1)
    picture(tmp_path / "train_val2018/Aves/4/1.jpg")
    first = layout.fingerprint("inat2018", tmp_path)
    picture(tmp_path / "train_val2018/Aves/4/2.jpg")
    assert layout.fingerprint("inat2018", tmp_path) != first


def test_fingerprint_of_a_large_set_sees_new_images_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets often lie on another disk, one link for each part."""
    monkeypatch.setattr(layout, "MANY_FILES", 1)
    picture(tmp_path / "disk/a/1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train").symlink_to(tmp_path / "disk")
    first = layout.fingerprint("imagenet", tmp_path / "set")
    assert layout.fingerprint("imagenet", tmp_path / "set") == first
    picture(tmp_path / "disk/b/1.jpg")
    assert layout.fingerprint("imagenet", tmp_path / "set") != first
