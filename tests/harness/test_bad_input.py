"""Bad input: one line on stderr that names the flag or file and the remedy, exit code 2, nothing started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., subprocess.CompletedProcess[str]]


def run(methods: str = "rotation", evals: str = "nearest-mean", protocol: str = "smoke") -> tuple[str, ...]:
    return ("run", "--protocol", protocol, "--methods", methods, "--evals", evals)


pytestmark = pytest.mark.usefixtures("smoke_data")

WORDS = {
    "unknown method": ((*run(methods="rotatio"),), "did you mean rotation"),
    "unknown evaluator": ((*run(evals="ade20"),), "did you mean ade20k"),
    "unknown protocol": ((*run(protocol="smoek"),), "--protocol: unknown name 'smoek': did you mean smoke"),
    "unknown backbone": ((*run(), "--backbone", "vit-smok"), "did you mean vit-smoke"),
    "variant without its method": ((*run(methods="two"),), "unknown name 'two': did you mean rotation@two?"),
    "a variant with a hyphen": ((*run(methods="deit-distilled"),), "did you mean deit@distilled? valid: all"),
    "unknown variant": ((*run(methods="rotation@tow"),), "did you mean two"),
    "unknown launcher": ((*run(), "--launcher", "slrm"), "--launcher"),
    "unknown set field": ((*run(), "--set", "rotation.turn=2"), "did you mean turns"),
    "unknown set name": ((*run(), "--set", "rotatoin.turns=2"), "did you mean rotation"),
    "set without value": ((*run(), "--set", "rotation.turns"), "expected NAME.FIELD=VALUE"),
    "set of a wrong type": ((*run(), "--set", "rotation.turns=many"), "int"),
    "set refused": ((*run(), "--set", "rotation.recipe.batch=0"), "at least 1"),
    "an lr below 0": ((*run(methods="mae"), "--set", "mae.recipe.lr=-1"), "lr must be at least 0"),
    "a crop that is none": ((*run(methods="mae"), "--set", "mae.recipe.augment.crop_scale=3,4"), "crop_scale must be from 0 to 1"),
    "a decoder without width": ((*run(methods="mae"), "--set", "mae.decoder_width=0"), "decoder_width must be at least 4"),
    "a set value that the backbone cannot have": ((*run(methods="mae"), "--set", "mae.decoder_heads=7"), "--set mae.decoder_heads=7: a decoder of width"),
    "an image that the patch does not divide": ((*run(evals="imagenet"), "--set", "imagenet.size=37"), "--set imagenet.size=37"),
    "a variant without a name": ((*run(methods="mae@"),), "names no variant"),
    "a name that is no plugin": ((*run(methods="os:getcwd"),), "no plugin"),
    "set recipe field": ((*run(), "--set", "rotation.recipe.leaning_rate=1"), "rotation.recipe"),
    "empty methods": (("run", "--methods", ",", "--evals", "nearest-mean"), "--methods: the list is empty"),
    "empty evals": (("run", "--methods", "rotation", "--evals", ","), "--evals: the list is empty"),
    "duplicate": ((*run(methods="rotation,rotation"),), "named twice"),
    "seed no integer": ((*run(), "--seeds", "0,one"), "--seeds 0,one"),
    "seed twice": ((*run(), "--seeds", "1,1"), "each seed once"),
    "eval seed no integer": ((*run(), "--eval-seeds", "1.5"), "--eval-seeds 1.5"),
    "no methods": (("run", "--evals", "nearest-mean"), "--methods"),
    "unknown command": (("rnu",), "invalid choice"),
    "pretrain data missing": ((*run(), "--pretrain-data", "no/such"), "--pretrain-data no/such"),
    "a field out of its range": ((*run(methods="mae"), "--set", "mae.mask_ratio=5"), "mask_ratio must be between 0 and 1"),
    "a recipe of what trains nothing": ((*run(methods="scratch"), "--set", "scratch.recipe.lr=1"), "scratch has no recipe here"),
    "data missing": ((*run(), "--data", "no/such"), "--data no/such"),
    "imagefolder without argument": ((*run(evals="imagefolder"),), "imagefolder:PATH"),
}


def check(done: subprocess.CompletedProcess[str], expected: str, folder: Path) -> None:
    """One line, exit code 2, no job."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("making ")]
    assert len(lines) == 1 and lines[0].startswith("harness: "), done.stderr
    assert expected in lines[0], lines[0]
    assert done.stdout == ""
    assert not list(folder.glob("runs/*/job.json"))


@pytest.mark.parametrize("case", WORDS)
def test_words(case: str, here: Call, tmp_path: Path) -> None:
    """Mistyped names, flags and values."""
    words, expected = WORDS[case]
    check(here(*words), expected, tmp_path)


@pytest.mark.parametrize("case", ["unknown method", "no methods", "data missing"])
def test_words_to_a_process(case: str, harness: Call, tmp_path: Path) -> None:
    """What a process adds: the exit code, and what imports would say on stderr."""
    words, expected = WORDS[case]
    check(harness(*words), expected, tmp_path)


