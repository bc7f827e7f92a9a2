"""Training states: written beside the training, whole or not at all; a full disk and a loss that is not finite leave the last good one."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from harness import checkpoint
from harness.checkpoint import States
from harness.data import ImageList
from harness.plugins import Session
from harness.restarts import NotFinite
from harness.spec import JobFailed, Recipe
from harness.train import fit


def test_training_goes_on_while_a_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns before the file is there, what is written is what was there then, and there is one write at a time."""
    gate, write = threading.Event(), checkpoint.write_atomically

    def slow(path: Path, how: Any) -> None:
        assert gate.wait(30)
        write(path, how)

    monkeypatch.setattr(checkpoint, "write_atomically", slow)
    model = nn.BatchNorm1d(3)
    states, weights = States(tmp_path / "train"), {"model": model.state_dict(), "facts": {"seconds": 1.5, "parts": [1, 2]}}
    states.save(1, weights)
    with torch.no_grad():
        model.weight.fill_(7.0)
    assert list((tmp_path / "train").iterdir()) == []
    gate.set()
    for step in (2, 3):
        states.save(step, weights)
    states.wait()
    assert [p.name for p in sorted((tmp_path / "train").iterdir())] == ["state-000000002.pt", "state-000000003.pt"]
    first = tmp_path / "first"
    states = States(first)
    states.save(1, {"model": model.state_dict(), "facts": {"seconds": 1.5, "parts": [1, 2]}})
    with torch.no_grad():
        model.weight.fill_(8.0)
    states.wait()
    found = states.latest()
    assert found is not None and found[0] == 1 and found[1]["facts"] == {"seconds": 1.5, "parts": [1, 2]}
    assert torch.equal(found[1]["model"]["weight"], torch.full((3,), 7.0)) and found[1]["model"]._metadata == model.state_dict()._metadata


class Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, stream: IO[bytes], room: int) -> None:
        self.stream, self.room = stream, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def test_a_full_disk_is_one_clear_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before writing, or while; earlier states can be read, and no half of one is left."""
    states, state = States(tmp_path), {"weights": torch.arange(50_000)}
    for step in (1, 2):
        states.save(step, state)
    states.wait()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10 * 2**20))
        with pytest.raises(JobFailed, match=r"disk full: a training state takes 0 MB, 10 MB are free in .*the last good state is of step 2"):
            states.save(3, state)
    write = checkpoint.write_atomically
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", lambda path, how: write(path, lambda stream: how(Full(stream, 100_000))))
        states.save(3, state)
        with pytest.raises(JobFailed, match=r"disk full in .*the last good state is of step 2"):
            states.wait()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    states.save(3, state)  # there is room again
    states.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-000000002.pt", "state-000000003.pt"]


def test_milestones_stay_and_are_gone_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first state of each quarter but the first stays beside the last two, to go back to when those are damaged. A full disk takes them first."""
    states = States(tmp_path, total=100, milestones=4)
    for step in range(3, 93, 6):
        states.save(step, {"step": step, "weights": torch.zeros(1000)})
        states.wait()
    kept = [27, 51, 75, 81, 87]
    assert [states.step_of(p) for p in sorted(tmp_path.iterdir())] == kept
    for step in (81, 87):
        (tmp_path / f"state-{step:09d}.pt").write_bytes(b"half of it")
    with pytest.warns(UserWarning, match="is damaged"):
        found = states.latest()
    assert found is not None and (found[0], found[1]["step"]) == (75, 75)
    usage = shutil.disk_usage(tmp_path)
    room = {5: 10 * 2**20, 4: 16 * 2**20}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=room.get(len(list(folder.iterdir())), 17 * 2**20)))
    states.save(93, {"step": 93})
    states.wait()
    assert [states.step_of(p) for p in sorted(tmp_path.iterdir())] == [51, 75, 87, 93]
    monkeypatch.undo()
    (tmp_path / ".state-000000099.pt.7.tmp").write_bytes(b"what a killed process was writing")
    for step in (87, 93):
        (tmp_path / f"state-{step:09d}.pt").write_bytes(b"half of it")
    states.tidy(75)
    for step in (81, 85):  # damaged ones, as the last two, must not push these out
        states.save(step, {"step": step})
        states.wait()
    left = [f"damaged-state-0000000{step}.pt" for step in (87, 93)] + [f"state-0000000{step}.pt" for step in (51, 75, 81, 85)]
    assert [p.name for p in sorted(tmp_path.iterdir())] == left
    only = States(tmp_path / "only")  # no milestones unless they are asked for
    for step in (1, 2, 3):
        only.save(step, {})
    only.wait()
    assert [only.step_of(p) for p in sorted((tmp_path / "only").iterdir())] == [2, 3]


def test_slow_saving_is_done_more_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of gigabytes every 30 s would cost a tenth of the time."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images, recipe = ImageList(tmp_path, ["a.png"], None, ()), Recipe(batch=1, lr=0.01, iterations=300, optimizer="sgd", precision="fp32")
    saves: list[int] = []
    original = checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", lambda path, write: (saves.append(int(path.stem[6:])), original(path, write), time.sleep(0.2)))
    session = Session(tmp_path, 0, torch.device("cpu"), torch.float32, {}, checkpoint_every_s=1e-9)
    fit(Bursts(2.0), images, lambda image, rng: {"x": torch.zeros(1)}, recipe, session)
    assert 1 <= len(saves) - saves.count(300) <= 3 and saves[-1] == 300  # one, and what fell due while it was written; the next after ten seconds


class Bursts(nn.Module):
    """A weight whose gradient is not finite from a step on, one step before its loss."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.weight, self.at = nn.Parameter(torch.ones(1)), at

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        loss = self.weight.square().sum()
        return {"loss": loss + (self.weight - self.weight.detach()).abs().sqrt().sum() if progress >= self.at else loss}


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(tmp_path: Path) -> None:
    """The step, the rate and the norm are told; no state is saved of weights that such a step has spoiled, though its own loss was fine."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images, recipe = ImageList(tmp_path, ["a.png"], None, ()), Recipe(batch=1, lr=0.01, iterations=1000, optimizer="sgd", precision="fp32")
    session = Session(tmp_path, 0, torch.device("cpu"), torch.float32, {}, checkpoint_every_s=0.0)
    with pytest.raises(NotFinite, match=r"train: loss \d\S* at step 8 of 1000 \(gradient norm nan, lr 0.01, .*the last good state is of step 7"):
        fit(Bursts(0.007), images, lambda image, rng: {"x": torch.zeros(1)}, recipe, session)
    found = States(tmp_path / "checkpoint" / "train").latest()
    assert found is not None and found[0] == 7 and bool(found[1]["objective"]["weight"].isfinite().all())
