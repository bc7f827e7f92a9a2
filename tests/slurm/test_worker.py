"""What runs inside a job: how an attempt ended, and what SLURM must be told. The process that does the node is played by a shell script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm

from harness.store import write_json
from slurm import worker
from slurm.worker import FEWER_IMAGES, KILLED, Attempts, classify, oom_kills

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; sys.executable = sys.argv[1]; sys.argv = ['worker', sys.argv[2]]; import slurm.worker as w; w.BUSY_S = 0.1; sys.exit(w.main())"


class Bench:
    """A batch of one node in a runs folder, and a program in place of `python -m harness.run`."""

    def __init__(self, folder: Path, max_lost: int = 1) -> None:
        self.fake, self.node = FakeSlurm(folder / "bin"), folder / "runs" / "pretrain-mae-0123"
        self.batch, self.program = folder / "runs" / ".slurm" / "harness-1", folder / "program"
        self.node.mkdir(parents=True)
        write_json(self.batch / "submission.json", {"nodes": [self.node.name], "max_lost": max_lost})

    def start(self, program: str) -> subprocess.Popen[str]:
        """The worker's process."""
        self.program.write_text(f"#!/bin/sh\nnode=$(dirname \"$3\")\n{program}\n")
        self.program.chmod(0o755)
        path = f"{self.fake.folder}:{os.environ['PATH']}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "5", "PATH": path}
        line = [sys.executable, "-c", RUN, str(self.program), str(self.batch)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, program: str) -> int:
        """Its exit code."""
        process = self.start(program)
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output, output
        return process.returncode

    @property
    def ends(self) -> list[str | None]:
        """How the attempts ended."""
        return [a.get("how") for a in json.loads((self.node / "slurm.json").read_text())["attempts"]]

    @property
    def failure(self) -> dict[str, Any]:
        return json.loads((self.node / "failure.json").read_text())

    def stopped_by(self, number: int, program: str, first: str = "") -> int:
        """Exit code when a signal comes."""
        process = self.start(f"{first}\necho here > \"$node/started\"\n{program}")
        deadline = time.monotonic() + 30
        while not (self.node / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
        return process.returncode


SAVES = "trap 'exit 130' USR2; while :; do sleep 0.1; done"


def test_done_failed_and_died(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.run("exit 0") == 0
    assert bench.run("""echo '{"message": "train: loss nan at step 3", "type": "JobFailed"}' > "$node/failure.json"; exit 1""") == 1
    assert bench.failure["class"] == "loss not finite" and bench.failure["message"] == "loss not finite: train: loss nan at step 3"
    (bench.node / "failure.json").unlink()
    assert bench.run("kill -KILL $$") == 1
    assert bench.failure["message"] == KILLED
    assert bench.run("echo 'slurmstepd: error: Detected 1 oom_kill event in StepId=77.0.'; kill -KILL $$") == 1
    assert bench.failure["message"].startswith("out of memory: its process was killed for it")
    assert bench.run("kill -KILL $$") == 1 and bench.failure["class"] == "killed", "what an earlier attempt printed is none of this one's"
    (bench.node / "failure.json").unlink()
    assert bench.run("exit 3") == 3
    assert "exit code 3: see " in bench.failure["message"]
    assert bench.ends == ["done", "loss not finite", "killed", "out of memory", "killed", "error"]


def test_a_job_at_its_time_limit_goes_back_into_the_queue(tmp_path: Path) -> None:
    """The signal that SLURM sends before the limit: save, and requeue. A cancelled or preempted job only saves: SLURM does the rest."""
    bench = Bench(tmp_path)
    assert bench.stopped_by(signal.SIGUSR2, SAVES) == 130
    assert (bench.fake.folder / "scontrol.log").read_text() == "requeue 77\n"
    (bench.node / "started").unlink()
    assert bench.stopped_by(signal.SIGTERM, SAVES) == 130
    assert (bench.fake.folder / "scontrol.log").read_text() == "requeue 77\n"
    assert bench.ends == ["time limit", "stopped"] and not (bench.node / "failure.json").exists()


def test_a_node_lost_too_often_is_given_up(tmp_path: Path) -> None:
    """Attempts that ended without a word count; those that were stopped do not, or a preempted job would be given up."""
    bench = Bench(tmp_path, max_lost=1)
    for killed in (False, True, True):
        (bench.node / "started").unlink(missing_ok=True)
        assert bench.stopped_by(signal.SIGKILL if killed else signal.SIGTERM, SAVES.replace("while :", "while kill -0 $PPID 2> /dev/null")) != 0
    assert bench.run("exit 0") == 1
    assert bench.ends == ["stopped", None, None, "lost node"] and bench.failure["class"] == "lost node"


def test_a_time_limit_that_leaves_no_time_for_work_does_not_come_for_ever(tmp_path: Path) -> None:
    """A start that takes the whole limit is put back twice; as often as it likes is a job that has saved something new, whatever happens in between."""
    bench, advances = Bench(tmp_path), 'mkdir -p "$node/checkpoint/train"; echo > "$node/checkpoint/train/state-000000001.pt"'
    for first, code in (("", 130), ("", 130), (advances, 130), ("", 130), ("", 130), (advances, 1)):  # the same step once more is nothing new
        (bench.node / "started").unlink(missing_ok=True)
        assert bench.stopped_by(signal.SIGUSR2, SAVES, first) == code
    assert bench.ends == ["time limit"] * 5 + ["no progress"] and len((bench.fake.folder / "scontrol.log").read_text().splitlines()) == 5
    assert bench.failure["message"].startswith("no progress: nothing new was saved before its time limit, 3 times: raise `time` in the cluster profile")


def test_a_preempted_job_that_is_killed_while_it_saves_is_no_lost_node(tmp_path: Path) -> None:
    """KillWait may be shorter than its last save: however often that happens, it goes on."""
    bench = Bench(tmp_path, max_lost=0)
    process = bench.start("trap '' TERM USR2; echo > \"$node/started\"; while kill -0 $PPID 2> /dev/null; do sleep 0.1; done")
    deadline = time.monotonic() + 30
    while not (bench.node / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    while "told" not in (bench.node / "slurm.json").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    assert bench.run("exit 0") == 0 and bench.ends == [None, "done"]


def test_a_node_that_another_process_has_is_waited_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.run('echo "$HARNESS_ATTEMPT" >> "$node/tries"; [ $(wc -l < "$node/tries") -lt 3 ] && exit 75; exit 0') == 0
    assert bench.ends == ["done"]
    assert len(set((bench.node / "tries").read_text().splitlines())) == 3, "several machines must not meet at the address of the try before"


def test_waiting_for_another_process_is_no_want_of_progress(tmp_path: Path) -> None:
    """Through however many time limits: the node must not be given up while somebody works on it."""
    bench = Bench(tmp_path)
    for _ in range(4):
        (bench.node / "started").unlink(missing_ok=True)
        assert bench.stopped_by(signal.SIGUSR2, "trap : USR2; sleep 0.3; exit 75") == 130
    assert bench.ends == ["stopped"] * 4 and len((bench.fake.folder / "scontrol.log").read_text().splitlines()) == 4


def test_a_signal_waits_until_the_attempts_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it calls writes the same file, under the same temporary name."""
    attempts, order = Attempts(tmp_path, "77"), list[str]()

    def slow(path: Path, body: Any) -> None:
        order.append("begins")
        if len(order) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        write_json(path, body)
        order.append("ends")

    monkeypatch.setattr(worker, "write_json", slow)
    before = signal.signal(signal.SIGUSR2, lambda number, frame: attempts.told())
    try:
        attempts.begin()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert order == ["begins", "ends"] * 2 and "told" in json.loads((tmp_path / "slurm.json").read_text())["attempts"][0]


@pytest.mark.parametrize(("kind", "message", "found"), [
    ("OutOfMemoryError", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
    ("RuntimeError", "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "out of memory"),
    ("JobFailed", "train: loss inf at step 3 of 9", "loss not finite"),
    ("BadImage", "a/b.jpg: cannot be read as an image", "data error"),
    ("JobFailed", "a: 100 unreadable images in a row", "data error"),
    ("OSError", "OSError: [Errno 28] No space left on device", "disk full"),
    ("UserError", "HARNESS_MICRO_BATCH=x: expected a number", "bad configuration"),
    ("KeyError", "KeyError: 'a'", "error"),
])
def test_kinds_of_failure(kind: str, message: str, found: str) -> None:
    assert classify({"type": kind, "message": message})[0] == found


@pytest.mark.parametrize(("kind", "message", "helps"), [
    ("OutOfMemoryError", "OutOfMemoryError: CUDA out of memory", FEWER_IMAGES),
    ("JobFailed", "train: out of memory at step 0 with 4 images at a time: set HARNESS_MICRO_BATCH=2 or --on-oom halve, which changes no key", ""),
    ("JobFailed", "train: out of memory at step 0 with 1 images at a time: it needs a larger device", ""),
])
def test_a_remedy_is_not_contradicted(kind: str, message: str, helps: str) -> None:
    assert classify({"type": kind, "message": message}) == ("out of memory", helps)


@pytest.mark.parametrize(("own", "files", "count"), [
    ("0::/system.slice/slurmstepd.scope/job_77/step_batch/user/task_0", {"system.slice/slurmstepd.scope/job_77/memory.events": 2}, 2),
    ("0::/system.slice/slurmstepd.scope/job_78/step_batch", {"system.slice/slurmstepd.scope/job_77/memory.events": 2}, 0),
    ("5:cpuset:/slurm\n4:memory:/slurm/uid_0/job_77/step_batch", {"memory/slurm/uid_0/job_77/step_0/memory.oom_control": 1,
                                                                 "memory/slurm/uid_0/job_77/step_batch/memory.oom_control": 1}, 2),
    ("4:memory:/user\n0::/", {"memory/user/memory.oom_control": 3, "memory/user/other/memory.oom_control": 5}, 3),
])
def test_the_kernel_counts_what_it_has_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, int], count: int) -> None:
    monkeypatch.setattr(worker, "CGROUPS", tmp_path)
    for name, number in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"oom_kill_disable 0\nunder_oom 0\noom 9\noom_kill {number}\n")
    assert oom_kills("77", own) == count


def test_a_group_that_goes_while_it_is_looked_at_is_no_reason_to_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step whose process was killed is being taken down when its count is asked for: the attempt must be noted all the same."""
    def gone(*_: str) -> list[Path]:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "rglob", gone)
    assert oom_kills("77", "4:memory:/slurm/uid_0/job_77/step_batch") == 0
