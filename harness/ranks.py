"""One job on several processes: they meet on a port found anew for each start, are watched, and end together.

HARNESS_PROCESSES=N asks for N on this machine, on GPUs one on each; HARNESS_NODES=M and HARNESS_NODE=0..M-1 are for launchers that start as many on each of
M machines with a common runs folder. Each is `python -m harness.run JOB.json` with HARNESS_RANK. Rank 0 has the lock, the records and log.txt,
the others log-rank<N>.txt. How many there are is in no key.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.canonical import restore
from harness.spec import UserError
from harness.store import read_json, write_json

BUSY = 75
GRACE_S = 5.0  # what the others get when one has failed: NCCL lets them wait for it
SAVING_S = 120.0  # what rank 0 gets to save, when they were asked to stop
MEET_S = 300.0
FOLLOWS = re.compile(r"gloo|nccl|Dist\w*Error|Connection (closed|reset)|Broken pipe", re.I)  # a failure that says only that another process is gone


LEAST = {  # variables that are numbers, and the smallest that each may be
    **dict.fromkeys(("HARNESS_MICRO_BATCH", "HARNESS_THREADS", "HARNESS_MILESTONES", "HARNESS_PROCESSES"), 1),
    **dict.fromkeys(("HARNESS_WORKERS", "HARNESS_CHECKPOINT_S", "HARNESS_NAN_RESTARTS"), 0),
}


def number_from(name: str, least: int = 1, default: Any = None, given: Mapping[str, str] = os.environ) -> Any:
    """An integer of an environment variable, `default` when it is not set. Raises UserError."""
    text = given.get(name, "")
    if text and not (text.isdecimal() and int(text) >= least):
        raise UserError(f"{name}={text}: expected a whole number, {least} or more")
    return int(text) if text else default


def check_variables() -> None:
    """Look at the numbers and switches that jobs will read. Raises UserError."""
    for name, least in LEAST.items():
        number_from(name, least)
    for name, off in (("HARNESS_CPU", ""), ("HARNESS_FORCE_ACCUMULATION", "0"), ("HARNESS_RECOMPUTE", "0"), ("HARNESS_SHARD", "0")):
        if (text := os.environ.get(name, "")) not in ("", "1", off):
            raise UserError(f"{name}={text}: expected 1; unset it for the opposite")
    processes_here()


def gpus() -> list[str]:
    """CUDA devices by the names of CUDA_VISIBLE_DEVICES, found without importing torch."""
    if os.environ.get("HARNESS_CPU"):
        return []
    visible, driver = os.environ.get("CUDA_VISIBLE_DEVICES"), Path("/proc/driver/nvidia/gpus")
    if visible is not None:
        return [v.strip() for v in visible.split(",") if v.strip() not in ("", "-1")]
    return [str(i) for i, _ in enumerate(driver.glob("*"))] if driver.is_dir() else []


def processes_here() -> int:
    """Processes of a job on this machine. Raises UserError when there are fewer GPUs."""
    count: int = number_from("HARNESS_PROCESSES", default=1)
    if 0 < len(gpus()) < count:
        raise UserError(f"HARNESS_PROCESSES={count}: a process has a GPU of its own, and there are {len(gpus())}: ask for fewer, or set HARNESS_CPU=1")
    return count


def own_rank() -> int:
    """Number of this process among those of its job, from 0."""
    return int(os.environ.get("HARNESS_RANK", "0"))


def log_name(rank: int) -> str:
    """The log of a process."""
    return f"log-rank{rank}.txt" if rank else "log.txt"


def failure_name() -> str:
    """Where this process notes its failure: one of several leaves it to the watcher whose is the job's."""
    return f"failure-rank{own_rank()}.json" if "HARNESS_RANK" in os.environ else "failure.json"


def spreads(job: dict[str, Any]) -> bool:
    """Whether a job can use several processes: as `distributed` of its plugin says (a bool, or a function of the recipe).

    Else trainings do, since `fit` shares a batch among them, and evaluators do not: on all processes, each runs `run`, and rank 0's outcome is kept.
    """
    say = getattr(restore(job["identity"]["plugin"]), "distributed", job["kind"] != "evaluate")
    return bool(say(restore(job["identity"].get("recipe"))) if callable(say) else say)


def join(machine: dict[str, Any]) -> dict[str, Any]:
    """Meet the other processes, where this is one of several. Returns what the first one's `set_up` chose: two that measure at once may find otherwise."""
    if "HARNESS_RANK" not in os.environ:
        return machine
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["HARNESS_RANK"]), int(os.environ["HARNESS_WORLD"])
    host, _, port = os.environ["HARNESS_MEETING"].rpartition(":")
    door = int(os.environ["HARNESS_DOOR"]) if rank == 0 else None
    make_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # it is exported, without saying so
    store = make_store(host, int(port), world, rank == 0, timeout=datetime.timedelta(seconds=MEET_S), master_listen_fd=door)
    backend = "nccl" if torch.cuda.is_available() and not os.environ.get("HARNESS_CPU") else "gloo"
    if backend == "nccl":  # object collectives and meshes go by the current device: 0 where a process sees its own GPU alone
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    dist.broadcast_object_list(first := [machine])
    torch.set_float32_matmul_precision(first[0]["gemm"])
    return first[0]


