"""A sweep on a cluster: the trials are submitted, nothing waits; the same line submits what they have chosen once their records are there."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from folders import written

from harness import cli
from harness.jobs import read_job
from harness.request import Request
from harness.store import Store
from results.sweep import Sweep

SWEEP = "linear.recipe.lr=0.05,0.2"


def test_the_same_line_submits_trials_then_what_they_chose(tmp_path: Path, smoke_data: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    fake, store = FakeSlurm(tmp_path / "bin"), Store(tmp_path / "runs")
    monkeypatch.setenv("PATH", str(fake.folder), prepend=":")
    (tmp_path / "cluster.toml").write_text('precision = "fp32"\n')
    line = ["run", "--methods", "scratch", "--evals", "linear", "--protocol", "smoke", "--data", str(smoke_data), "--runs", str(store.root),
            "--launcher", "slurm", "--cluster", str(tmp_path / "cluster.toml"), "--sweep", SWEEP]
    assert cli.main(line) == 3
    said = capsys.readouterr()
    assert "submitted 3 nodes" in said.err and "these are the trials; the same line goes on" in said.err and said.out == ""
    assert cli.main(line) == 3 and "submitted 0 nodes" in capsys.readouterr().err

    request = Request(("scratch",), ("linear",), "smoke", data=str(smoke_data), precision="fp32")
    trials = Sweep(request, argparse.Namespace(sweep=[SWEEP], force=False, retry=False), store).plan().nodes
    assert {store.folder(n) for n in trials} == set(store.folders())
    for node in trials:
        written(store.root, node, metrics={"top-1": 20.0 if node.about.get("trial", "").endswith("0.2") else 10.0})
    fake.queue = []
    assert cli.main(line) == 3
    said = capsys.readouterr()
    assert "--sweep linear.recipe.lr: 0.2 for scratch" in said.err and "submitted 1 nodes" in said.err and "these are the trials" not in said.err
    (reported,) = {f.name for f in store.folders()} - {n.folder for n in trials}
    job = read_job(store.root / reported / "job.json")
    assert job["about"]["sweep"]["chosen"] == "0.2" and job["identity"]["plugin"]["holdout"] == 0
