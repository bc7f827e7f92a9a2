"""`harness table`: the records of runs folders as tables of methods x evaluators."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from harness import plugins
from harness.spec import UserError, suggest
from harness.store import Result, collect
from results.cells import sheets
from results.formats import FORMATS


class Table:
    """The command plugin `table`. `harness run` calls `render` for the cells of its own plan."""

    name: ClassVar[str] = "table"
    help: ClassVar[str] = "print what the runs folders hold as a table"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Flags of the command."""
        parser.add_argument("--format", choices=sorted(FORMATS), default="markdown", help="default: markdown")
        parser.add_argument("--methods", metavar="A,B", help="only these rows, in this order (names or groups)")
        parser.add_argument("--evals", metavar="C,D", help="only these columns, in this order (names or groups)")
        parser.add_argument("--protocol", metavar="NAME", help="only this protocol")
        parser.add_argument("--backbone", metavar="NAME", help="only this backbone")
        parser.add_argument("--runs", metavar="DIR", nargs="+", action="extend", type=Path, help="runs folders, several are joined (default: runs)")

    @staticmethod
    def render(results: Iterable[Result], format: str = "markdown", methods: Sequence[str] = (), evals: Sequence[str] = ()) -> str:
        """Tables as text, without a newline at the end; rows and columns in the given order, then in the order in which they first appear."""
        return FORMATS[format](sheets(results, methods, evals)).rstrip("\n")

    def run(self, args: argparse.Namespace) -> int:
        """Print the tables to stdout.

        Raises:
            UserError: no results, or none that a flag asks for.
        """
        folders = list(dict.fromkeys(args.runs or [Path("runs")]))
        results = collect(folders)
        if not results:
            shown = " ".join(map(str, folders))
            raise UserError(f"--runs {shown}: no results there: `python -m harness run --methods ... --evals ... --runs {folders[0]}` makes some")
        for flag in ("protocol", "backbone"):
            names = chosen(flag, getattr(args, flag), {getattr(r, flag) for r in results})
            results = [r for r in results if not names or getattr(r, flag) in names]
        methods = chosen("methods", args.methods, {r.method for r in results})
        evals = chosen("evals", args.evals, {r.eval for r in results})
        results = [r for r in results if (not methods or r.method in methods) and (not evals or r.eval in evals)]
        print(self.render(results, args.format, methods, evals))
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
