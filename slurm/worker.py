"""What a SLURM job runs: `python -m slurm.worker BATCH` starts `python -m harness.run JOB.json`, hands signals on, and notes how it ended.

A job on several machines has one such process on each, started by srun; they find one another by the node's folder.

Exit code 0 when the node is done, so that the jobs after it start. At its time limit the job saves and puts itself back into the
queue; preempted or requeued ones save, and SLURM puts them back.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.run import BUSY
from harness.store import read_json, write_json
from slurm.queue import RESUMES

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
MAX_STALLED = 2  # time limits in a row at which nothing new was saved, after which a job is put back all the same
BUSY_S = 10.0  # how often a node that another process works on is looked at again
MORE_MEMORY = "ask for more memory for this node in the cluster profile"
KILLED = f"killed (SIGKILL): out of memory, or by somebody: {MORE_MEMORY}, or run with --retry"
CGROUPS = Path("/sys/fs/cgroup")
FEWER_IMAGES = "set HARNESS_MICRO_BATCH in the profile's environment, it changes no key"


def classify(failure: Mapping[str, Any]) -> tuple[str, str]:
    """(what kind of failure it is, what helps) of a failure.json."""
    kind, message = str(failure.get("type", "")), str(failure.get("message", ""))
    if "OutOfMemory" in kind or re.search("out of memory|can't allocate memory", message, re.I):
        return "out of memory", "" if kind == "JobFailed" else FEWER_IMAGES  # a JobFailed says itself what helps
    if kind == "MemoryError":
        return "out of memory", MORE_MEMORY
    if re.search(r"\b(loss|gradient norm) (nan|-?inf)|not finite|\bis (nan|-?inf)\b", message, re.I):
        return "loss not finite", ""
    if kind == "BadImage" or "unreadable" in message:
        return "data error", ""
    if "disk full" in message:
        return "disk full", ""
    if f"Errno {errno.ENOSPC}" in message or f"Errno {errno.EDQUOT}" in message:
        return "disk full", "make room, then run with --retry"
    if kind in ("UserError", "FileNotFoundError", "ModuleNotFoundError", "ImportError"):
        return "bad configuration", ""
    return "error", ""


def note_failure(folder: Path, failure: dict[str, Any]) -> str:
    """Write a failure with its kind and remedy in front of and behind its message; the kind."""
    kind, remedy = (failure["class"], "") if "class" in failure else classify(failure)
    message = failure["message"] if failure["message"].startswith(kind) else f"{kind}: {failure['message']}"
    write_json(folder / "failure.json", {**failure, "class": kind, "message": f"{message}: {remedy}" if remedy else message})
    return kind


def new_failure(folder: Path, kind: str, message: str) -> str:
    """The failure of a job whose process could not write one itself."""
    return note_failure(folder, {"class": kind, "message": message, "type": "Exit", "traceback": "", "time": time.time()})


def kept(folder: Path) -> list[str]:
    """What a node goes on from: names below its checkpoint folder, states by their steps. What is half written or damaged does not count."""
    place = folder / "checkpoint"
    return sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file() and not p.name.startswith((".", "damaged-")))


def oom_kills(job: str, own: str) -> int:
    """Processes of a job that the kernel has killed for want of memory, as control groups count them (version 1 or 2); 0 where none can be read.

    Args:
        job: SLURM_JOB_ID: SLURM has a group for it, with one below for each step. Without that, this process's own group counts.
        own: /proc/self/cgroup.
    """
    files: list[Path] = []
    try:
        for _, controllers, path in (line.split(":", 2) for line in own.splitlines()):
            parts = [part for part in path.split("/") if part]
            place = "/".join(parts[: parts.index(f"job_{job}") + 1] if f"job_{job}" in parts else parts)
            if not controllers:
                files.append(CGROUPS / place / "memory.events")  # counts those of the groups below, too
            elif "memory" in controllers.split(","):
                memory = CGROUPS / "memory" / place
                files += memory.rglob("memory.oom_control") if f"job_{job}" in parts else [memory / "memory.oom_control"]
        return sum(int(n) for file in files if file.is_file() for n in re.findall(r"^oom_kill (\d+)", file.read_text(), re.M))
    except OSError:  # the group of a step that has just ended may go while it is looked at
        return 0


class Attempts:
    """slurm.json of a node: its attempts, the last one this. `advanced`: whether one left more to go on from than it had found."""

    def __init__(self, folder: Path, job: str) -> None:
        self.path, self.job, self._writing, self._changed = folder / "slurm.json", job, False, False
        self.all: list[dict[str, Any]] = list((read_json(self.path) or {}).get("attempts", []))
        self._found = kept(folder)
        self._advance()  # of the one before: when it died it could not say it
        self.lost = [a for a in self.all if a["job"] == job and not a.get("how") and "told" not in a]  # died without a word: its node was lost

    def begin(self) -> None:
        """Note the start."""
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.all.append({"job": self.job, "host": host, "start": time.time(), "found": self._found})
        self._write()

    def _advance(self) -> None:
        """Note of the last attempt, once, whether it has come further."""
        if self.all and (found := self.all[-1].pop("found", None)) is not None:
            self.all[-1]["advanced"] = bool(set(kept(self.path.parent)) - set(found))

    @property
    def stalled(self) -> int:
        """Time limits in a row, the last attempt's first, at which nothing new had been saved since the one before."""
        mine = [a for a in self.all if a["job"] == self.job and (a.get("how") == "time limit" or a.get("advanced"))]
        return next((i for i, a in enumerate(reversed(mine)) if a.get("advanced")), len(mine))

    def told(self) -> None:
        """Note that it was told to end: SLURM kills what takes longer over that than KillWait, and that is no lost node."""
        self.all[-1].setdefault("told", time.time())
        self._write()

    def end(self, how: str) -> None:
        """Note how it ended."""
        self._advance()
        self.all[-1] |= {"end": time.time(), "how": how}
        self._write()

    def _write(self) -> None:
        """Write them down. A signal that comes meanwhile wants that, too, to the same temporary file: it is done again afterwards."""
        if self._writing:
            self._changed = True
            return
        self._writing, self._changed = True, False
        try:
            write_json(self.path, {"attempts": self.all})
        finally:
            self._writing = False
        if self._changed:
            self._write()


