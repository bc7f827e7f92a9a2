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
from harness.ranks import BUSY, gpus, processes_here
from harness.run import start, stop_on_signal
from harness.spec import UserError
from harness.store import ENDED, State, Store, write_json

POLL_S = 0.2
EPOCH = 1_000_000  # images of one, roughly, where only the data knows how many there are


class Launcher(Protocol):
    """Brings nodes to an end. Returns 0 when all have ended, 3 when they are submitted and not finished, 130 when it was interrupted.

    Optional are `flags` (flags of `run` -> keywords of add_argument; those given go to the constructor), `precision` (`auto` where it runs jobs), check(nodes,
    store, force), to refuse by UserError before anything is written, preview(nodes, store, force) for --dry-run, static queued(store) -> {folder name: state}.
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


def room() -> tuple[int, int]:
    """(jobs at a time, threads of each of their processes): a process per GPU, else up to four that share the cores; small jobs scale poorly over threads."""
    processes, each = len(gpus()) or min(4, cores()), processes_here()
    jobs = max(1, processes // each)
    return jobs, max(1, cores() // (jobs * each))


def write_job(node: Node, store: Store) -> Path:
    """Write job.json of a node about to start. Folders may have moved since; the identity cannot have."""
    path = store.folder(node) / "job.json"
    write_json(path, node.job(store.root), indent=None)  # a plan may have thousands; the record will say the same for people
    return path


def longest_first(nodes: Sequence[Node]) -> list[Node]:
    """Nodes by how many images they and the longest chain of what stands on them are shown, most first: what is left for the end is short."""
    ahead = dict.fromkeys((n.key for n in nodes), 0.0)
    for node in reversed(nodes):
        recipe = node.identity.get("recipe") or {}
        ahead[node.key] += recipe["batch"] * recipe["iterations"] if recipe.get("iterations") else EPOCH * (recipe.get("epochs") or 0)
        ahead |= {parent.key: max(ahead.get(parent.key, 0.0), ahead[node.key]) for parent in node.parents.values()}
    return sorted(nodes, key=lambda n: -ahead[n.key])


@dataclass
class Local:
    """Processes on this machine."""

    running: dict[str, tuple[subprocess.Popen[bytes], int]] = field(default_factory=dict)

    def launch(self, nodes: Sequence[Node], store: Store, show: Callable[[Mapping[str, Any]], None]) -> int:
        """See `Launcher`."""
        slots, threads = room()
        todo, status = longest_first(nodes), {n.key: store.state(store.folder(n)).status for n in nodes}
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
            each = processes_here()
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus()[slot * each : (slot + 1) * each])
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
    """One after the other in this process: breakpoints work (with HARNESS_PROCESSES they do not), and tracebacks are in the job's log."""

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
                while (code := start(write_job(node, store), asked)) == BUSY and not asked():
                    time.sleep(1.0)
                status[node.key] = store.state(store.folder(node)).status
                if code == 130 or asked():
                    return 130
        show(status)
        return 0
