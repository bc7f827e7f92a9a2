"""Dense evaluations on several processes and in micro-batches: the steps of the whole batch, and each image scored once."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_data import make_ade20k, make_coco
from dense_faults import faults
from dense_processes import EVALUATORS, RECIPE, evaluate, trained

from harness.spec import JobFailed

MAKE = {"ade20k": make_ade20k, "coco": make_coco}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and what two processes have made of it."""
    folder = tmp_path_factory.mktemp("processes")
    for name, make in MAKE.items():
        make(folder / name)
    script = Path(__file__).with_name("dense_processes.py")
    done = subprocess.run([sys.executable, str(script), "2", str(folder)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", EVALUATORS)
def test_two_processes_make_the_steps_and_the_scores_of_one(name: str, place: Path, tmp_path: Path) -> None:
    """UperNet against the batch in one piece. Mask R-CNN draws the boxes of its losses part by part: against one process that takes the same parts."""
    alone = evaluate(name, tmp_path, place / name, micro_batch=3 if name == "coco" else None)
    one, two = trained(tmp_path), trained(place / f"{name}-together")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert [json.loads(line)["step"] for line in (place / f"{name}-together" / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    for rank in range(2):
        found = torch.load(place / f"{name}-{rank}.pt", weights_only=True)
        assert found["metrics"] == pytest.approx(dict(alone.metrics), abs=0.1)
        assert [found["facts"][key] for key in ("steps", "images_seen", "scored_images")] == [3, 15, 5]
    with np.load(tmp_path / "outcomes.npz") as expected, np.load(place / f"{name}-together" / "outcomes.npz") as outcomes:
        same = ("names",) if name == "ade20k" else ("images", "bbox_gt", "segm_gt")
        assert all(np.array_equal(expected[key], outcomes[key]) for key in same)
        if name == "ade20k":
            assert np.array_equal(*(np.bincount(rows["image"], rows["count"]) for rows in (expected, outcomes)))  # every pixel of every image once
    assert len(list((place / f"{name}-together" / "samples").iterdir())) == 5


def test_what_goes_wrong_in_one_process_is_met_by_all(place: Path, tmp_path: Path) -> None:
    """Its memory gives out in the first step: both take smaller parts of it, with no gradient left of the first try. Its loss is lost: both go back."""
    for rank in range(2):
        assert torch.load(place / f"told-{rank}.pt", weights_only=True) == (
            ["train: out of memory at step 0 with 3 images at a time: 2 from there on"],
            ["loss not finite at step 2 of 2: went on from step 0, without the batches in between (2)"],
        )
    halved, small = trained(place / "coco-short"), trained(place / "coco-small")
    assert all(torch.equal(halved[key], value) for key, value in small.items())
    with faults(shift=10):
        evaluate("ade20k", tmp_path, place / "ade20k", dataclasses.replace(RECIPE, iterations=2))
    for key, value in trained(tmp_path).items():
        torch.testing.assert_close(trained(place / "ade20k-lost")[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_what_couples_a_batch_is_not_split_on_one_device(place: Path, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="its loss couples the images of a batch: 5 in 2 parts on 1 process"):
        evaluate("ade20k", tmp_path, place / "ade20k", micro_batch=3)
