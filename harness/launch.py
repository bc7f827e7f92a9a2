"""Launchers: how the nodes of a plan become processes.

`local` keeps as many jobs running as the machine has room for, each a process of its own; `debug` does them one after the other in
this process. A node that fails takes down only what depends on it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from harness.jobs import Node
from harness.plugins import importable, load
from harness.run import BUSY, execute, stop_on_signal
from harness.spec import UserError
from harness.store import State, Store, lock_owner, read_json, write_json

POLL_S = 0.2
LINE_EVERY_S = 15.0
ENDED = ("done", "failed", "killed", "blocked")


class Launcher(Protocol):
    """Brings nodes to an end. Returns 0 when all have ended, 3 when they are submitted and not finished, 130 when it was interrupted.

    Optional are `flags` (names of flags of `run` -> keywords of add_argument; what is given goes to the constructor), `precision` (what `auto` means where it
    runs jobs), preview(nodes, store, force) -> what --dry-run adds, and a static queued(store) -> states of nodes elsewhere, by folder name, for `status`.
    """

    def launch(self, nodes: Sequence[Node], store: Store, show: Callable[[Mapping[str, Any]], None]) -> int: ...


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that installed launchers add to `run`."""
    for name, launcher in importable("launchers").items():
        for flag, keywords in getattr(launcher, "flags", {}).items():
            parser.add_argument(f"--{flag}", **{**keywords, "help": f"with --launcher {name}: {keywords['help']}"})


def make_launcher(args: argparse.Namespace) -> Any:
    """The launcher that --launcher names, with its flags. Raises UserError when there is no such one, or a flag is another one's."""
    chosen = load("launchers", args.launcher, "--launcher")
    given = {flag: getattr(args, flag) for launcher in importable("launchers").values() for flag in getattr(launcher, "flags", {})}
    own = getattr(chosen, "flags", {})
    if wrong := [flag for flag, value in given.items() if value and flag not in own]:
        raise UserError(f"--{wrong[0]}: --launcher {args.launcher} does not know it: leave it out, or name another launcher")
    return chosen(**{flag: given[flag] for flag in own})


