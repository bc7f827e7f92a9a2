"""One job on several processes, from the command line: the same numbers, one cause when one fails, and on with another number of processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.ranks import verdict
from harness.store import write_json

Call = Callable[..., subprocess.CompletedProcess[str]]
# SGD: AdamW would make a full step of what is rounding alone (the bias of the keys has no gradient)
FIELDS = ("iterations=12", "batch=16", "optimizer=sgd", "lr=0.1", "precision=fp32")
SHORT = ("--set", "nearest-mean.images=5", *(word for field in FIELDS for word in ("--set", f"mae.recipe.{field}")))
LINE = ("run", "--protocol", "smoke", "--methods", "mae", "--evals", "nearest-mean", *SHORT)


def node(runs: Path) -> Path:
    """Folder of the pre-training."""
    return next(runs.glob("pretrain-*"))


def weights(runs: Path) -> dict[str, torch.Tensor]:
    """Of the backbone."""
    return torch.load(node(runs) / "checkpoint" / "backbone.pt", weights_only=True)["state"]


def record(runs: Path) -> dict[str, Any]:
    return json.loads((node(runs) / "record.json").read_text())


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two states, relative to the weights' scale."""
    return max(((a[k] - b[k]).abs().max() / (b[k].abs().max() + 1e-3)).item() for k in b)


@pytest.fixture(scope="module")
def whole(environment: dict[str, str], smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder of the line on one process."""
    place = tmp_path_factory.mktemp("whole")
    line = [sys.executable, "-m", "harness", *LINE]
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "runs"


@pytest.mark.parametrize(("launcher", "shard"), [("local", "0"), ("debug", "1")])
def test_two_processes_equal_one(harness: Call, whole: Path, tmp_path: Path, launcher: str, shard: str) -> None:
    """The same key and the same weights to rounding; the record tells their number, and an evaluator that knows nothing of it runs on one."""
    done = harness(*LINE, "--launcher", launcher, HARNESS_PROCESSES="2", HARNESS_SHARD=shard)
    runs = tmp_path / "runs"
    assert done.returncode == 0, done.stdout + done.stderr
    assert node(runs).name == node(whole).name
    assert distance(weights(runs), weights(whole)) < 1e-4
    log = (node(runs) / "log.txt").read_text()
    assert ("train: sharded among 2 processes" in log) == (shard == "1")
    assert "2 micro-batches of 8 on 2 processes" in log and "2 micro-batches" in (node(runs) / "log-rank1.txt").read_text()
    assert (record(runs)["hardware"]["processes"], record(whole)["hardware"]["processes"]) == (2, 1)
    assert record(runs)["device_hours"] == pytest.approx(2 * record(runs)["wall_s"] / 3600, rel=0.01)
    evaluation = json.loads(next(runs.glob("evaluate-*/record.json")).read_text())
    assert evaluation["hardware"]["processes"] == 1


def test_killed_on_two_processes_goes_on_with_one(harness: Call, whole: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """kill -9 of one process ends the others within seconds; the same line on one process keeps the batch, says so, and comes to the same weights."""
    slow = {**environment, "HARNESS_CHECKPOINT_S": "0", "HARNESS_PROCESSES": "2"}
    process = subprocess.Popen([sys.executable, "-m", "harness", *LINE], cwd=tmp_path, env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs, deadline = tmp_path / "runs", time.monotonic() + 200
    while not list(runs.glob("pretrain-*/checkpoint/train/state-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    said = re.search(r"in process (\d+)", (node(runs) / "log-rank1.txt").read_text())
    assert said
    os.kill(int(said[1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert "rank 1 was killed (SIGKILL)" in (node(runs) / "log.txt").read_text() and not (node(runs) / "failure.json").exists()
    done = harness(*LINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 1 process now, 2 before: the batch stays 16 images" in (node(runs) / "log.txt").read_text()
    assert distance(weights(runs), weights(whole)) < 1e-4
    assert record(runs)["images_seen"] == record(whole)["images_seen"]


def test_interrupt_stops_all_at_one_step(harness: Call, smoke_data: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Ctrl-C: both save at the same step, nothing is noted as a failure, and the state is the next start's."""
    long = [word.replace("iterations=12", "iterations=100000") for word in LINE]
    two, quiet = {**environment, "HARNESS_PROCESSES": "2"}, subprocess.DEVNULL
    started = subprocess.Popen([sys.executable, "-m", "harness", *long], cwd=tmp_path, env=two, stdout=quiet, stderr=quiet)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "runs").glob("pretrain-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=90) == 130
    folder = node(tmp_path / "runs")
    [step] = {re.search(r"stopped at step (\d+) of 100000, saved", (folder / name).read_text())[1] for name in ("log.txt", "log-rank1.txt")}  # type: ignore[index]
    assert [int(p.stem.split("-")[1]) for p in folder.glob("checkpoint/train/state-*.pt")] == [int(step)] and not list(folder.glob("failure*"))
    assert "interrupted" in harness("status").stdout


def test_the_failure_of_one_is_the_failure_of_the_job(harness: Call, smoke_data: Path, tmp_path: Path) -> None:
    """An image that one process cannot read: its message, not that the others lost it."""
    data = tmp_path / "data"
    shutil.copytree(smoke_data, data)
    broken = sorted((data / "imagenet" / "train").rglob("*.jpg"))[37]
    broken.write_bytes(broken.read_bytes()[:200])
    line = ("run", "--protocol", "smoke", "--methods", "rotation", "--evals", "nearest-mean", "--set", "nearest-mean.images=5", "--data", str(data))
    done = harness(*line, HARNESS_PROCESSES="2")
    assert done.returncode == 1, done.stdout + done.stderr
    failure = json.loads((node(tmp_path / "runs") / "failure.json").read_text())
    assert str(broken) in failure["message"] and failure["type"] == "BadImage" and failure["message"].startswith("rank 1: " if failure["rank"] else str(data))
    told = (node(tmp_path / "runs") / "log.txt").read_text().partition("failed: ")[2]
    assert told.startswith(failure["message"])


def test_whose_failure_it_is(tmp_path: Path) -> None:
    """What came first counts, but not a lost connection; a signal from outside and a stop are no failures."""
    lost = {"type": "RuntimeError", "message": "RuntimeError: [gloo] Connection closed by peer", "traceback": "", "time": 1.0}
    write_json(tmp_path / "failure-rank0.json", lost)
    assert verdict(tmp_path, 0, [1, -9], set(), False) == -9 and not (tmp_path / "failure.json").exists()
    assert verdict(tmp_path, 0, [1, 130], set(), True) == 130
    assert verdict(tmp_path, 0, [75, -9], {1}, False) == 75
    assert verdict(tmp_path, 0, [0, 0], set(), False) == 0
    assert verdict(tmp_path, 0, [1, 3], set(), False) == 1 and "Connection closed" in json.loads((tmp_path / "failure.json").read_text())["message"]
    write_json(tmp_path / "failure-rank1.json", lost | {"type": "KeyError", "message": "KeyError: 'a'", "traceback": "here", "time": 2.0})
    assert verdict(tmp_path, 0, [1, 1], set(), True) == 1
    assert json.loads((tmp_path / "failure.json").read_text())["message"] == "rank 1: KeyError: 'a'"


def test_more_processes_than_gpus(harness: Call, smoke_data: Path) -> None:
    """Said before anything starts."""
    done = harness(*LINE, HARNESS_PROCESSES="2", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 2 and "HARNESS_PROCESSES=2" in done.stderr and "there are 1" in done.stderr
