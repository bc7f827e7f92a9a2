"""mCE and top-1 among a subset of the classes, as the benchmarks' own code computes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from known_answers import cases, golden, golden_csv
from timm.data import ImageNetInfo

from evals.robustness import places_among
from evals.robustness_metrics import ALEXNET_ERROR, corruption_errors, mean_corruption_error, mean_error, predict_among, top1_among
from harness.data import ImageList

ARRAYS = golden("robustness_metrics")
PRECISIONS = (np.float32, np.float64)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mce_is_augmixs(precision: type) -> None:
    """A mean of ratios, each over AlexNet's error; the unnormalised error is another number."""
    corruptions = [str(name) for name in ARRAYS["corruptions"]]
    accuracy = dict(zip(corruptions, ARRAYS["accuracy"].astype(precision), strict=True))
    reference = dict(zip(corruptions, ARRAYS["alexnet_error"].tolist(), strict=True))
    tolerance = 1e-12 if precision is np.float64 else 1e-6
    assert mean_corruption_error(accuracy, reference) == pytest.approx(float(ARRAYS["mce"]), rel=tolerance)
    assert list(corruption_errors(accuracy, reference).values()) == pytest.approx(ARRAYS["ce_per_corruption"].tolist(), rel=tolerance)
    assert mean_error(accuracy) == pytest.approx(float(ARRAYS["mean_error_unnormalised"]), rel=tolerance)


def test_alexnets_errors_are_the_published() -> None:
    """They are the unit of the metric: AlexNet itself has 100."""
    assert dict(ALEXNET_ERROR) == {row["corruption"]: float(row["alexnet_error"]) for row in golden_csv("imagenet_c_alexnet")}
    assert mean_corruption_error({name: [1 - error] * 5 for name, error in ALEXNET_ERROR.items()}) == pytest.approx(100)


def test_another_set_of_corruptions_is_refused() -> None:
    """A mean over fourteen, or with an extra one, is not mCE."""
    accuracy = {name: [0.5] * 5 for name in ALEXNET_ERROR}
    with pytest.raises(ValueError, match="missing fog; not part of it: spatter"):
        mean_corruption_error({("spatter" if name == "fog" else name): values for name, values in accuracy.items()})
    with pytest.raises(ValueError, match="as many severities"):
        mean_corruption_error({**accuracy, "fog": [0.5] * 4})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("benchmark", cases(ARRAYS))
def test_top1_is_among_the_subsets_classes(benchmark: str, precision: type) -> None:
    """The other reading, over all classes, is another number."""
    indices, logits, target = (ARRAYS[f"{benchmark}/{key}"] for key in ("indices", "logits", "target_in_subset"))
    logits = logits.astype(precision)
    np.testing.assert_array_equal(predict_among(logits, indices), ARRAYS[f"{benchmark}/prediction_in_subset"])
    assert top1_among(logits, indices, target) == pytest.approx(float(ARRAYS[f"{benchmark}/top1"]), rel=1e-12)
    everything = np.arange(logits.shape[1])
    assert top1_among(logits, everything, indices[target]) == pytest.approx(float(ARRAYS[f"{benchmark}/top1_over_all_1000"]), rel=1e-12)


@pytest.mark.parametrize("benchmark", cases(ARRAYS))
def test_classes_of_the_subsets_are_the_benchmarks_in_our_order(benchmark: str) -> None:
    """Folders in the order of their names are the benchmark's own numbering, and each finds its place among ImageNet's thousand."""
    rows = golden_csv(f"{benchmark}_classes")
    folders, places = [row["wnid"] for row in rows], [int(row["imagenet_index"]) for row in rows]
    assert [int(row["subset_index"]) for row in rows] == list(range(200)) and folders == sorted(folders)
    images = ImageList(Path(), (), np.zeros(0, dtype=np.int64), tuple(folders))
    model = SimpleNamespace(classes=tuple(ImageNetInfo("imagenet-1k").label_names()))
    assert places_among(images, model, benchmark).tolist() == places == ARRAYS[f"{benchmark}/indices"].tolist()