def queued(store: Store) -> dict[str, State]:
    """States of nodes that wait or run elsewhere, by folder name."""
    return {name: s for launcher in importable("launchers").values() if hasattr(launcher, "queued") for name, s in launcher.queued(store).items()}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """CUDA devices, counted without importing torch where possible."""
    if os.environ.get("HARNESS_CPU"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0


def room() -> tuple[int, int]:
    """(jobs at a time, threads of each): a job per GPU, else up to four jobs that share the cores; small jobs scale poorly over threads."""
    if gpus():
        return gpus(), max(1, cores() // gpus())
    jobs = min(4, cores())
    return jobs, max(1, cores() // jobs)


def write_job(node: Node, store: Store) -> Path:
    """Write job.json of a node about to start. Folders may have moved since; the identity cannot have."""
    path = store.folder(node) / "job.json"
    write_json(path, node.job(store.root))
    return path


@dataclass
class Local:
    """Processes on this machine."""

    running: dict[str, tuple[subprocess.Popen[bytes], int]] = field(default_factory=dict)

    def launch(self, nodes: Sequence[Node], store: Store, show: Callable[[Mapping[str, Any]], None]) -> int:
        """See `Launcher`."""
        slots, threads = room()
        todo, status = list(nodes), {n.key: store.state(store.folder(n)).status for n in nodes}
        try:
            with stop_on_signal() as asked:
                while todo and not asked():
                    self.reap(nodes, store, status)
                    for node in list(todo):
                        if node.key in self.running:
                            continue
                        if status[node.key] in ENDED:
                            todo.remove(node)
                        elif any(status[p.key] in ENDED and status[p.key] != "done" for p in node.parents.values()):
                            status[node.key] = "blocked"
                        elif all(status[p.key] == "done" for p in node.parents.values()) and len(self.running) < slots:
                            state = store.state(store.folder(node)).status
                            if state in ("done", "failed", "running"):  # running: another harness has it, its result is waited for
                                status[node.key] = "elsewhere" if state == "running" else state
                                continue
                            self.start(node, store, threads, slots)
                            status[node.key] = "running"
                    show(status)
                    time.sleep(POLL_S)
                interrupted = asked()
        finally:
            self.stop(store, nodes)
        return 130 if interrupted else 0

    def start(self, node: Node, store: Store, threads: int, slots: int) -> None:
        """Start a node's process; what it prints goes to its log."""
        job = write_job(node, store)
        (job.parent / "progress.json").unlink(missing_ok=True)  # of an earlier start
        taken = {slot for _, slot in self.running.values()}
        slot = next(s for s in range(slots) if s not in taken)
        environment = {
            **os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "HARNESS_THREADS": str(threads),
            "HARNESS_LAUNCHER_PID": str(os.getpid()), "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path[1:]]),
        }
        if gpus():
            devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus())))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot]
            environment.setdefault("HARNESS_WORKERS", str(threads))
        with open(job.parent / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "harness.run", str(job)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which then asks each job to save
            )
        self.running[node.key] = (process, slot)

    def reap(self, nodes: Sequence[Node], store: Store, status: dict[str, str]) -> None:
        """Take note of processes that have ended."""
        by_key = {n.key: n for n in nodes}
        for key, (process, _) in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[key]
            folder = store.folder(by_key[key])
            if code == BUSY:  # another harness was quicker: it stays to do, and is waited for
                status[key] = "missing"
                continue
            state = store.state(folder).status
            if state in ("done", "failed"):
                status[key] = state
            elif code < 0 or code == 130:  # killed or stopped from outside: the next run goes on from its last state
                status[key] = "killed"
            else:
                status[key] = "failed"
                message = f"its process ended with exit code {code}: see {folder / 'log.txt'}"
                try:
                    write_json(folder / "failure.json", {"message": message, "type": "Exit", "traceback": "", "time": time.time()})
                except OSError as error:  # a full disk, which may be why it ended; the others may still end well
                    print(f"{folder.name}: {message}; that cannot be noted there ({error.strerror})", file=sys.stderr)

    def stop(self, store: Store, nodes: Sequence[Node]) -> None:
        """Ask what still runs to save and end, and wait; a second signal does not wait for any."""
        for process, _ in self.running.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        for process, _ in self.running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                deadline = 0.0
                process.kill()
                process.wait()
        self.running.clear()


@dataclass
class Debug:
    """One after the other in this process: breakpoints work, and tracebacks are in the job's log."""

    def launch(self, nodes: Sequence[Node], store: Store, show: Callable[[Mapping[str, Any]], None]) -> int:
        """See `Launcher`."""
        status: dict[str, str] = {}
        os.environ.setdefault("HARNESS_THREADS", str(room()[1]))  # as many as under `local`: the number of threads can change the last bits
        with stop_on_signal() as asked:
            for node in nodes:
                state: State = store.state(store.folder(node))
                if state.status in ("done", "failed"):
                    status[node.key] = state.status
                    continue
                if any(status[p.key] != "done" for p in node.parents.values()):
                    status[node.key] = "blocked"
                    continue
                status[node.key] = "running"
                show(status)
                while (code := execute(write_job(node, store), asked)) == BUSY and not asked():
                    time.sleep(1.0)
                status[node.key] = store.state(store.folder(node)).status
                if code == 130 or asked():
                    return 130
        show(status)
        return 0


