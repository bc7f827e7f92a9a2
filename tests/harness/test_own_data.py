"""A user's own pictures: pre-training on an unlabelled folder, scores on a class folder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def pictures(smoke_data: Path, tmp_path: Path) -> Path:
    """Nested, mixed formats and modes, a file that is no picture."""
    root = tmp_path / "my pictures"
    for i, path in enumerate(sorted((smoke_data / "imagenet" / "train").rglob("*.jpg"))[:40]):
        image = Image.open(path)
        place = root / ("a" if i % 2 else "a/b c") / f"{i}.{('jpg', 'png', 'webp', 'bmp')[i % 4]}"
        place.parent.mkdir(parents=True, exist_ok=True)
        (image.convert("L") if i % 5 == 0 else image).resize((50 + i, 90 - i)).save(place)
    (root / "notes.txt").write_text("not a picture")
    return root


def test_pretrain_on_a_folder_and_score_a_class_folder(harness: Call, smoke_data: Path, pictures: Path, tmp_path: Path) -> None:
    """The line of the README, and the folder's place is no part of the identity: moving it trains nothing again."""
    import shutil

    classes = tmp_path / "classes"
    for folder in sorted((smoke_data / "imagenet" / "train").iterdir())[:3]:
        shutil.copytree(folder, classes / folder.name)
    line = ("run", "--protocol", "smoke", "--methods", "rotation", "--evals", f"imagefolder:{classes}", "--set", "rotation.recipe.iterations=2")
    settings = ("--set", f"imagefolder:{classes}.recipe.iterations=2")
    done = harness(*line, *settings, "--pretrain-data", str(pictures))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pre-trained on my pictures" in done.stdout
    [record] = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("pretrain-*/record.json")]
    assert set(record["identity"]["data"]) == {"folder"}
    moved = pictures.rename(tmp_path / "elsewhere")
    again = harness(*line, *settings, "--pretrain-data", str(moved))
    assert again.returncode == 0 and "done before, 0 to do" not in again.stderr and "started" not in again.stderr


def test_labels_cannot_come_from_an_unlabelled_folder(harness: Call, pictures: Path) -> None:
    done = harness("run", "--protocol", "smoke", "--methods", "supervised", "--evals", "nearest-mean", "--pretrain-data", str(pictures))
    assert done.returncode == 2 and "--pretrain-data: Supervised trains on labels" in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_without_pictures(harness: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = harness("run", "--protocol", "smoke", "--methods", "rotation", "--evals", "nearest-mean", "--pretrain-data", "empty")
    assert done.returncode == 2 and "empty: no images" in done.stderr