@pytest.mark.parametrize("name", ["HARNESS_MICRO_BATCH", "HARNESS_THREADS", "HARNESS_WORKERS", "HARNESS_CHECKPOINT_S"])
def test_environment(name: str, here: Call, tmp_path: Path) -> None:
    """What every job would stumble over, one after the other."""
    check(here(*run(), **{name: "abc"}), f"{name}=abc", tmp_path)


@pytest.mark.parametrize("name", ["HARNESS_CPU", "HARNESS_SHARD", "HARNESS_RECOMPUTE"])
def test_switches(name: str, here: Call, tmp_path: Path) -> None:
    """`HARNESS_CPU=no` would leave a GPU unused."""
    check(here(*run(), **{name: "no"}), f"{name}=no: expected 1", tmp_path)


def test_data_sets_are_no_classes(data: Path, here: Call, tmp_path: Path) -> None:
    """The root of several data sets would otherwise be learned as classes named coco and imagenet, with a score."""
    check(here(*run(evals=f"imagefolder:{data}")), "holds data sets (ADEChallengeData2016, coco, imagenet", tmp_path)


def test_files_in_place_of_folders(here: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check(here(*run(protocol="demo"), HARNESS_DATA="file"), "HARNESS_DATA=file: is a file", tmp_path)
    check(here("table", "--runs", "file"), "--runs file: is a file", tmp_path)
    check(here(*run(), "--pretrain-data", "file"), "--pretrain-data file: is no folder", tmp_path)
    check(here(*run(evals="imagefolder:file")), "imagefolder:file: is no folder", tmp_path)
    (tmp_path / "empty").mkdir()
    check(here("data", "verify", "--data", "empty"), "--data empty: holds none of", tmp_path)
    check(here("export", "pretrain-mae", "--to", "timm", "--out", "x", "--runs", "empty"), "--runs empty: no runs there", tmp_path)
    check(here(*run(), "--sweep", "rotation.recipe.lr="), "names no value", tmp_path)


def test_generated_data_that_lost_files(smoke_data: Path, here: Call, tmp_path: Path) -> None:
    """The default place is a cache, which other programs clean: half a set is not taken for the whole."""
    copy = tmp_path / "cache" / smoke_data.name
    shutil.copytree(smoke_data, copy)
    next((copy / "imagenet" / "train").rglob("*.jpg")).unlink()
    check(here(*run(), HARNESS_DATA=str(copy.parent)), "not as it was generated", tmp_path)
    verified = here("data", "verify", "imagenet", "--protocol", "smoke", HARNESS_DATA=str(copy.parent))
    assert verified.returncode == 1 and "not as it was generated" in verified.stdout + verified.stderr


def test_patch_that_does_not_divide_the_image() -> None:
    """A backbone whose patch does not divide the image is refused where it is written down."""
    from harness.spec import UserError, ViTConfig

    with pytest.raises(UserError, match="patch size 16 does not divide the image size 100x100"):
        ViTConfig(size=(100, 100), patch=16)


@pytest.fixture
def data(smoke_data: Path, tmp_path: Path) -> Path:
    """A copy of the ImageNet, COCO and ADE20K sets that a test may break."""
    root = tmp_path / "data"
    for name in ("imagenet", "coco", "ADEChallengeData2016", "places365"):
        shutil.copytree(smoke_data / name, root / name)
    return root


def empty(root: Path) -> str:
    shutil.rmtree(root / "imagenet")
    (root / "imagenet").mkdir()
    return "imagenet"


def flat(root: Path) -> str:
    for picture in list((root / "imagenet" / "train").rglob("*.jpg")):
        picture.rename(root / "imagenet" / "train" / picture.name)
    for folder in list((root / "imagenet" / "train").iterdir()):
        if folder.is_dir():
            folder.rmdir()
    return "no class folders"


def gone(root: Path) -> str:
    shutil.rmtree(root / "imagenet")
    return "no such folder"


def other_class(root: Path) -> str:
    folder = next((root / "imagenet" / "val").iterdir())
    folder.rename(folder.with_name("zebra"))
    return "'zebra' is no class of train"


@pytest.mark.parametrize("breakage", [empty, flat, gone, other_class])
def test_imagenet_folder(breakage: Callable[[Path], str], data: Path, here: Call, tmp_path: Path) -> None:
    """A data folder that is empty, of another layout, or missing."""
    expected = breakage(data)
    check(here(*run(), "--data", str(data)), expected, tmp_path)


def coco(data: Path, change: Callable[[dict], None]) -> Path:
    path = data / "coco" / "annotations" / "instances_val2017.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    return path


def missing_image(body: dict) -> None:
    body["annotations"][3]["image_id"] = 987_654_321


def missing_category(body: dict) -> None:
    body["annotations"][3]["category_id"] = 4


def missing_file(body: dict) -> None:
    body["images"][3]["file_name"] = "nowhere.jpg"


WRONG = [(missing_image, "names image 987654321"), (missing_category, "names category 4"), (missing_file, "nowhere.jpg: missing")]


@pytest.mark.parametrize("change,expected", WRONG)
def test_coco_references(change: Callable[[dict], None], expected: str, data: Path, here: Call, tmp_path: Path) -> None:
    """Annotations that name missing images or unknown categories."""
    coco(data, change)
    check(here(*run(evals="coco"), "--data", str(data)), expected, tmp_path)


def test_label_above_the_number_of_classes(data: Path, here: Call, tmp_path: Path) -> None:
    """Places365's list names a class that its categories do not have."""
    path = data / "places365" / "places365_val.txt"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].rsplit(" ", 1)[0] + " 999"
    path.write_text("\n".join(lines) + "\n")
    check(here(*run(evals="places365"), "--data", str(data)), "label 999 is above the number of classes", tmp_path)


