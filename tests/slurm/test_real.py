"""On a real SLURM: slurmctld and two slurmd on this machine (`make test-slurm`; needs root and Debian's slurm-wlm and munge)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slurm.local_cluster import Cluster, cluster, missing
from slurm.queue import ask

Call = Callable[..., subprocess.CompletedProcess[str]]
LINE = ("run", "--protocol", "smoke", "--methods", "rotation", "--evals", "nearest-mean")
PROFILE = 'cpus = 1\npartition = "low"\ntime = "30"\n'
LONG = ("--set", "rotation.recipe.iterations=400")
HALF = ("--set", "rotation.recipe.iterations=200")  # of what CI runs, where minutes count

GREEDY = """
import dataclasses, torch
from harness.augment import Normalize
from harness_example import Rotation, TurnLoss

class GigabyteEach(TurnLoss):
    def forward(self, batch, progress):
        torch.empty(len(batch["image"]), 2**30, dtype=torch.uint8)
        return super().forward(batch, progress)

@dataclasses.dataclass(frozen=True)
class Greedy(Rotation):
    def objective(self, vit, context):
        return GigabyteEach(vit, self.turns, Normalize(self.mean, self.std))
"""

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("smoke_data", "slurm"), pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            running = stack.enter_context(cluster(tmp_path_factory.mktemp("cluster") / "c"))
        except (RuntimeError, OSError) as error:  # a machine that lets no daemons run is no fault of ours
            pytest.skip(f"no SLURM can be started here: {error}")
        environment["SLURM_CONF"] = str(running.config)
        environment["HARNESS_CHECKPOINT_S"] = "1"
        yield running


@pytest.fixture
def on_slurm(tmp_path: Path) -> tuple[str, ...]:
    """The flags, with a profile in the test's folder."""
    (tmp_path / "c.toml").write_text(PROFILE)
    return ("--launcher", "slurm", "--cluster", "c.toml")


def one(runs: Path, pattern: str) -> Any:
    """JSON of the one file that fits."""
    [path] = runs.glob(pattern)
    return json.loads(path.read_text())


