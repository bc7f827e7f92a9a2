"""Runs from the command line with a third party's plugins: equal work once, kill and resume, retry, force, keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., subprocess.CompletedProcess[str]]
LINE = ("run", "--protocol", "smoke", "--methods", "rotation", "--evals", "nearest-mean")

pytestmark = pytest.mark.usefixtures("smoke_data")


def records(runs: Path) -> dict[str, dict]:
    """Folder name -> record."""
    return {p.parent.name: json.loads(p.read_text()) for p in runs.glob("*/record.json")}


def test_same_line_again_does_no_work_and_prints_the_same(harness: Call, here: Call, tmp_path: Path) -> None:
    """The table comes by entry points alone, and asking again costs nothing."""
    first = harness(*LINE)
    assert first.returncode == 0, first.stderr
    assert "rotation" in first.stdout and "nearest-mean" in first.stdout
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/record.json")}
    again = harness(*LINE)
    assert again.stdout == first.stdout and again.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/record.json")} == before
    dry = here(*LINE, "--dry-run")
    assert dry.stdout.count("cached") == 2

    # another seed adds two nodes; a changed field of the method changes both keys; one of the evaluator only its own
    assert harness(*LINE, "--seeds", "0,1").returncode == 0
    assert len(records(tmp_path / "runs")) == 4
    for setting, first_node in (("nearest-mean.images=100", "cached"), ("rotation.turns=2", "missing")):
        plan = [line for line in here(*LINE, "--set", setting, "--dry-run").stdout.splitlines() if line.startswith("[")]
        assert first_node in plan[0] and "missing" in plan[1]

    table = json.loads(here("table", "--format", "json").stdout)
    assert [(r["method"], r["eval"], r["metric"], r["n"]) for r in table] == [("rotation", "nearest-mean", "top-1", 2)]
    status = here("status")
    assert status.returncode == 0 and status.stdout.count("done") == 4


def test_a_killed_job_ends_with_the_same_number(harness: Call, environment: dict[str, str], tmp_path: Path) -> None:
    """kill -9 of the launcher and of the jobs, then the same line: the record equals that of an uninterrupted run."""
    whole = harness(*LINE, "--runs", "whole")
    assert whole.returncode == 0, whole.stderr
    slow = {**environment, "HARNESS_CHECKPOINT_S": "0"}
    line = [sys.executable, "-m", "harness", *LINE, "--runs", "parts"]
    process = subprocess.Popen(line, cwd=tmp_path, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts").glob("pretrain-*/checkpoint/train/state-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    owner = next((tmp_path / "parts").glob("pretrain-*/lock")).read_text()
    os.kill(int(owner.split()[1]), signal.SIGKILL)
    process.wait()
    assert process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    states = sorted((tmp_path / "parts").glob("pretrain-*/checkpoint/train/state-*.pt"))
    states[-1].write_bytes(states[-1].read_bytes()[:1000])  # and the newest state is damaged
    done = harness(*LINE, "--runs", "parts")
    assert done.returncode == 0, done.stderr
    assert done.stdout == whole.stdout
    log = next((tmp_path / "parts").glob("pretrain-*/log.txt")).read_text()
    assert "going on from step" in log or "is damaged" in log
    weights = [next((tmp_path / r).glob("pretrain-*/checkpoint/backbone.pt")) for r in ("whole", "parts")]
    import torch

    a, b = (torch.load(w, weights_only=True)["state"] for w in weights)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_interrupt_saves_and_exits_130(environment: dict[str, str], tmp_path: Path, here: Call) -> None:
    """Ctrl-C: exit code 130, no process left behind, and the state is there."""
    line = [sys.executable, "-m", "harness", *LINE]
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("pretrain-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    status = here("status").stdout
    assert "interrupted" in status or "done" in status


def test_failed_stays_failed_until_retry(harness: Call, smoke_data: Path, tmp_path: Path) -> None:
    """A broken image fails the job with its path; the cell says why; --retry --on-bad-image skip goes on and counts it."""
    import shutil

    data = tmp_path / "data"
    shutil.copytree(smoke_data, data)
    broken = sorted((data / "imagenet" / "train").rglob("*.jpg"))[37]
    broken.write_bytes(broken.read_bytes()[:200])
    line = (*LINE, "--data", str(data), "--set", "nearest-mean.images=5")
    failed = harness(*line)
    assert failed.returncode == 1
    assert str(broken) in failed.stdout
    again = harness(*line)
    assert again.returncode == 1 and "started" not in again.stderr
    mended = harness(*line, "--retry", "--on-bad-image", "skip")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "1 unreadable images skipped" in json.dumps(records(tmp_path / "runs"))


def test_force_moves_the_old_folder_aside(harness: Call, tmp_path: Path) -> None:
    """--force never deletes."""
    line = (*LINE, "--set", "rotation.recipe.iterations=2", "--launcher", "debug")
    assert harness(*line).returncode == 0
    assert harness(*line, "--force").returncode == 0
    assert len(list((tmp_path / "runs" / "aside").iterdir())) == 2
    assert len(records(tmp_path / "runs")) == 2


def test_two_runs_at_once_share_the_work(environment: dict[str, str], tmp_path: Path) -> None:
    """Two processes given the same line do not both write a node: one works, the other waits for its result."""
    line = [sys.executable, "-m", "harness", *LINE, "--set", "rotation.recipe.iterations=8"]
    both = [subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate(timeout=240) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    log = next((tmp_path / "runs").glob("pretrain-*/log.txt")).read_text()
    assert log.count("done:") == 1


def test_debug_launcher_gives_the_same_number(harness: Call) -> None:
    """The job boundary is a process, but nothing may depend on it."""
    line = (*LINE, "--set", "rotation.recipe.iterations=4")
    local, debug = harness(*line, "--runs", "a"), harness(*line, "--runs", "b", "--launcher", "debug")
    assert local.returncode == debug.returncode == 0, debug.stderr
    assert local.stdout == debug.stdout