def meeting(folder: Path, door: socket.socket, nodes: int, node: int) -> str:
    """HOST:PORT where rank 0 listens; on several machines the first one writes it down for the others."""
    if nodes == 1:
        return f"127.0.0.1:{door.getsockname()[1]}"
    path, attempt, deadline = folder / "meeting.json", os.environ.get("HARNESS_ATTEMPT", ""), time.monotonic() + MEET_S
    if node == 0:
        write_json(path, {"attempt": attempt, "address": f"{socket.gethostname()}:{door.getsockname()[1]}"})
    while not isinstance(told := read_json(path), dict) or told.get("attempt") != attempt:
        if time.monotonic() > deadline:
            raise UserError(f"{path}: the first machine has not written it for {MEET_S:.0f} s: is the runs folder one that all machines see?")
        time.sleep(0.2)
    return str(told["address"])


def supervise(job: Path, should_stop: Callable[[], bool]) -> int:
    """Do a job on several processes. Returns its exit code, negative when a signal ended one of them, as Popen has it."""
    folder, count = job.parent, processes_here()
    nodes, node = number_from("HARNESS_NODES", default=1), number_from("HARNESS_NODE", 0, 0)
    if node == 0:
        for old in folder.glob("failure-rank*.json"):
            old.unlink(missing_ok=True)
    devices, children = gpus(), list[subprocess.Popen[bytes]]()
    with socket.socket() as door:  # bound here and handed to rank 0, so that nobody else can take the port in between
        door.bind(("127.0.0.1" if nodes == 1 else "", 0))
        door.listen(1024)
        shared = {
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP warns that there may have been no need to look for parameters without a gradient
            **os.environ, "HARNESS_WORLD": str(count * nodes), "HARNESS_MEETING": meeting(folder, door, nodes, node), "HARNESS_DOOR": str(door.fileno()),
            "HARNESS_LAUNCHER_PID": str(os.getpid()), "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path[1:]]),
        }
        for place in range(count):
            rank = node * count + place
            own = {"HARNESS_RANK": str(rank), **({"CUDA_VISIBLE_DEVICES": devices[place]} if devices else {})}
            with open(folder / log_name(rank), "ab") as log:
                children.append(subprocess.Popen(
                    [sys.executable, "-m", "harness.run", str(job)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**shared, **own},
                    pass_fds=() if rank else (door.fileno(),),
                ))
    killed, asked = watch(children, should_stop)
    return verdict(folder, node * count, [c.returncode for c in children], killed, asked, nodes > 1)


def watch(children: Sequence[subprocess.Popen[bytes]], should_stop: Callable[[], bool]) -> tuple[set[int], bool]:
    """Wait for all, hand a stop on, end the others when one has ended badly. Returns (places of those killed here, whether a stop was asked for)."""
    asked, deadline, killed = False, float("inf"), set[int]()
    while alive := [i for i, c in enumerate(children) if c.poll() is None]:
        if should_stop() and not asked:
            asked = True
            for child in children:
                child.terminate()
        ended = {c.returncode for c in children} - {None}
        if ended - {0, 130}:
            deadline = min(deadline, time.monotonic() + (0 if BUSY in ended else GRACE_S))
        elif 130 in ended or children[0].returncode == 0:
            deadline = min(deadline, time.monotonic() + SAVING_S)
        if time.monotonic() >= deadline:
            killed |= set(alive)
            for place in alive:
                children[place].kill()
        time.sleep(0.05)
    return killed, asked


def verdict(folder: Path, first: int, codes: Sequence[int], killed: set[int], asked: bool, shared: bool = False) -> int:
    """Exit code of the job; the failure that came first goes into failure.json and log.txt, not those of the processes that only lost it.

    Args:
        first: rank of the first process here; `codes` are of this and the following ones.
        killed: places in `codes` of those that were killed here.
        shared: other machines work on the job, too.
    """
    own = {first + place: code for place, code in enumerate(codes) if place not in killed}
    told = [f | {"rank": int(p.stem.removeprefix("failure-rank"))} for p in folder.glob("failure-rank*.json") if isinstance(f := read_json(p), dict)]
    told.sort(key=lambda f: (bool(FOLLOWS.search(f"{f['type']} {f['message']}")), f["time"]))
    cause = told and not FOLLOWS.search(f"{told[0]['type']} {told[0]['message']}")
    if BUSY in own.values() or not any(own.values()):
        return max(own.values())
    if not cause and asked and {130, -signal.SIGTERM} & set(own.values()):
        return 130
    if not cause and (dead := {r: code for r, code in own.items() if code < 0}):
        rank, code = next(iter(dead.items()))
        note(folder, f"rank {rank} was killed ({signal.Signals(-code).name}); the others were ended")
        return code
    if not told and (strange := {r: code for r, code in own.items() if code not in (0, 130)}):
        rank, code = next(iter(strange.items()))
        message = f"ended with exit code {code}: see {folder / log_name(rank)}"
        told = [{"message": message, "type": "Exit", "traceback": "", "time": time.time(), "rank": rank}]
    if told and not cause and shared:
        return 1  # the machine whose process is gone tells
    if told:
        failure = told[0] | {"message": f"rank {told[0]['rank']}: {told[0]['message']}" if told[0]["rank"] else told[0]["message"]}
        note(folder, f"failed: {failure['message']}\n{failure['traceback']}")
        write_json(folder / "failure.json", failure)
        return 1
    return 130 if 130 in own.values() else codes[0]


def note(folder: Path, line: str) -> None:
    """Add a line to log.txt."""
    with open(folder / "log.txt", "a") as stream:
        stream.write(f"{datetime.datetime.now().strftime('%H:%M:%S')} {line}\n")
