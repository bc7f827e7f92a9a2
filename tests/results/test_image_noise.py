"""The bootstrap over test images: the scores that it draws are those of the benchmarks, and it refuses what it cannot redo."""

from pathlib import Path

import numpy as np
import pytest

from results.image_noise import average_precision, mean_iou, noise, top1


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_standard_error_of_a_share(tmp_path: Path) -> None:
    # The bootstrap of a share has the binomial standard error sqrt(p (1 - p) / n): 2.5 points for 400 images at 50 %.
    half, label = np.arange(400) % 2 == 0, np.zeros(400, dtype=int)
    files = {"a": (saved(tmp_path / "a.npz", correct=half, label=label), 50.0), "b": (saved(tmp_path / "b.npz", correct=half, label=label), 50.0)}
    (a, b), reason = noise(files, "top-1", "a")
    assert reason == "" and a.std == pytest.approx(2.5, abs=0.4)
    # Equally right on each image: paired draws leave no noise in the difference at all, unpaired ones would leave 3.5 points.
    assert (b.gap, b.ci95) == (0.0, (0.0, 0.0)) and (a.gap, a.ci95) == (None, None)


def test_an_image_of_weight_two_counts_as_two(tmp_path: Path) -> None:
    assert top1(np.array([True, False]))(np.array([2, 1])) == pytest.approx(200 / 3)


def test_mean_iou_of_a_confusion_by_hand() -> None:
    # Image 0: class 0 has 3 right, 1 taken for class 1. Image 1: class 1 has 4 right. IoU 3/4 and 4/5; without image 0: class 1 alone, 1.
    arrays = {"names": np.array(["x", "y"]), "image": np.array([0, 0, 1]), "gt": np.array([0, 0, 1]), "pred": np.array([0, 1, 1]), "count": np.array([3, 1, 4])}
    score = mean_iou(arrays)
    assert score(np.array([1, 1])) == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    assert score(np.array([0, 2])) == 100.0


def test_average_precision_by_cocos_rules() -> None:
    # One category, two objects in two images. Detections by score: right (all IoUs), wrong, right (IoU 0.50 only).
    arrays = {
        "images": np.array([7, 9]), "bbox_dt": np.array([[7, 1, 900000], [9, 1, 800000], [9, 1, 700000]]), "bbox_gt": np.array([[7, 1, 1], [9, 1, 1]]),
        "bbox_matched": np.array([1023, 0, 1], dtype=np.uint16), "bbox_ignored": np.zeros(3, dtype=np.uint16),
    }
    score = average_precision(arrays, "bbox")
    # IoU 0.50: precision 1 up to recall 0.5 (51 of 101 points), then 2/3 (50 points); other IoUs: 1 on 51 points, then 0.
    assert score(np.array([1, 1])) == pytest.approx(100 * ((51 + 50 * 2 / 3) + 9 * 51) / 1010)
    assert score(np.array([3, 0])) == pytest.approx(100.0)


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    right, label = np.ones(4, dtype=bool), np.zeros(4, dtype=int)
    a, b = saved(tmp_path / "a.npz", correct=right, label=label), saved(tmp_path / "b.npz", correct=right, label=label + 1)
    assert noise({"a": (a, 100.0), "b": (b, 100.0)}, "top-1", "a") == ([], "not scored on the same images")
    assert noise({"a": (a, 73.0), "b": (b, 100.0)}, "top-1", "a")[1] == "the outcomes of a give 100.00, its record says 73.00"
    assert noise({"a": (a, 100.0)}, "mCE", "a") == ([], "no outcomes of single images for mCE")
    assert noise({"a": (tmp_path / "gone.npz", 1.0)}, "top-1", "a")[1].startswith("outcomes of a cannot be read")
    assert noise({"a": (saved(tmp_path / "d.npz", correct=right), 100.0)}, "top-1", "a") == ([], "no outcomes of single images for top-1")


@pytest.mark.parametrize("left", [0, 30, 200, -60])
def test_a_damaged_file_is_refused_with_the_reason(left: int, tmp_path: Path) -> None:
    # A disk that ran full; NumPy answers with EOFError, BadZipFile or ValueError, as it comes.
    path = saved(tmp_path / "a.npz", correct=np.ones(400, dtype=bool), label=np.zeros(400, dtype=int))
    path.write_bytes(path.read_bytes()[:left])
    found, reason = noise({"a": (path, 100.0)}, "top-1", "a")
    assert found == [] and reason.startswith("outcomes of a cannot be read")