def test_data_of_a_toml(data: Path, here: Call, tmp_path: Path) -> None:
    """An unknown name in the TOML, and a TOML that is none."""
    toml = tmp_path / "data.toml"
    toml.write_text(f'imagnet = "{data / "imagenet"}"\n')
    check(here(*run(), "--data", str(toml)), "did you mean imagenet", tmp_path)
    toml.write_text("imagenet = [")
    check(here(*run(), "--data", str(toml)), "not a TOML file", tmp_path)


def test_runs_folder(here: Call, tmp_path: Path) -> None:
    """--runs that is a file, that a newer version made, that holds a record of another schema."""
    (tmp_path / "file").write_text("")
    check(here(*run(), "--runs", "file"), "--runs file: is a file", tmp_path)
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / ".harness.json").write_text('{"layout": 99}')
    check(here(*run(), "--runs", "newer"), "newer version", tmp_path)
    check(here("table", "--runs", "newer"), "newer version", tmp_path)
    check(here("table", "--runs", "nowhere"), "no such folder", tmp_path)


def test_record_of_another_schema(harness: Call, here: Call, tmp_path: Path) -> None:
    """A record that another version wrote is neither read as if it were ours nor overwritten."""
    line = (*run(), "--set", "rotation.recipe.iterations=1", "--set", "nearest-mean.images=5", "--runs", "old")
    assert harness(*line, "--launcher", "debug").returncode == 0
    path = next((tmp_path / "old").glob("evaluate-*/record.json"))
    body = path.read_text().replace('"schema": 1', '"schema": 0', 1)
    path.write_text(body)
    check(here(*line), "record of schema version 0", tmp_path)
    check(here("table", "--runs", "old"), "record of schema version 0", tmp_path)
    assert path.read_text() == body


def test_damaged_files_in_runs(harness: Call, here: Call, tmp_path: Path) -> None:
    """`table` names the damaged file; `status`, which is there to find such things, goes on and shows it."""
    line = (*run(), "--set", "rotation.recipe.iterations=1", "--set", "nearest-mean.images=5")
    assert harness(*line, "--launcher", "debug").returncode == 0
    above = next((tmp_path / "runs").glob("pretrain-*/record.json"))
    text = above.read_text()
    above.write_text('{"b')
    done = here("table")
    assert done.returncode == 0 and "top-1" in done.stdout and str(above.relative_to(tmp_path)) in done.stderr and done.stderr.count("\n") == 1
    above.write_text(text)
    record = next((tmp_path / "runs").glob("evaluate-*/record.json"))
    whole = json.loads(record.read_text())
    for body in ({"schema": 1}, {**whole, "metrics": None}, {**whole, "metrics": [1]}, {**whole, "metrics": {"top-1": "?"}}, {**whole, "about": 3}):
        record.write_text(json.dumps(body))
        done = here("table")
        assert done.returncode == 2 and "record.json" in done.stderr and done.stderr.count("\n") == 1
        status = here("status")
        assert status.returncode == 0 and status.stdout.count("damaged") >= 1 and status.stdout.count("done") == 1
    record.unlink()
    (record.parent / "usage.json").write_text("{}")
    assert here("table").returncode in (0, 1)
    job = record.with_name("job.json")
    whole = json.loads(job.read_text())
    for body in ({**whole, "parents": [1]}, {**whole, "parents": {"checkpoint": 1}}, {k: v for k, v in whole.items() if k != "name"}):
        job.write_text(json.dumps(body))
        done = here("table")
        assert done.returncode == 2 and "job.json" in done.stderr and done.stderr.count("\n") == 1
        assert here("status").returncode == 0
    job.write_text(json.dumps(whole))
    (record.parent / "lock").unlink(missing_ok=True)
    (record.parent / "lock").mkdir()
    assert "lock: is a folder" in here("status").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only folder and a small file system are made by mounting, which root alone may")
def test_read_only_and_full_runs(here: Call, tmp_path: Path) -> None:
    """--runs on a read-only and on a full file system (permissions do not stop root, so real mounts are used)."""
    place = tmp_path / "mounted"
    place.mkdir()
    for options, expected in (("ro,size=1m", "cannot be written"), ("size=500k", "cannot be written"), ("size=8m", "MB free")):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            check(here(*run(), "--runs", str(place)), expected, tmp_path)
        finally:
            subprocess.run(["umount", str(place)], check=True)
