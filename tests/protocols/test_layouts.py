"""Generated sets on disk: complete or not there, the same whoever makes them, in the layouts that the readers of the real sets take."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from harness.data import data_set, folder_names, read_images
from harness.layout import check_layout
from protocols import layouts
from protocols.scenes import BACKGROUNDS, SHAPE_NAMES

ROOT = Path(__file__).resolve().parents[2]
MAKE = """
import sys
from pathlib import Path
if __name__ == "__main__":
    from protocols.layouts import generate
    generate(Path(sys.argv[1]), ["imagenet"], sys.argv[2], 2)
"""


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> str:
    """A scale of a few images."""
    monkeypatch.setitem(layouts.COUNTS, "few", dict.fromkeys(layouts.DRAW, (24, 12)))
    return "few"


def start(tmp_path: Path, scale: str) -> subprocess.Popen[bytes]:
    """A process that makes tmp_path/made/imagenet."""
    (tmp_path / "make.py").write_text(MAKE)
    line = [sys.executable, str(tmp_path / "make.py"), str(tmp_path / "made"), scale]
    return subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def kill_midway(tmp_path: Path) -> list[psutil.Process]:
    """Start a generation, kill it with SIGKILL once it has written pictures; the processes that it had started."""
    running = start(tmp_path, "demo")
    until = time.monotonic() + 60
    while not any((tmp_path / "made").glob(".*.tmp/**/*.jpg")):
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.wait()
    return children


def end(processes: list[psutil.Process], patience: float) -> int:
    """How many of these processes, all started by this test, are still alive after some seconds; they are ended."""
    _, alive = psutil.wait_procs(processes, timeout=patience)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
    return len(alive)


def test_number_of_workers_does_not_matter(few: str, tmp_path: Path) -> None:
    """The data is a function of its seed: made on any machine, with any number of processes, it is the same to the byte."""
    layouts.generate(tmp_path / "one", list(layouts.DRAW), few, 1)
    layouts.generate(tmp_path / "two", list(layouts.DRAW), few, 2)
    one = digests(tmp_path / "one")
    assert one == digests(tmp_path / "two") and len(one) > 36 * len(layouts.DRAW)


def test_made_once(few: str, tmp_path: Path) -> None:
    """A set that is there is left alone, one that is missing is added."""
    layouts.generate(tmp_path, ["imagenet"], few, 1)
    before = (tmp_path / "imagenet").stat().st_mtime_ns
    layouts.generate(tmp_path, ["imagenet", "places365"], few, 1)
    assert (tmp_path / "imagenet").stat().st_mtime_ns == before and (tmp_path / "places365").is_dir()


def test_failure_leaves_nothing(few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle must not leave half a set under the set's name."""
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layouts, "write_lists", full)
    with pytest.raises(OSError, match="No space"):
        layouts.generate(tmp_path, ["coco"], few, 1)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_killed_generation_is_not_taken_for_finished(few: str, tmp_path: Path) -> None:
    """After SIGKILL there is no set; making it again gives the whole of it and clears the leftovers."""
    children = kill_midway(tmp_path)
    assert not (tmp_path / "made" / "imagenet").exists()
    end(children, patience=0)
    layouts.generate(tmp_path / "made", ["imagenet"], few, 1)
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [".lock", "imagenet"]
    assert len(read_images("imagenet", "train", tmp_path / "made" / "imagenet")) == 24


def test_killed_generation_leaves_no_process(tmp_path: Path) -> None:
    """Each kill would leave workers that hold memory until the machine is restarted."""
    assert end(kill_midway(tmp_path), patience=4) == 0


