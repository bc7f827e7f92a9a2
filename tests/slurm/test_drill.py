"""`doctor --drill`: a job that did not survive its preemption must not be praised. The jobs are played; test_real.py has real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_slurm import FakeSlurm
from folders import written

from harness.checkpoint import Backbone
from harness.jobs import Node
from harness.spec import ViTConfig
from harness.store import Store, write_json
from slurm import drill
from slurm.launcher import Slurm

VIT = ViTConfig(size=(32, 32), patch=16, width=8, depth=1, heads=1)
NODE = Node("pretrain", "mae", {"plugin": "mae", "recipe": None}, {}, {"title": "pretrain mae", "seed": 0})
FACTS = {"loss": 0.5, "seconds": 3.0, "steps": 400}


def ended(root: Path, shift: float = 0.0, **fields: Any) -> Path:
    """The folder of a job that has ended."""
    folder = written(root, NODE, **{"images_seen": 64, "flops": 1e9, "facts": FACTS, "precision": "fp32", **fields})
    Backbone(VIT, (0.5,) * 3, (0.5,) * 3, {"a": torch.ones(3), "b": torch.zeros(2) + shift}).save(folder / "checkpoint" / "backbone.pt")
    return folder


def bad(lines: Any) -> list[str]:
    return [text for good, text, _ in lines if good is False]


def test_only_what_may_differ_is_allowed_to(tmp_path: Path) -> None:
    whole = ended(tmp_path / "whole")
    assert bad(drill.compare(whole, ended(tmp_path / "same", start="2027-01-01", wall_s=9.0, facts={**FACTS, "seconds": 8.0}))) == []
    assert bad(drill.compare(whole, ended(tmp_path / "seen", images_seen=96))) == ["its record images_seen 96, not 64"]
    assert "loss" in bad(drill.compare(whole, ended(tmp_path / "loss", facts={**FACTS, "loss": 0.5000001})))[0]
    assert bad(drill.compare(whole, ended(tmp_path / "weights", shift=1e-7))) == ["its weights are others, by up to 1e-07"]


@pytest.mark.parametrize(("hows", "log", "found"), [
    (["stopped", "done"], "train: going on from step 30 of 400", []),
    ([None, "done"], "train: going on from step 20 of 400", []),
    (["stopped", "done"], "", ["survived: the state of step 0 of 400"]),
    (["done"], "", ["the job ended before SLURM stopped it: nothing was tested"]),
    (["stopped", "error"], "going on from step 30 of 400", ["it was told to stop and saved; 2 attempts under the same job id, on n1 then n1"]),
])
def test_how_it_went_on(tmp_path: Path, hows: list[str | None], log: str, found: list[str]) -> None:
    """Killed before it had ended is told, not held against the cluster: an earlier state was there."""
    write_json(tmp_path / "slurm.json", {"attempts": [{"job": "7", "host": "n1", "start": 0, "how": how} for how in hows]})
    (tmp_path / "log.txt").write_text(log)
    assert bad(drill.tell(tmp_path, "7", 400)) == found


def test_a_cluster_that_does_not_let_users_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSlurm(tmp_path / "bin")
    (fake.folder / "scontrol").write_text('#!/bin/sh\n[ "$1" = requeue ] || exit 0\necho "Requested operation is presently disabled" >&2; exit 1\n')
    monkeypatch.setenv("PATH", str(fake.folder), prepend=":")
    (tmp_path / "c.toml").write_text("")
    whole, put_back = Store(tmp_path / "whole"), Store(tmp_path / "preempted")
    (put_back.folder(NODE) / "checkpoint" / "train").mkdir(parents=True)
    (put_back.folder(NODE) / "checkpoint" / "train" / "state-000000030.pt").write_text("")
    [(good, text, remedy)] = drill.attempt(Slurm(cluster=str(tmp_path / "c.toml")), NODE, whole, put_back)
    assert good is False and "job 100 cannot be preempted" in text and "presently disabled" in text and "JobRequeue" in remedy
    assert len(fake.queue) == 2
