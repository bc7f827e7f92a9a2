"""The seam to the launchers, which are plugins (`launchers`, `slurm`): what they are asked for, and what of a machine and of a job all of them need."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.jobs import Node
from harness.plugins import importable, load
from harness.ranks import gpus, processes_here
from harness.spec import UserError
from harness.store import State, Store, write_json


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
