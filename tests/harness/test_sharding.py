"""Sharded among processes (FSDP2, on gloo) a training comes to what it comes to whole, and its states are anybody's to go on from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import RECIPE
from shards import CONFIG
from torch import Tensor, nn

from harness import sharding
from harness.checkpoint import States
from harness.spec import JobFailed
from harness.vit import ViT


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what shards.py has trained there."""
    root = tmp_path_factory.mktemp("sharding")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / "images" / f"{i:02}.png")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("shards.py")), str(root)], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def weights(place: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    return torch.load(place / f"{name}-{rank}.pt", weights_only=True)[0]


def log(place: Path, name: str) -> str:
    return "\n".join(torch.load(place / f"{name}-0.pt", weights_only=True)[1])


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two states, relative to the weights' scale."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / (b[k].abs().max() + 1e-3)).item() for k in b)


@pytest.mark.parametrize("clip", ["", "-tensor"])
def test_two_processes_equal_one(place: Path, clip: str) -> None:
    """To rounding, on both alike, in the layout of a ViT; what a hook holds at zero stays there."""
    found, whole = weights(place, f"sharded{clip}"), weights(place, f"whole{clip}")
    assert distance(found, whole) < 2e-5 < distance(whole, ViT(CONFIG).state_dict())
    assert all(torch.equal(found[k], v) for k, v in weights(place, f"sharded{clip}", 1).items())
    ViT(CONFIG).load_state_dict(found)
    bias = found["blocks.1.attn.qkv.bias"].view(3, -1)
    assert not bias[1].any() and bias[0].any() and not found["blocks.0.attn.qkv.bias"].any()
    assert "sharded among 2 processes" in log(place, f"sharded{clip}") and distance(whole, weights(place, "whole-tensor" if not clip else "whole")) > 1e-3


def test_a_state_is_anybodys(place: Path) -> None:
    """Of two processes on one, and of one on two."""
    assert "going on from step 2" in log(place, "joined") and "on 1 process now, 2 before" in log(place, "joined")
    assert "going on from step 2" in log(place, "split")
    for name in ("joined", "split"):
        assert distance(weights(place, name), weights(place, "whole")) < 2e-5
    states = [States(place / folder / "checkpoint" / "train").latest() for folder in ("sharded", "whole")]

    def shapes(state: Any) -> Any:
        return {k: shapes(v) for k, v in state.items()} if isinstance(state, dict) else getattr(state, "shape", type(state))

    [two, one] = [state[1] for state in states if state is not None]
    assert all(shapes(two[part]) == shapes(one[part]) for part in ("objective", "optimizer", "ema"))


def test_killed_between_the_files_of_a_state(place: Path) -> None:
    """A state of which a file is missing is none: the one before is gone on from, and what is left of it goes."""
    assert (place / "left").read_text().split() == [f"state-00000000{s}.0000{r}-of-00002.pt" for s, r in ((1, 0), (1, 1), (2, 0))]
    assert "going on from step 1 of 4" in log(place, "after")
    assert all(torch.equal(v, weights(place, "sharded")[k]) for k, v in weights(place, "after").items())
    assert [p.name[6:15] for p in sorted((place / "killed" / "checkpoint" / "train").iterdir())] == ["000000001"] * 2 + ["000000004"] * 2


def test_a_loss_that_is_not_finite(place: Path) -> None:
    """All go back to the same state and leave out the same batches."""
    assert distance(weights(place, "sharded-burst"), weights(place, "whole-burst")) < 2e-5 < distance(weights(place, "whole"), weights(place, "whole-burst"))
    for name in ("whole-burst", "sharded-burst"):
        assert "loss nan at step 3 of 4" in log(place, name) and "restart 1 of at most 1" in log(place, name) and "going on from step 2" in log(place, name)


def test_what_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when there is no use in it, refused when it would be wrong."""
    model: Any = nn.Module()
    model.vit = ViT(CONFIG)
    assert sharding.stays_whole(model, RECIPE) == "there is one process"
    monkeypatch.setattr(sharding, "processes", lambda: 2)
    assert sharding.stays_whole(model, RECIPE) == "" and sharding.stays_whole(nn.Linear(1, 1), RECIPE) == "it trains no ViT"
    with monkeypatch.context() as patch, pytest.raises(JobFailed, match="cannot be compiled: leave it out"):
        patch.setenv("HARNESS_COMPILE", "inductor")
        sharding.stays_whole(model, RECIPE)
    model.again = model.vit.norm.bias
    with pytest.raises(JobFailed, match=r"vit\.norm\.bias is shared by two layers"):
        sharding.stays_whole(model, RECIPE)
    model.after_step = lambda progress: None
    with pytest.raises(JobFailed, match="HARNESS_SHARD: a momentum teacher cannot be sharded"):
        sharding.stays_whole(model, RECIPE)