def command(folder: Path, machines: int) -> list[str]:
    """What does the job; on several machines, on each of them."""
    line = [sys.executable, "-m", "harness.run", str(folder / "job.json")]
    if machines == 1:
        return line
    here = ["sh", "-c", 'HARNESS_NODE=$SLURM_NODEID exec "$@"', "sh"]
    return ["srun", f"--nodes={machines}", f"--ntasks={machines}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none", *here, *line]


def memory_watch(folder: Path) -> Callable[[], bool]:
    """A question to ask later: was a process killed for want of memory since? By the kernel's count here, or by what srun said of other machines."""
    own, log = Path("/proc/self/cgroup"), folder / "log.txt"
    job, groups, size = os.environ["SLURM_JOB_ID"], own.read_text() if own.exists() else "", log.stat().st_size if log.exists() else 0
    before = oom_kills(job, groups)

    def asked() -> bool:
        with open(log, "rb") as stream:
            stream.seek(max(size, log.stat().st_size - 2**16))
            told = re.search(rb"oom[-_]kill event|: Out Of Memory$", stream.read(), re.M)
        return bool(told) or oom_kills(job, groups) > before

    return asked


def work(folder: Path, job: str, max_lost: int) -> int:
    """One attempt at a node. Returns the exit code of the job."""
    attempts = Attempts(folder, job)
    attempts.begin()
    if len(attempts.lost) > max_lost:
        hosts = ", ".join(a["host"] for a in attempts.lost)
        attempts.end(new_failure(folder, "lost node", f"died {len(attempts.lost)} times without a word (on {hosts}), max_lost is {max_lost}"))
        return 1
    out_of_memory = memory_watch(folder)
    asked: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any) -> None:
        asked.append(number)
        for process in running:
            process.send_signal(signal.SIGUSR2)  # which srun hands on, too
        attempts.told()

    for number in STOPS:
        signal.signal(number, pass_on)
    machines = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    line, environment = command(folder, machines), {
        **os.environ, "HARNESS_LAUNCHER_PID": str(os.getpid()),  # it saves and ends when this process dies
        "HARNESS_NODES": str(machines), "SRUN_CPUS_PER_TASK": os.environ.get("SLURM_CPUS_PER_TASK", "1"),
    }
    code = BUSY
    while code == BUSY and not asked:
        environment["HARNESS_ATTEMPT"] = f"{job} {len(attempts.all)} {time.time()}"  # the machines are not to meet where they met before
        with open(folder / "log.txt", "ab") as log:
            running[:] = [subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)]
        if asked:  # a signal that came before the process was in the list
            running[0].send_signal(signal.SIGUSR2)
        if (code := running[0].wait()) == BUSY and not asked:
            time.sleep(BUSY_S)
    if machines > 1 and code > 128 and code != 130:
        code = 128 - code  # srun's way to say that a signal ended one of its processes
    if code == 0:
        attempts.end("done")
    elif asked and (code < 0 or code in (130, BUSY)):
        limit = asked[0] == signal.SIGUSR2
        attempts.end(RESUMES[limit and code != BUSY])  # where another process was at work, no progress of its own was to be expected
        if limit and attempts.stalled > MAX_STALLED:
            what = f"nothing new was saved before its time limit, {attempts.stalled} times: raise `time` in the cluster profile"
            attempts.end(new_failure(folder, "no progress", f"{what}, or lower signal_s, or HARNESS_CHECKPOINT_S in its environment"))
            return 1
        if limit:  # SLURM puts back those that it stops itself; a cancelled one is to stay away
            done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True, check=False)
            print(f"time limit: saved, {'back into the queue' if done.returncode == 0 else done.stderr.strip()}", flush=True)
        return 130
    elif code == 130:
        attempts.end(RESUMES[0])
    elif code == -signal.SIGKILL:
        oom = out_of_memory()
        attempts.end(new_failure(folder, *(("out of memory", f"its process was killed for it: {MORE_MEMORY}") if oom else ("killed", KILLED))))
    elif isinstance(failure := read_json(folder / "failure.json"), dict):
        attempts.end(note_failure(folder, failure))
    else:
        attempts.end(new_failure(folder, "error", f"its process ended with exit code {code}: see {folder / 'log.txt'}"))
    return code if code >= 0 else 1


def main() -> int:
    """`python -m slurm.worker BATCH`, in a SLURM job."""
    batch = Path(sys.argv[1])
    body = read_json(batch / "submission.json")
    if body is None:
        print(f"{batch / 'submission.json'}: cannot be read here: is the runs folder one that all nodes see?", flush=True)
        return 1
    # submitted from inside an array's task, a job of its own inherits that one's number
    task = os.environ["SLURM_ARRAY_TASK_ID"] if len(body["nodes"]) > 1 else None
    job = os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    return work(batch.parents[1] / body["nodes"][int(task or 0)], job, body["max_lost"])


if __name__ == "__main__":
    sys.exit(main())
