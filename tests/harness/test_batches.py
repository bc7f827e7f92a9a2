"""A global batch in parts: on one device after the other, on several processes, and when memory gives out, the step is the same."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import RECIPE, train, train_probe
from torch import Tensor, nn

from harness.batches import parts_of, positions, summing
from harness.data import ImageList
from harness.plugins import Session
from harness.ranks import number_from
from harness.run import check_environment
from harness.samples import Samples
from harness.spec import JobFailed, UserError
from harness.train import fit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 images."""
    root = tmp_path_factory.mktemp("batches")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / "images" / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Tensor]:
    """Weights after training with the batch in one part."""
    return train(place / "whole", place / "images")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two states, relative to how far training moved the weights' own scale."""
    return max(((a[k] - b[k]).abs().max() / (b[k].abs().max() + 1e-3)).item() for k in b)


def test_a_batch_in_parts_makes_the_same_step(place: Path, whole: dict[str, Tensor]) -> None:
    """Parts hide different numbers of patches: each counts by its own number, or the step would depend on the machine."""
    lines: list[str] = []
    assert distance(train(place / "parts", place / "images", micro_batch=3, log=lines.append), whole) < 2e-5
    assert any("4 micro-batches of 3 on 1 process" in line for line in lines), lines
    assert distance(train(place / "wrong", place / "images", micro_batch=3, weighted=False), whole) > 2e-4  # what a mean of means would give


def test_four_processes_equal_one_with_four_parts(place: Path, whole: dict[str, Tensor]) -> None:
    """With gloo; with dropped paths too, which are drawn for each part; with a batch norm, which sees the whole batch; and short of memory."""
    command = [sys.executable, str(Path(__file__).with_name("processes.py")), "4", str(place)]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    states = [torch.load(place / f"plain-{rank}.pt", weights_only=True) for rank in range(4)]
    assert distance(states[0], whole) < 2e-5
    assert all(torch.equal(states[0][k], s[k]) for s in states[1:] for k in s)
    dropped = train(place / "dropped", place / "images", dataclasses.replace(RECIPE, drop_path=0.5), micro_batch=3)
    assert distance(torch.load(place / "dropped-0.pt", weights_only=True), dropped) < 2e-5 < distance(dropped, whole)
    normed = train_probe(place / "probe", place / "images")
    assert max(distance(torch.load(place / f"probe-{rank}.pt", weights_only=True), normed) for rank in range(4)) < 2e-5
    for rank in range(4):  # sums that torch's DDP makes in the backward pass of the last part are those that are made after it
        early, late, again = torch.load(place / f"early-{rank}.pt", weights_only=True)
        assert distance(early, late) < 2e-5
        assert all(torch.equal(early[k], again[k]) for k in early)  # stopped after its first step
    for rank in range(4):  # one ran out of memory in its first part: all of them split the batch, in that step already
        halved, told, small, summed = torch.load(place / f"short-{rank}.pt", weights_only=True)
        assert told == ["train: out of memory at step 0 with 3 images at a time: 2 from there on"]
        assert all(torch.equal(halved[k], small[k]) for k in small)
        assert distance(small, summed) < 2e-5  # a layer without a gradient does not hold up DDP
    assert (place / "plain-0" / "metrics.jsonl").exists() and not (place / "plain-1" / "metrics.jsonl").exists()


class Toy(nn.Module):
    """Mean of a linear map; runs out of memory above so many images."""

    def __init__(self, fits: int = 99) -> None:
        super().__init__()
        self.layer, self.fits, self.batch_coupled = nn.Linear(1, 1), fits, False

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        if len(batch["x"]) > self.fits:
            raise torch.OutOfMemoryError("as a GPU would")
        return {"loss": self.layer(batch["x"]).pow(2).mean()}


def mean_of(image: Any, rng: np.random.Generator) -> dict[str, Tensor]:
    """The mean of an image as the toy's one number."""
    return {"x": torch.tensor([float(np.asarray(image).mean()) / 255])}


def session(folder: Path, **fields: Any) -> Session:
    folder.mkdir(exist_ok=True)
    return Session(folder, 0, torch.device("cpu"), torch.float32, {}, **fields)


def test_memory_that_gives_out_splits_the_batch(place: Path, tmp_path: Path) -> None:
    """The step is done again in parts, and comes to the same weights."""
    images = ImageList(place / "images", sorted(p.name for p in (place / "images").iterdir()), None, ())
    ends, lines, facts = [], list[str](), []
    for name, fits in (("large", 99), ("small", 3)):
        torch.manual_seed(0)
        toy = Toy(fits)
        facts.append(fit(toy, images, mean_of, RECIPE, session(tmp_path / name, log=lines.append, on_oom="halve")))
        ends.append(toy.layer.weight.detach().clone())
    assert torch.allclose(ends[0], ends[1], rtol=1e-5)
    steps = [f"train: out of memory at step 0 with {before} images at a time: {after} from there on" for before, after in ((10, 5), (5, 3))]
    assert "out_of_memory" not in facts[0] and facts[1]["out_of_memory"] == steps == [line for line in lines if "memory" in line]


