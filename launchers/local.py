"""The launcher `local`: as many jobs at a time as this machine has room for, each a process of its own. A failed node takes down only what needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.jobs import Node
from harness.launch import room, write_job
from harness.ranks import BUSY, gpus, processes_here
from harness.run import stop_on_signal
from harness.store import ENDED, Store, write_json

POLL_S = 0.2
EPOCH = 1_000_000  # images of one, roughly, where only the data knows how many there are


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
        """See `harness.launch.Launcher`."""
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
