"""`data verify` lists what is wrong with a folder: each way to break one is found and named by its file, and nothing else is."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sets.verify import compare_counts, verify
from harness.data import folder_names


@pytest.mark.parametrize("name", ["imagenet", "ade20k", "coco", "inat2018", "places365"])
def test_generated_sets_are_in_order(name: str, smoke_data: Path) -> None:
    """No false alarm, every image looked at."""
    seen: list[int] = []
    assert verify(name, smoke_data / folder_names()[name], seen.append) == []
    assert len(seen) == len(list((smoke_data / folder_names()[name]).rglob("*.jpg")))


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:200])
    return path


def relabel(path: Path, value: int) -> Path:
    labels = np.asarray(Image.open(path)).copy()
    labels[0, 0] = value
    Image.fromarray(labels).save(path)
    return path


def shift(path: Path) -> Path:
    labels = np.asarray(Image.open(path)).copy()
    labels[0, 0] = 0
    Image.fromarray(labels - np.uint8(1)).save(path)
    return path


def shrink(path: Path) -> Path:
    with Image.open(path) as labels:
        smaller = labels.crop((0, 0, labels.width - 1, labels.height))
    smaller.save(path)
    return path


def gone(path: Path) -> Path:
    path.unlink()
    return path


def empty(folder: Path) -> Path:
    for path in sorted(folder.iterdir()):
        path.unlink()
    return folder.parent


def widow(root: Path) -> Path:
    return root / "annotations/training" / f"{gone(first(root / 'images/training', '*.jpg')).stem}.png"


def edit(root: Path, change: Callable[[dict], None]) -> Path:
    path = root / "annotations/instances_train2017.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    return path


BREAKAGES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "truncated image": ("imagenet", lambda r: truncate(first(r / "val", "*.jpg")), "cannot be read"),
    "emptied class": ("imagenet", lambda r: empty(r / "train/star"), "'star' has no training image"),
    "listed image missing": ("places365", lambda r: gone(first(r / "data_256_standard", "*.jpg")), "missing"),
    "image of the json missing": ("inat2018", lambda r: gone(first(r, "val_*.jpg")), "missing"),
    "label above the classes": ("ade20k", lambda r: relabel(first(r / "annotations/training", "*.png"), 77), "label 77 is above the number of classes"),
    "labels shifted already": ("ade20k", lambda r: shift(first(r / "annotations/validation", "*.png")), "shifted by one already?"),
    "mask of another size": ("ade20k", lambda r: shrink(first(r / "annotations/validation", "*.png")), "pixels, its image has"),
    "annotation missing": ("ade20k", lambda r: gone(first(r / "annotations/validation", "*.png")), "missing"),
    "image of an annotation missing": ("ade20k", widow, "no image"),
    "broken scene": ("coco", lambda r: truncate(first(r / "val2017", "*.jpg")), "cannot be read"),
    "unknown image": ("coco", lambda r: edit(r, lambda b: b["annotations"][0].update(image_id=10**9)), "names image 1000000000"),
    "unknown category": ("coco", lambda r: edit(r, lambda b: b["annotations"][0].update(category_id=4)), "names category 4"),
    "wrong size": ("coco", lambda r: edit(r, lambda b: b["images"][0].update(width=7)).parents[1] / "train2017", "says 7x"),
    "flat box": ("coco", lambda r: edit(r, lambda b: b["annotations"][0].update(bbox=[1, 1, 0, 5])), "box without area"),
    "box outside": ("coco", lambda r: edit(r, lambda b: b["annotations"][0].update(bbox=[1, 1, 999, 5])), "box outside"),
    "no polygon": ("coco", lambda r: edit(r, lambda b: b["annotations"][0].update(iscrowd=0, segmentation=[[1, 1, 2, 2]])), "fewer than three corners"),
}


@pytest.mark.parametrize("case", BREAKAGES)
def test_breakage_is_found_and_named(case: str, smoke_data: Path, tmp_path: Path) -> None:
    """Each damage of a download or of an edit is listed with the file that it is in."""
    name, damage, words = BREAKAGES[case]
    root = tmp_path / folder_names()[name]
    shutil.copytree(smoke_data / folder_names()[name], root)
    path = damage(root)
    found = verify(name, root)
    assert any(words in line and str(path) in line for line in found), found


def ade20k(root: Path, count: int, labels: list[int], classes: int = 3) -> Path:
    """A set of `count` scenes of 2x2 pixels in each split, in which these labels occur."""
    root.mkdir()
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0\t1\t1\t0\tc{i}" for i in range(1, classes + 1))]
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (2, 2)).save(root / "images" / split / f"{i:03}.jpg")
            Image.fromarray(np.full((2, 2), labels[i % len(labels)], np.uint8)).save(root / "annotations" / split / f"{i:03}.png")
    return root


@pytest.mark.parametrize(("labels", "found"), [([0, 1, 2], True), ([1, 2, 3], False), ([0, 1, 2, 3], False), ([0, 1], False)])
def test_a_set_whose_labels_were_shifted_before_is_found_without_a_single_label_out_of_range(labels: list[int], found: bool, tmp_path: Path) -> None:
    """Each class would be trained and scored under its neighbour's name, and the first one ignored: no number would look wrong."""
    problems = verify("ade20k", ade20k(tmp_path / "set", 100, labels))
    assert [line.partition(": ")[0] for line in problems] == ([str(tmp_path / "set/annotations/training")] if found else [])
    assert verify("ade20k", ade20k(tmp_path / "few", 99, labels)) == []  # too few to tell


