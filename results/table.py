"""`harness table`: the records of runs folders as tables of methods x evaluators, or beside the numbers of a paper's table."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from harness import plugins
from harness.spec import UserError, suggest
from harness.store import Result, collect
from results.beside import LAYOUTS, fill, grid_of, paper_table, rows_of
from results.cells import sheets
from results.formats import FORMATS, grid
from results.standing import with_published


class Table:
    """The command plugin `table`. `harness run` calls `render` for the cells of its own plan."""

    name: ClassVar[str] = "table"
    help: ClassVar[str] = "print what the runs folders hold as a table"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Flags of the command."""
        parser.add_argument("--format", choices=sorted(FORMATS), default="markdown", help="default: markdown")
        parser.add_argument("--layout", metavar="NAME", help="a paper's table, its numbers beside the measured ones, if there are any (see below)")
        parser.formatter_class = argparse.RawDescriptionHelpFormatter  # names of layouts are not broken at their hyphens
        parser.epilog = textwrap.fill(f"layouts: {', '.join(LAYOUTS)}", 78, break_on_hyphens=False)
        parser.add_argument("--methods", metavar="A,B", help="only these rows, in this order (names or groups)")
        parser.add_argument("--evals", metavar="C,D", help="only these columns, in this order (names or groups)")
        parser.add_argument("--protocol", metavar="NAME", help="only this protocol")
        parser.add_argument("--backbone", metavar="NAME", help="only this backbone")
        parser.add_argument("--runs", metavar="DIR", nargs="+", action="extend", type=Path,
                            help="runs folders that are there, several are joined (default: runs; --layout needs none)")

    @staticmethod
    def render(results: Iterable[Result], format: str = "markdown", methods: Sequence[str] = (), evals: Sequence[str] = ()) -> str:
        """Tables as text, without a newline at the end; rows and columns in the given order, then in the order in which they first appear."""
        found = [with_published(sheet) for sheet in sheets(results, methods, evals)]
        rows = [s.cell(method, name, metric).as_row() for s in found for method in s.methods for name, metric in s.columns]
        return FORMATS[format](list(map(grid, found)), rows).rstrip("\n")

    @staticmethod
    def render_layout(name: str, results: Iterable[Result], format: str = "markdown") -> str:
        """A paper's table as text, what was measured beside its numbers; without any result the published numbers alone.

        Raises:
            UserError: no such layout.
        """
        table = paper_table(name)
        fields = fill(table, results)
        return FORMATS[format]([grid_of(table, fields)], rows_of(table, fields)).rstrip("\n")

    def run(self, args: argparse.Namespace) -> int:
        """Print the tables to stdout.

        Raises:
            UserError: no such layout; without a layout no results; none that a flag asks for.
        """
        folders = list(dict.fromkeys(args.runs or [Path("runs")]))
        if args.layout is not None:
            paper_table(args.layout)  # a wrong name is said before anything is read
            folders = folders if args.runs else [f for f in folders if f.is_dir()]
        results = collect(folders)
        if not results and args.layout is None:
            shown = " ".join(map(str, folders))
            raise UserError(f"--runs {shown}: no results there: `python -m harness run --methods ... --evals ... --runs {folders[0]}` makes some")
        for flag in ("protocol", "backbone"):
            names = chosen(flag, getattr(args, flag), {getattr(r, flag) for r in results})
            results = [r for r in results if not names or getattr(r, flag) in names]
        methods = chosen("methods", args.methods, {r.method for r in results})
        evals = chosen("evals", args.evals, {r.eval for r in results})
        results = [r for r in results if (not methods or r.method in methods) and (not evals or r.eval in evals)]
        print(self.render(results, args.format, methods, evals) if args.layout is None else self.render_layout(args.layout, results, args.format))
        return 0


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
