"""`harness table`: the records of runs folders as tables of methods x evaluators, or beside the numbers of a paper's table."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from harness import plugins
from harness.collect import Result, collect
from harness.request import Keep, Request
from harness.run import no_collections
from harness.spec import UserError, suggest
from harness.store import State, Store
from results.ancestry import Archive
from results.audit import VERDICTS, of_sheet, stamp
from results.beside import LAYOUTS, fill, grid_of, paper_table, rows_of
from results.cells import sheets
from results.costs import cell_cost, with_costs
from results.formats import FORMATS
from results.grid import grid
from results.kept import NAME as KEPT
from results.selection import selected_on_test, selected_on_train, trials_of
from results.staleness import Staleness, with_stale
from results.standing import with_published


class Table:
    """The command plugin `table`. `harness run` calls `render` for its own cells, with --plan `claim`; `harness status` calls `overview`, `explain`."""

    name: ClassVar[str] = "table"
    help: ClassVar[str] = "print what the runs folders hold as a table"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Flags of the command."""
        parser.add_argument("--format", choices=sorted(FORMATS), default="markdown", help="default: markdown")
        parser.add_argument("--layout", metavar="NAME", help="a paper's table, its numbers beside the measured ones, if there are any (see below)")
        parser.formatter_class = argparse.RawDescriptionHelpFormatter  # names of layouts are not broken at their hyphens
        parser.epilog = textwrap.fill(f"layouts: {', '.join(LAYOUTS)}", 78, break_on_hyphens=False)
        parser.add_argument("--spread", choices=("std", "ci95"), default="std", help="what stands behind a mean (default: std; csv and json have both)")
        parser.add_argument("--cost", action="store_true", help="more columns: device-hours, FLOPs, images per second, peak memory")
        add_choice(parser)

    @staticmethod
    def render(results: Iterable[Result], format: str = "markdown", methods: Sequence[str] = (), evals: Sequence[str] = (), spread: str = "std",
               folders: Sequence[Path] = (), cost: bool = False, archive: Archive | None = None, staleness: Staleness | None = None) -> str:
        """Tables as text, without a newline at the end; rows and columns in the given order, then in the order in which they first appear.

        `spread`: std or ci95, what stands behind a mean. With the runs folders that the results came from, the table stars what is stale, flags what was
        selected on test and carries the stamp of the fairness audit, and on `cost` columns of cost. `archive`: these folders, where they have been read;
        `staleness`: what decides on stars in place of this machine.
        """
        archive = archive or (Archive(tuple(folders)) if folders else None)
        found = [with_published(sheet) for sheet in sheets(results, methods, evals)]
        staleness = staleness or (Staleness(archive, data=True) if archive else None)
        found = [with_stale(sheet, staleness) for sheet in found] if staleness else found
        rows, grids = [], []
        for sheet in found:
            cells = [sheet.cell(method, name, metric) for method in sheet.methods for name, metric in sheet.columns]
            items = of_sheet(sheet, archive, 2) if archive else ()
            fairness = {"audit": {v: [i.name for i in items if i.verdict == v] for v in VERDICTS}} if items and format == "json" else {}
            rows += [{**cell.as_row(), **(cell_cost(cell, sheet, archive) if archive and cost else {}), **fairness} for cell in cells]
            table = grid(sheet, spread)
            table = with_costs(table, sheet, archive) if archive and cost else table
            trials = trials_of(sheet, archive) if archive else {}
            said = (selected_on_train(sheet, trials), selected_on_test(sheet, trials), stamp(items)) if archive else ()
            grids.append(replace(table, below=(*table.below, *filter(None, said))))
        return FORMATS[format](grids, rows).rstrip("\n")

    @staticmethod
    def explain(run: str, store: Store, away: Mapping[str, State]) -> list[str]:
        """What `harness status RUN` says."""
        from results.changes import explain

        return explain(run, Archive((store.root,)), away)

    @staticmethod
    def claim(args: argparse.Namespace, given: Sequence[str]) -> tuple[tuple[Request, ...], Keep]:
        """What `harness run --plan` does and keeps. `given`: fields of a request that flags replace."""
        from results.claims import claim

        if named := [f"--{k}" for k in ("methods", "evals") if getattr(args, k)]:
            raise UserError(f"{named[0]}: --plan {args.plan} says which: leave one of them out")
        changed = [f"--{name.replace('_', '-')}" for name in given] + ["--set"] * bool(args.set)
        return claim(Path(args.plan), args.out, changed, not args.dry_run)

    @staticmethod
    def overview(look: Callable[[], tuple[Store, Mapping[str, State]]], again: bool) -> int:
        """What `harness status` says of all jobs, once or until nothing runs."""
        from results.watching import overview, watch

        if again:
            return watch(lambda: overview(*look()))
        found, root = overview(*look()), look()[0].root
        if (root / KEPT).is_file():
            print(f"{root}: kept records of {len(found)} jobs; logs, curves and checkpoints lie in the runs folder that they were made in", file=sys.stderr)
        elif not found:
            print(f"{root}: no runs there yet: `run` with this --runs makes some", file=sys.stderr)
        for _, line in found:
            print(line)
        return 0

    @staticmethod
    def render_layout(name: str, results: Iterable[Result], format: str = "markdown", staleness: Staleness | None = None) -> str:
        """A paper's table as text, what was measured beside its numbers, starred where `staleness` is given and finds it stale; without any result the
        published numbers alone.

        Raises:
            UserError: no such layout.
        """
        table = paper_table(name)
        fields = fill(table, results, staleness)
        return FORMATS[format]([grid_of(table, fields)], rows_of(table, fields)).rstrip("\n")

    def run(self, args: argparse.Namespace) -> int:
        """Print the tables to stdout.

        Raises:
            UserError: no such layout; without a layout no results; none that a flag asks for.
        """
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # scipy's own would start a thread for each core, for a few seeds
        if args.layout is not None:
            paper_table(args.layout)  # a wrong name is said before anything is read
        with no_collections():  # 10,000 records are no garbage; and statsmodels looks for some after each correction, among what came since
            choice = choose(args, needed=args.layout is None)
        with no_collections():
            if args.layout is not None:
                text = self.render_layout(args.layout, choice.results, args.format, Staleness(choice.archive, data=True))
            else:
                text = self.render(choice.results, args.format, choice.methods, choice.evals, args.spread, cost=args.cost, archive=choice.archive)
        print(text)
        choice.archive.tell()
        return 0


