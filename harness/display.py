"""Progress of a run on stderr: states of its nodes, images per second, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from harness.jobs import Node
from harness.store import ENDED, Store, lock_owner, read_json

LINE_EVERY_S = 15.0


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