class Display:
    """Progress on stderr: on a terminal one line that is rewritten, in a log plain lines now and then."""

    def __init__(self, nodes: Sequence[Node], store: Store) -> None:
        self.nodes, self.store, self.tty = nodes, store, sys.stderr.isatty()
        self.last, self.before = 0.0, dict[str, str]()
        self.durations: dict[str, float] = {}
        self.begun: dict[str, float] = {}

    def __call__(self, status: Mapping[str, str]) -> None:
        """Show where the nodes stand."""
        now = time.monotonic()
        for number, node in enumerate(self.nodes, start=1):
            state = status.get(node.key, "missing")
            if self.before.get(node.key) != state:
                self.before[node.key] = state
                if state in ("running", "elsewhere"):
                    self.begun[node.key] = now
                    what = "started" if state == "running" else f"waits for {lock_owner(self.store.folder(node)) or 'another process'}"
                    self.line(f"[{number}/{len(self.nodes)}] {node.about['title']} seed {node.about['seed']}: {what}")
                elif state in ("done", "failed", "killed") and node.key in self.begun:
                    took = self.durations[node.key] = now - self.begun[node.key]
                    self.line(f"[{number}/{len(self.nodes)}] {node.about['title']} seed {node.about['seed']}: {state} in {clock(took)}{self.score(node)}")
        if now - self.last < (1.0 if self.tty else LINE_EVERY_S):
            return
        self.last = now
        parts = [p for n in self.nodes if status.get(n.key) in ("running", "elsewhere") and (p := self.progress(n))]
        done = sum(s == "done" for s in status.values())
        text = " | ".join([f"{done}/{len(self.nodes)} done", *parts, f"run: {self.left(status)}"])
        if self.tty:
            import shutil

            sys.stderr.write("\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        else:
            print(text, file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        print(("\r\033[K" if self.tty else "") + text, file=sys.stderr, flush=True)

    def score(self, node: Node) -> str:
        """The metrics of a node that is done, or why it failed."""
        folder = self.store.folder(node)
        state = self.store.state(folder)
        if state.status == "failed":
            return f": {state.reason}"
        metrics = (read_json(folder / "record.json") or {}).get("metrics") or {}
        return "".join(f", {name} {value:.2f}" for name, value in metrics.items())

    def progress(self, node: Node) -> str:
        """A running node's part of the line."""
        p = read_json(self.store.folder(node) / "progress.json")
        if not isinstance(p, dict):
            return f"{node.about['title']}: {'ending' if (self.store.folder(node) / 'record.json').exists() else 'starting'}"
        loss = "" if p["loss"] is None else f" loss {p['loss']:.3f}"
        left = "" if p["seconds_left"] is None else f" {clock(p['seconds_left'])} left"
        return f"{node.about['title']} {p['step']}/{p['steps']}{loss} {p['images_per_s']:.0f} images/s{left}"

    def left(self, status: Mapping[str, str]) -> str:
        """Time left for the whole run: what nodes of the same kind and evaluator took, over the jobs that run at a time."""
        waiting, known = 0.0, 0
        kinds: dict[str, list[float]] = {}
        for node in self.nodes:
            if node.key in self.durations:
                kinds.setdefault(node.kind, []).append(self.durations[node.key])
        fallback = [d for ds in kinds.values() for d in ds]
        for node in self.nodes:
            state = status.get(node.key, "missing")
            p = read_json(self.store.folder(node) / "progress.json") if state in ("running", "elsewhere") else None
            if isinstance(p, dict):
                waiting += float(p["seconds_left"] or 0.0)
            elif state not in ENDED:
                sample = kinds.get(node.kind) or fallback
                if not sample:
                    known += 1
                    continue
                waiting += sum(sample) / len(sample)
        busy = max(1, sum(s in ("running", "elsewhere") for s in status.values()))
        return f"{clock(waiting / busy)} left" + (f" and {known} jobs not timed yet" if known else "")

    def close(self) -> None:
        """End the line that is rewritten."""
        if self.tty:
            sys.stderr.write("\r\033[K")


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    total = round(seconds)
    hours, minutes = total // 3600, total // 60 % 60
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"