@dataclass(frozen=True)
class Choice:
    """What the flags of a command leave of the runs folders, and the order of rows and columns that they ask for."""

    results: list[Result]
    archive: Archive
    methods: tuple[str, ...]
    evals: tuple[str, ...]


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The flags that `choose` reads: `table`, `report` and `audit` share them."""
    parser.add_argument("--methods", metavar="A,B", help="only these rows, in this order (names or groups)")
    parser.add_argument("--evals", metavar="C,D", help="only these columns, in this order (names or groups)")
    parser.add_argument("--protocol", metavar="NAME", help="only this protocol")
    parser.add_argument("--backbone", metavar="NAME", help="only this backbone")
    parser.add_argument("--runs", metavar="DIR", nargs="+", action="extend", type=Path,
                        help="runs folders that are there, or folders of a plan with its kept records; several are joined (default: runs)")


def choose(args: argparse.Namespace, needed: bool = True) -> Choice:
    """The results that the flags ask for.

    Raises:
        UserError: no results (where some are `needed`), or none that a flag asks for.
    """
    folders = tuple(dict.fromkeys(args.runs or [Path("runs")]))
    if not needed and not args.runs:
        folders = tuple(f for f in folders if f.is_dir())
    archive = Archive(folders)
    results = [*collect([f for f in folders if not (f / KEPT).is_file()], archive.read), *archive.kept]
    if not results and needed:
        shown = " ".join(map(str, folders))
        raise UserError(f"--runs {shown}: no results there: `python -m harness run --methods ... --evals ... --runs {folders[0]}` makes some")
    for flag in ("protocol", "backbone"):
        names = chosen(flag, getattr(args, flag), {getattr(r, flag) for r in results})
        results = [r for r in results if not names or getattr(r, flag) in names]
    methods = chosen("methods", args.methods, {r.method for r in results})
    evals = chosen("evals", args.evals, {r.eval for r in results})
    results = [r for r in results if (not methods or r.method in methods) and (not evals or r.eval in evals)]
    return Choice(results, archive, methods, evals)


def chosen(flag: str, wanted: str | None, present: Collection[str]) -> tuple[str, ...]:
    """The names of a comma-separated flag, groups of plugins replaced by their members that are there; () when the flag was not given.

    Raises:
        UserError: an empty list, or a name without any result.
    """
    if wanted is None:
        return ()
    names: list[str] = []
    for word in filter(None, map(str.strip, wanted.split(","))):
        members = [word] if word in present else [n for n in _group(flag, word) if n in present]
        if not members:
            raise UserError(f"--{flag}: no result of {word!r} in these runs: {suggest(word, present)}")
        names += members
    if not names:
        raise UserError(f"--{flag}: the list is empty: {suggest('', present)}")
    return tuple(dict.fromkeys(names))


def _group(flag: str, word: str) -> tuple[str, ...]:
    """Members of a group of methods or evaluators. A plugin that cannot be imported must not keep people from the results of others."""
    try:
        return plugins.group(flag, word) or () if flag in plugins.KINDS else ()
    except UserError:
        return ()
