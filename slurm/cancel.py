"""`harness cancel [RUN ...]`: takes jobs out of SLURM's queue. What they have saved stays; the same `run` line submits them again."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.spec import UserError, suggest
from harness.store import Store
from slurm.queue import ask, jobs_of


class Cancel:
    """The command `cancel`."""

    help = "take jobs out of the cluster's queue; what they have saved stays"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Words of the command line."""
        parser.add_argument("run", nargs="*", metavar="RUN", help="nodes: their folders' names, or the beginning of their keys (default: all in the queue)")
        parser.add_argument("--runs", default="runs", help="folder of the results (default: runs)")

    def run(self, args: argparse.Namespace) -> int:
        """Cancel, and print what was in the queue.

        Raises:
            UserError: no such folder or node, or SLURM cannot be asked.
        """
        store = Store(Path(args.runs))
        if not store.root.is_dir():
            raise UserError(f"--runs {store.root}: no such folder: name the folder that `run` wrote to")
        store.check_version()
        queue, _ = jobs_of(store)
        chosen = queue
        if args.run:
            chosen = {}
            for word in args.run:
                fitting = {n: j for n, j in queue.items() if n == Path(word).name or n.rsplit("-", 1)[-1].startswith(word)}
                if not fitting:
                    raise UserError(f"cancel {word}: no such run in the queue: {suggest(word, queue, most=200)}")
                chosen |= fitting
        if not chosen:
            print("nothing is in the queue")
            return 0
        ask("scancel", *sorted({job.id for job in chosen.values()}))
        for name, job in chosen.items():
            print(f"cancelled {job.id:12} {name}")
        return 0