def test_more_classes_than_a_shifted_label_can_number_are_refused(tmp_path: Path) -> None:
    (problem,) = verify("ade20k", ade20k(tmp_path / "set", 2, [1, 2], 256))
    assert "256 classes: at most 255" in problem
    assert verify("ade20k", ade20k(tmp_path / "most", 2, [1, 2], 255)) == []


def test_the_official_counts_of_ade20k_are_20210_and_2000_images_of_150_classes(tmp_path: Path) -> None:
    problems, remarks = compare_counts("ade20k", ade20k(tmp_path / "part", 2, [1, 150], 150))
    assert len(problems) == 2 and "the official ade20k 20210 of 150" in problems[0] and "2000 of 150" in problems[1] and not remarks
    assert "another set" in compare_counts("ade20k", ade20k(tmp_path / "own", 2, [1, 2], 9))[1][0]


def test_all_problems_are_listed_and_not_the_first_only(smoke_data: Path, tmp_path: Path) -> None:
    """Mending a download one file per run would take days."""
    root = tmp_path / "imagenet"
    shutil.copytree(smoke_data / "imagenet", root)
    broken = [truncate(p) for p in sorted((root / "val").rglob("*.jpg"))[:5]]
    assert len(verify("imagenet", root)) == len(broken) == 5


def test_an_empty_split_is_listed_beside_other_problems(smoke_data: Path, tmp_path: Path) -> None:
    """A missing validation split and a wrong label: both are listed."""
    root = tmp_path / "ade"
    shutil.copytree(smoke_data / folder_names()["ade20k"], root)
    relabel(first(root / "annotations/training", "*.png"), 77)
    for kind in ("images", "annotations"):
        shutil.rmtree(root / kind / "validation")
    found = verify("ade20k", root)
    assert any("label 77" in line for line in found) and any("validation" in line for line in found)


@pytest.mark.parametrize("name", ["imagenet", "coco", "ade20k", "places365", "inat2018"])
def test_a_folder_of_another_layout_is_a_problem_and_no_crash(name: str, tmp_path: Path) -> None:
    """Any folder can be given by mistake."""
    (tmp_path / "notes.txt").write_text("")
    assert len(verify(name, tmp_path)) == 1
    assert len(verify(name, tmp_path / "nowhere")) >= 1


def test_command_says_so_and_exits_with_1(harness: Callable[..., subprocess.CompletedProcess[str]], smoke_data: Path, tmp_path: Path) -> None:
    """Scripts rely on the exit code; the problems go to stdout, one line each."""
    root = tmp_path / "data"
    shutil.copytree(smoke_data / "imagenet", root / "imagenet")
    done = harness("data", "verify", "all", "--data", str(root))
    assert done.returncode == 0 and done.stdout.startswith("imagenet: in order"), done.stderr
    path = truncate(first(root / "imagenet/train", "*.jpg"))
    done = harness("data", "verify", "imagenet", "--data", str(root))
    assert done.returncode == 1 and str(path) in done.stdout and "imagenet: 1 problem in" in done.stdout and "Traceback" not in done.stderr
    done = harness("data", "verify", "imagnet", "--data", str(root))
    assert done.returncode == 2 and "did you mean imagenet" in done.stderr