def test_two_at_once(tmp_path: Path) -> None:
    """Two `run` lines started together on a fresh machine: one makes the data, the other waits, both go on."""
    both = [start(tmp_path, "smoke") for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [".lock", "imagenet"]
    assert len(read_images("imagenet", "train", tmp_path / "made" / "imagenet")) == layouts.COUNTS["smoke"]["imagenet"][0]


# --------------------------------------------------------------------------------------------------- what is in the sets


@pytest.mark.parametrize("name", ["imagenet", "ade20k", "coco", "inat2018", "places365"])
def test_layouts_are_those_of_the_real_sets(name: str, smoke_data: Path) -> None:
    """The demo goes through the readers of the real sets, with the counts that it promises."""
    check_layout(name, smoke_data / folder_names()[name])
    if name in ("imagenet", "inat2018", "places365"):
        for split, count in zip(("train", "val"), layouts.COUNTS["smoke"][name], strict=True):
            images = read_images(name, split, smoke_data / folder_names()[name])
            assert len(images) == count and len(images.classes) >= 8 and images.labels is not None
            assert set(images.labels.tolist()) == set(range(len(images.classes)))


def test_no_image_is_shared(smoke_data: Path) -> None:
    """A picture in two sets, or in train and val, would make a score dishonest."""
    pictures = [hashlib.sha256(p.read_bytes()).hexdigest() for p in smoke_data.rglob("*.jpg")]
    assert len(pictures) == sum(sum(c) for c in layouts.COUNTS["smoke"].values()) == len(set(pictures))


def test_ade20k_labels(smoke_data: Path) -> None:
    """Backgrounds are labelled, unlabelled is little, all classes occur in train, and every label picture fits its image."""
    root = smoke_data / folder_names()["ade20k"]
    assert data_set("ade20k").classes(root) == (*BACKGROUNDS, *SHAPE_NAMES)
    pixels = np.zeros(256, np.int64)
    for path in sorted((root / "annotations/training").glob("*.png")):
        with Image.open(path) as labels, Image.open(root / "images/training" / f"{path.stem}.jpg") as image:
            assert labels.mode == "L" and labels.size == image.size
            pixels += np.bincount(np.asarray(labels).ravel(), minlength=256)
    classes = len(BACKGROUNDS) + len(SHAPE_NAMES)
    assert (pixels[1:classes + 1] > 0).all() and not pixels[classes + 1:].any()
    assert pixels[0] < 0.1 * pixels.sum() and pixels[1:len(BACKGROUNDS) + 1].sum() > 0.4 * pixels.sum()


def test_ade20k_borders_go_all_the_way_round() -> None:
    """Label 0 marks the edge of objects; an upright and a lying edge of a square are alike."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for i in range(6):
            layouts.draw_ade20k(Path(folder), "train", i)
        for path in Path(folder).rglob("*.png"):
            labels = np.asarray(Image.open(path)).astype(int)
            things = labels > len(BACKGROUNDS)
            touching = (things[1:] & (labels[:-1] > 0) & ~things[:-1]).sum()
            assert touching == 0, path.name


def annotations(root: Path, split: str) -> dict:
    return json.loads((root / f"annotations/instances_{split}2017.json").read_text())


def test_coco_annotations(smoke_data: Path) -> None:
    """Ids with gaps, images without objects, crowds as run lengths, and boxes that belong to their masks."""
    root = smoke_data / folder_names()["coco"]
    ids = [i for i, _ in data_set("coco").classes(root)]
    assert len(ids) >= 8 and ids != list(range(min(ids), min(ids) + len(ids)))
    body = annotations(root, "train")
    images = {i["id"]: i for i in body["images"]}
    assert set(images) - {a["image_id"] for a in body["annotations"]}
    assert len({a["id"] for a in body["annotations"]}) == len(body["annotations"])
    assert not set(images) & {i["id"] for i in annotations(root, "val")["images"]}
    crowds = [a for a in body["annotations"] if a["iscrowd"]]
    assert crowds
    for a in crowds:
        counts, (height, width) = a["segmentation"]["counts"], a["segmentation"]["size"]
        assert (height, width) == (images[a["image_id"]]["height"], images[a["image_id"]]["width"]) and sum(counts) == height * width
        mask = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width, order="F")
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert a["area"] == mask.sum() and a["bbox"] == [xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1]


def polygon_areas(root: Path) -> list[float]:
    """Area that pycocotools gives each polygon, over the area of the mask that it stands for."""
    coder = pytest.importorskip("pycocotools.mask")
    body = annotations(root, "train")
    images = {i["id"]: i for i in body["images"]}
    found = []
    for a in body["annotations"]:
        if not a["iscrowd"]:
            image = images[a["image_id"]]
            found.append(coder.area(coder.merge(coder.frPyObjects(a["segmentation"], image["height"], image["width"]))) / a["area"])
    return found


def test_coco_polygons_stand_for_their_masks(smoke_data: Path) -> None:
    """No polygon is of another object or fills in what hides it."""
    areas = polygon_areas(smoke_data / folder_names()["coco"])
    assert 0.8 < np.mean(areas) < 1.1 and max(areas) < 1.1


def test_coco_polygons_are_not_too_small(smoke_data: Path) -> None:
    """AP at high IoU and small objects measure against these masks."""
    assert abs(np.mean(polygon_areas(smoke_data / folder_names()["coco"])) - 1) < 0.03


def test_fine_classes_are_long_tailed_in_train_only(smoke_data: Path) -> None:
    """As iNaturalist: frequent and rare classes in train, an even validation set."""
    counts = []
    for split in ("train", "val"):
        images = read_images("inat2018", split, smoke_data / folder_names()["inat2018"])
        assert images.labels is not None
        counts.append(np.bincount(images.labels))
    train, val = counts
    assert len(train) == len(val) >= 24 and train.max() >= 5 * train.min() > 0 and val.max() - val.min() <= 1
