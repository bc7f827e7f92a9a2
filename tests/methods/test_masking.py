"""Masks against those of BEiT's code, number by number and as a distribution."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from known_answers import cases, golden

from methods.masking import Algorithm1, BlockMask, block_mask, masked_indices, random_mask, scaled

ARRAYS = golden("beit_masking")
CASES = cases(ARRAYS)


def generator_of(case: str) -> BlockMask:
    height, width, target, minimum, maximum = (int(v) for v in ARRAYS[f"{case}/config_height_width_target_min_max"])
    return BlockMask(height, width, target, minimum, None if maximum < 0 else maximum)


@pytest.mark.parametrize("case", CASES)
def test_masks_are_the_originals_number_by_number(case: str) -> None:
    """Same masks and the same count of numbers drawn from Python's generator."""
    make, rng = generator_of(case), random.Random(int(ARRAYS[f"{case}/python_random_seed"]))
    packed = ARRAYS[f"{case}/masks_packed"]
    masks = np.stack([make(rng).reshape(-1) for _ in range(len(packed))])
    expected = np.unpackbits(packed, axis=1)[:, : make.height * make.width]
    np.testing.assert_array_equal(masks, expected.astype(bool))
    np.testing.assert_array_equal(masks.sum(1), ARRAYS[f"{case}/counts"])
    assert [rng.random() for _ in range(3)] == ARRAYS[f"{case}/next_random"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_masks_of_a_sample_have_the_originals_distribution(case: str) -> None:
    """Drawn from the sample's own numpy generator: number hidden, how often it stops early, the map, and how much hangs together."""
    make, n, rng = generator_of(case), 1500, np.random.default_rng(1)
    masks = np.stack([block_mask(rng, make) for _ in range(n)]).reshape(n, make.height, make.width)
    stat = {key.removeprefix(f"{case}/stat/"): value for key, value in ARRAYS.items() if key.startswith(f"{case}/stat/")}
    both = 1 / n + 1 / int(stat["number_of_masks"])  # two samples, each with its own error
    hidden = masks.sum(axis=(1, 2))
    pairs = {"horizontal": masks[:, :, 1:] & masks[:, :, :-1], "vertical": masks[:, 1:] & masks[:, :-1]}
    means = {"count": hidden, **{f"{way}_pairs": pair.sum(axis=(1, 2)) for way, pair in pairs.items()}}
    for name, counts in means.items():
        mean, deviation = stat[f"{name}_mean_std"]
        assert abs(counts.mean() - mean) <= 4 * deviation * both**0.5, f"{name}: {counts.mean()}, the original's {mean}"
    histogram = stat["count_histogram"] / stat["count_histogram"].sum()
    for name, found, p in (("map", masks.mean(axis=0), stat["probability_map"]), ("counts", np.bincount(hidden, minlength=len(histogram)) / n, histogram)):
        assert (np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) * both) + 3 / n).all(), name
    assert hidden.max() <= make.target and (hidden < make.target).mean() == pytest.approx(1 - histogram[make.target], abs=5 * (0.25 * both) ** 0.5)


@pytest.mark.parametrize("grid", [(14, 14), (6, 9)])
def test_masks_of_the_papers_algorithm_hide_more_than_the_codes(grid: tuple[int, int]) -> None:
    """It goes on until more than 40 % is hidden and may overshoot by its last rectangle, where the code stops at 38 % or before."""
    rng, patches = np.random.default_rng(3), grid[0] * grid[1]
    smallest = scaled(16, patches)
    masks = np.stack([block_mask(rng, Algorithm1(*grid, smallest)) for _ in range(300)])
    hidden = masks.sum(axis=1)
    assert (hidden > 0.4 * patches).all() and len(set(hidden)) > 3 and 0.4 < hidden.mean() / patches < 0.55
    assert masks.mean(axis=0).min() > 0.01  # every patch is hidden now and then
    assert block_mask(np.random.default_rng(0), BlockMask(*grid, scaled(75, patches), smallest)).sum() <= 0.4 * patches
    rows = [m.reshape(grid) for m in masks]
    assert np.mean([(r[1:] & r[:-1]).sum() for r in rows]) > 0.6 * hidden.mean()  # in blocks


def test_counts_scale_with_the_grid() -> None:
    """75 and 16 of 196 in the papers; a small grid hides the same fraction."""
    assert (scaled(75, 196), scaled(16, 196), scaled(75, 64), scaled(16, 64), scaled(16, 4)) == (75, 16, 24, 5, 1)


def test_random_mask_hides_exactly_as_many() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([random_mask(rng, 64, 24) for _ in range(400)])
    assert (masks.sum(1) == 24).all() and np.abs(masks.mean(0) - 24 / 64).max() < 0.13


def test_indices_are_the_hidden_patches_in_order() -> None:
    """Targets and predictions are matched by these: row order, padded to a static length."""
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    index, valid = masked_indices(mask, 3)
    assert index[0].tolist() == [1, 2, 4] and index[1, 0].item() == 0
    assert valid.tolist() == [[True, True, True], [True, False, False]]