def wait_for(what: Callable[[], Any], seconds: float = 240) -> Any:
    """The first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds:.0f} s: {ask('squeue', '-a')}")


def saved(runs: Path) -> Callable[[], list[Path]]:
    """The states that a pre-training has saved."""
    return lambda: list(runs.glob("pretrain-*/checkpoint/train/state-*.pt"))


def queue() -> list[str]:
    """Ids in the queue."""
    return ask("squeue", "--me", "-h", "-r", "-o", "%i").split()


def test_submit_kill_the_launcher_run_again(harness: Call, environment: dict[str, str], on_slurm: tuple[str, ...], tmp_path: Path) -> None:
    """Two launchers at once submit each node once; a third picks the jobs up, and killing it changes nothing; the table is that of `local`.

    With max_running = 1 all that, an array and what waits for its tasks, is done one after the other."""
    (tmp_path / "c.toml").write_text(f"{PROFILE}max_running = 1\n")
    line = (*LINE, "--seeds", "0,1")
    command = [sys.executable, "-m", "harness", *line, *on_slurm]
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(p.communicate(timeout=300)[1].partition("submitted ")[2] for p in both)
    assert [p.returncode for p in both] == [3, 3] and len(list((tmp_path / "runs" / ".slurm").glob("harness-*"))) == 3, said
    assert said[1].startswith("4 nodes as 3 jobs or arrays:") and said[0].startswith("0 nodes as 0 jobs or arrays"), said
    there = queue()
    shown = harness("status").stdout
    assert shown.count("evaluate nearest-mean on rotation") == 2 and "waits: Dependency" in shown, shown
    follower = subprocess.Popen([*command, "--wait"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert follower.stderr is not None
    assert "submitted 0 nodes as 0 jobs or arrays" in next(text for text in follower.stderr if "submitted" in text) and set(queue()) <= set(there)
    follower.send_signal(signal.SIGKILL)
    follower.wait()
    follower.stderr.close()
    done = harness(*line, *on_slurm, "--wait")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: not queue())
    ends = [json.loads(p.read_text())["attempts"] for p in (tmp_path / "runs").glob("*/slurm.json")]
    assert [[a["how"] for a in attempts] for attempts in ends] == [["done"]] * 4
    times = sorted((a["start"], a["end"]) for attempts in ends for a in attempts)
    assert all(end <= start for (_, end), (start, _) in pairwise(times)), times
    assert harness(*line, "--runs", "here").stdout == done.stdout


@pytest.mark.parametrize("how", ["requeued", "signalled", "preempted"])
def test_a_job_that_is_put_back_goes_on_to_the_same_number(harness: Call, on_slurm: tuple[str, ...], tmp_path: Path, how: str) -> None:
    """By scontrol requeue, as an administrator does it, by the signal that announces a time limit, or by a job of a higher partition."""
    import torch

    line = (*LINE, *HALF)
    assert harness(*line, *on_slurm).returncode == 3
    wait_for(saved(tmp_path / "runs"))
    pretrain = min(queue(), key=int)
    if how == "requeued":
        ask("scontrol", "requeue", pretrain)
    elif how == "signalled":
        ask("scancel", "--signal=USR2", "--batch", pretrain)
    else:
        ask("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    wait_for(lambda: pretrain in ask("squeue", "--me", "-h", "-t", "PENDING", "-o", "%i").split())
    assert f"pending      {next((tmp_path / 'runs').glob('pretrain-*')).name[-16:]}" in harness("status").stdout
    done = harness(*line, *on_slurm, "--wait", timeout=600)
    assert done.returncode == 0, done.stderr
    attempts = one(tmp_path / "runs", "pretrain-*/slurm.json")["attempts"]
    assert ["told" in a for a in attempts] == [True, False] and attempts[1]["how"] == "done" and {a["job"] for a in attempts} == {pretrain}
    assert "going on from step" in next((tmp_path / "runs").glob("pretrain-*/log.txt")).read_text()
    record = one(tmp_path / "runs", "pretrain-*/record.json")
    assert (tmp_path / "runs" / ".slurm" / "snapshots" / record["git"]["snapshot"] / "tree" / "harness").is_dir(), "it ran a copy of the code"
    whole = harness(*line, "--runs", "whole")
    assert whole.stdout == done.stdout
    a, b = (torch.load(next((tmp_path / r).glob("pretrain-*/checkpoint/backbone.pt")), weights_only=True)["state"] for r in ("whole", "runs"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_cancelled_jobs_stay_away_until_run_again(harness: Call, on_slurm: tuple[str, ...], tmp_path: Path) -> None:
    line = (*LINE, *LONG)
    assert harness(*line, *on_slurm).returncode == 3
    wait_for(saved(tmp_path / "runs"))
    cancelled = harness("cancel")
    assert cancelled.returncode == 0 and cancelled.stdout.count("cancelled") == 2
    wait_for(lambda: not queue())
    assert one(tmp_path / "runs", "pretrain-*/slurm.json")["attempts"][-1]["how"] == "stopped"
    assert "interrupted" in harness("status").stdout
    again = harness(*line, *on_slurm)
    assert again.returncode == 3 and "submitted 2 nodes" in again.stderr
    assert harness("cancel").returncode == 0
    wait_for(lambda: not queue())


def test_a_failure_takes_down_what_depends_on_it(harness: Call, on_slurm: tuple[str, ...], smoke_data: Path, tmp_path: Path) -> None:
    """kill-on-invalid-dep empties the queue; the cell says why; --retry submits both again."""
    import shutil

    shutil.copytree(smoke_data, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "imagenet" / "train").rglob("*.jpg"))[37]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200] + bytes(len(whole) - 200))
    line = (*LINE, "--data", "data", *on_slurm, "--wait")
    failed = harness(*line)
    assert failed.returncode == 1 and f"data error: {broken}" in failed.stdout.replace("\\", ""), failed.stdout + failed.stderr
    assert queue() == []
    again = harness(*line)
    assert again.returncode == 1 and "submitted 0 nodes" in again.stderr
    broken.write_bytes(whole)
    assert harness(*line, "--retry").returncode == 0


@pytest.mark.parametrize(("lr", "more", "found"), [
    ("1e30", "", "loss not finite"), ("1e-3", 'setup = ["export HARNESS_MICRO_BATCH=x"]\n', "bad configuration"),
])
def test_failures_are_told_by_their_kind_and_not_tried_again(
    harness: Call, on_slurm: tuple[str, ...], tmp_path: Path, lr: str, more: str, found: str
) -> None:
    (tmp_path / "c.toml").write_text(PROFILE + more)
    line = (*LINE, "--set", f"rotation.recipe.lr={lr}", *on_slurm, "--wait")
    failed = harness(*line)
    assert failed.returncode == 1 and found in failed.stdout and found in harness("status").stdout, failed.stdout + failed.stderr
    assert "submitted 0 nodes" in harness(*line).stderr
    assert len(one(tmp_path / "runs", "pretrain-*/slurm.json")["attempts"]) == 1


def test_memory_gives_out(harness: Call, environment: dict[str, str], on_slurm: tuple[str, ...], tmp_path: Path) -> None:
    """The allocator fails in a job (14 GB, a gigabyte for each of 16 images): told with what helps; with --on-oom halve it ends well, and says how."""
    site = tmp_path / "site"
    (site / "greedy-1.dist-info").mkdir(parents=True)
    (site / "greedy-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1\n")
    (site / "greedy-1.dist-info" / "entry_points.txt").write_text("[harness.methods]\ngreedy = greedy:Greedy\n")
    (site / "greedy.py").write_text(GREEDY)
    (tmp_path / "c.toml").write_text(f'{PROFILE}setup = ["ulimit -v {14 * 2**20}"]\n')
    seen = {"PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{site}"}
    line = ("run", "--protocol", "smoke", "--methods", "greedy", "--evals", "nearest-mean", *on_slurm, "--wait")
    failed = harness(*line, timeout=600, **seen)
    said = "out of memory: train: out of memory at step 0 with 16 images at a time; 8 fit: set HARNESS_MICRO_BATCH=8 or --on-oom halve, which changes no key"
    assert failed.returncode == 1 and said in harness("status", **seen).stdout, failed.stdout + failed.stderr
    assert "can't allocate memory" in next((tmp_path / "runs").glob("pretrain-*/log.txt")).read_text()
    done = harness(*line, "--on-oom", "halve", "--retry", timeout=600, **seen)
    assert done.returncode == 0, done.stdout + done.stderr
    halved = "train: out of memory at step 0 with 16 images at a time: 8 from there on"
    assert one(tmp_path / "runs", "pretrain-*/record.json")["facts"]["out_of_memory"] == [halved]
    assert [a["how"] for a in one(tmp_path / "runs", "pretrain-*/slurm.json")["attempts"]] == ["out of memory", "done"]
    assert f"halved: {halved}" in harness("status", "pretrain-", **seen).stdout.splitlines()


def test_a_full_disk_leaves_the_states_before_it(harness: Call, on_slurm: tuple[str, ...], tmp_path: Path) -> None:
    """The job fails with that word; with room again, --retry goes on from the last state to the number of a run that always had room."""
    import shutil

    import torch

    disk, line = tmp_path / "disk", (*LINE, *LONG)
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", disk], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.strip()}")
    try:
        flags = (*on_slurm, "--runs", "disk/runs")
        assert harness(*line, *flags).returncode == 3
        wait_for(saved(disk / "runs"))
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 12 * 2**20))
        wait_for(lambda: "disk full" in harness("status", "--runs", "disk/runs").stdout)
        assert [torch.load(state, weights_only=True)["facts"]["parts"] for state in saved(disk / "runs")()]
        (disk / "filler").unlink()
        done = harness(*line, *flags, "--wait", "--retry", timeout=600)
        assert done.returncode == 0, done.stderr
        assert "going on from step" in next((disk / "runs").glob("pretrain-*/log.txt")).read_text()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=False)
    assert harness(*line, "--runs", "whole").stdout == done.stdout


def test_a_lost_node_is_left_and_the_job_goes_on(harness: Call, slurm: Cluster, on_slurm: tuple[str, ...], tmp_path: Path) -> None:
    """A node dies: its slurmd and all processes of the job at once, without a word. SLURM starts it again elsewhere, from its last state."""
    line = (*LINE, *HALF)
    assert harness(*line, *on_slurm).returncode == 3
    wait_for(saved(tmp_path / "runs"))
    job = int(next((tmp_path / "runs").glob("pretrain-*/lock")).read_text().split()[1])
    worker = int(Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()[1])
    step = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"slurmstepd" in Path(f"/proc/{step}/cmdline").read_bytes()
    dead = ask("squeue", "--me", "-h", "-t", "RUNNING", "-o", "%N").split()[0]
    slurm.end(dead, signal.SIGKILL)
    for process in (step, worker, job):
        os.kill(process, signal.SIGKILL)
    done = harness(*line, *on_slurm, "--wait", timeout=600)
    attempts = one(tmp_path / "runs", "pretrain-*/slurm.json")["attempts"]
    slurm.start(dead)
    slurm.wait_until_up()
    assert done.returncode == 0, (done.stdout, done.stderr, attempts)
    assert [a.get("how") for a in attempts] == [None, "done"] and attempts[0]["host"] == dead != attempts[1]["host"]
    assert "going on from step" in next((tmp_path / "runs").glob("pretrain-*/log.txt")).read_text()
    assert harness(*line, "--runs", "whole").stdout == done.stdout


def test_the_controller_is_restarted(
    harness: Call, environment: dict[str, str], slurm: Cluster, on_slurm: tuple[str, ...], tmp_path: Path
) -> None:
    """While it is away the job goes on, and a launcher that follows waits for it; what is in the queue is there again when it is back."""
    line = (*LINE, *LONG)
    command = [sys.executable, "-m", "harness", *line, *on_slurm, "--wait"]
    follower = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(saved(tmp_path / "runs"))
    slurm.end("slurmctld")
    scalars = next((tmp_path / "runs").glob("pretrain-*/metrics.jsonl"))
    before, gone = scalars.stat().st_size, time.monotonic()
    wait_for(lambda: scalars.stat().st_size > before and time.monotonic() - gone > 20)
    slurm.start("slurmctld")
    said, errors = follower.communicate(timeout=600)
    assert follower.returncode == 0, errors
    wait_for(lambda: not queue())
    ends = [json.loads(p.read_text())["attempts"] for p in (tmp_path / "runs").glob("*/slurm.json")]
    assert [[a["how"] for a in attempts] for attempts in ends] == [["done"]] * 2
    assert harness(*line, "--runs", "whole").stdout == said


def test_a_job_on_two_machines(harness: Call, on_slurm: tuple[str, ...], tmp_path: Path) -> None:
    """Two processes on each of two nodes; requeued, it goes on under the same id; one of its processes killed, it fails at once with that; then on one."""
    (tmp_path / "c.toml").write_text(PROFILE.replace("cpus = 1", "cpus = 2\nmachines = 2\nprocesses = 2"))
    line = (*LINE, *LONG)
    assert harness(*line, *on_slurm).returncode == 3
    wait_for(saved(tmp_path / "runs"))
    node = next((tmp_path / "runs").glob("pretrain-*"))
    log = node / "log.txt"
    assert "4 micro-batches of 4 on 4 processes" in log.read_text()
    pretrain = min(queue(), key=int)
    ask("scontrol", "requeue", pretrain)
    wait_for(lambda: "going on from step" in log.read_text())
    last = [text.split()[-1] for text in (node / "log-rank3.txt").read_text().splitlines() if " start pretrain " in text][-1]
    began = time.monotonic()
    os.kill(int(last), signal.SIGKILL)
    wait_for(lambda: "failed" in harness("status").stdout)
    assert time.monotonic() - began < 60
    attempts = one(tmp_path / "runs", "pretrain-*/slurm.json")["attempts"]
    assert [a.get("how") for a in attempts][1:] == ["killed"] and {a["job"] for a in attempts} == {pretrain}, log.read_text()
    assert attempts[0].get("how") in ("stopped", None)  # a machine busy with other work may not leave it the time to say so
    wait_for(lambda: not queue())
    (tmp_path / "c.toml").write_text(PROFILE)
    done = harness(*line, *on_slurm, "--wait", "--retry", timeout=600)
    assert done.returncode == 0, (done.stdout, done.stderr, log.read_text())
    assert "on 1 process now, 4 before: the batch stays 16 images" in log.read_text()


@pytest.mark.timeout(1200)
def test_a_job_at_its_time_limit_goes_on_in_its_next_turn(harness: Call, on_slurm: tuple[str, ...], tmp_path: Path) -> None:
    """More work than its limit allows: the job saves before it, puts itself back into the queue, and goes on under the same id to the number of one turn."""
    (tmp_path / "c.toml").write_text(PROFILE.replace('time = "30"', 'time = "3"\nsignal_s = 100'))  # SLURM may signal a minute early: 20 to 80 s a turn
    assert harness(*LINE, *LONG, "--runs", "short").returncode == 0
    speed = 400 / one(tmp_path / "short", "pretrain-*/record.json")["facts"]["seconds"]
    line = (*LINE, "--set", f"rotation.recipe.iterations={round(120 * speed)}")
    done = harness(*line, *on_slurm, "--wait", timeout=900)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: not queue())
    attempts = one(tmp_path / "runs", "pretrain-*/slurm.json")["attempts"]
    assert len(attempts) > 1 and [a.get("how") for a in attempts] == ["time limit"] * (len(attempts) - 1) + ["done"] and len({a["job"] for a in attempts}) == 1
    assert harness(*line, "--runs", "whole", timeout=900).stdout == done.stdout


@pytest.mark.timeout(1200)
def test_the_probe_and_the_drill_of_doctor(harness: Call, on_slurm: tuple[str, ...], smoke_data: Path) -> None:
    """Two nodes are seen, they add up a tensor together, and a job that is preempted there ends like one that is not."""
    done = harness("doctor", *on_slurm[2:], "--data", str(smoke_data), "--drill", timeout=900)
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(line.startswith("ok   all-reduce of 4 MB across 2 nodes with gloo") for line in said)
    assert [sum(host in line and "is seen and written" in line for line in said) for host in ("n1:", "n2:")] == [1, 1]
    assert [line[:4] for line in said if "weights" in line or "record" in line or "survived" in line] == ["ok  "] * 3, said
    assert queue() == []