def test_memory_that_gives_out_ends_the_job_with_what_may_fit(place: Path, tmp_path: Path) -> None:
    """Unless --on-oom says to halve; and when one image is too much already, or in parts the loss would be another one."""
    images = ImageList(place / "images", sorted(p.name for p in (place / "images").iterdir()), None, ())
    with pytest.raises(JobFailed, match="at step 0 with 10 images at a time; 2 fit: set HARNESS_MICRO_BATCH=2 or --on-oom halve"):
        fit(Toy(3), images, mean_of, RECIPE, session(tmp_path / "fail"))
    with pytest.raises(JobFailed, match="10 images at a time, nor with one: it needs a larger device"):
        fit(Toy(0), images, mean_of, RECIPE, session(tmp_path / "none"))
    with pytest.raises(JobFailed, match="at step 0 with 1 images at a time: it needs a larger device"):
        fit(Toy(0), images, mean_of, RECIPE, session(tmp_path / "one", on_oom="halve"))
    coupled = Toy(3)
    coupled.batch_coupled = True
    with pytest.raises(JobFailed, match="at step 0 with 10 images at a time: it needs a larger device: its loss couples the images"):
        fit(coupled, images, mean_of, RECIPE, session(tmp_path / "coupled", on_oom="halve"))


class Back(nn.Module):
    """Two linear maps; runs out of memory above so many images on the way back, when the second one has its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 2), nn.Linear(2, 1)

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        middle = self.first(batch["x"])
        if len(middle) > 3:
            middle.register_hook(self.full)
        return {"loss": self.second(middle).pow(2).mean()}

    def full(self, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("as a GPU would")


def test_what_fits_is_tried_without_what_ddp_had_begun(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reducer of the failed step still there, an attempt would end in torch's "marked as ready twice". The first DDP of a process is in a cycle of
    references, whatever it was imported with: so is this one."""
    def in_cycle(objective: nn.Module) -> Any:
        whole = summing(objective)
        vars(whole)["itself"] = whole
        return whole

    images = ImageList(place / "images", sorted(p.name for p in (place / "images").iterdir()), None, ())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    monkeypatch.setattr("harness.train.processes", lambda: 2)  # of which this is the first: it trains by DDP, and is in a group of its own
    monkeypatch.setattr("harness.train.summing", in_cycle)
    gc.disable()  # as a collection may be long in coming
    try:
        with pytest.raises(JobFailed, match="at step 0 with 10 images at a time; 2 fit: set HARNESS_MICRO_BATCH=2 or --on-oom halve"):
            fit(Back(), images, mean_of, RECIPE, session(tmp_path / "back"))
    finally:
        gc.enable()
        dist.destroy_process_group()


def test_a_loss_that_couples_images_is_not_split_unless_forced(tmp_path: Path) -> None:
    """Batch norm, and what says so: their parts would be another loss without a word."""
    for objective in (nn.BatchNorm1d(2), type("Contrastive", (nn.Module,), {"batch_coupled": True})()):
        assert parts_of(10, session(tmp_path), objective) == 1
        with pytest.raises(JobFailed, match="couples the images"):
            parts_of(10, session(tmp_path, micro_batch=5), objective)
        assert parts_of(10, session(tmp_path, micro_batch=5, force_accumulation=True), objective) == 2
    with pytest.raises(JobFailed, match="cannot be split"):
        parts_of(10, session(tmp_path), Toy(), at_least=11)


def test_parts_share_the_positions_of_a_step() -> None:
    """Each image of a batch once, whatever the parts."""
    for parts in (1, 3, 4):
        found = positions(range(2, 4), 10, parts)
        assert len(found) == 2 * parts and sorted(p for part in found for p in part) == list(range(20, 40))


def test_repeated_augmentation_shows_each_image_so_often_in_a_row() -> None:
    """DeiT's: an epoch has as many samples and a third of the images."""
    samples = Samples(ImageList(Path(), [str(i) for i in range(12)], None, ()), lambda image, rng: {}, 0, 12, False, repeats=3)
    first = [samples.file_at(p) for p in range(12)]
    assert all(first[i] == first[i - i % 3] for i in range(12)) and len(set(first)) == 4
    assert first != [samples.file_at(p) for p in range(12, 24)]


def test_machine_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_MICRO_BATCH", "0")
    with pytest.raises(UserError, match="HARNESS_MICRO_BATCH=0: expected a whole number, 1 or more"):
        check_environment()
    monkeypatch.delenv("HARNESS_MICRO_BATCH")
    assert number_from("HARNESS_MICRO_BATCH") is None
