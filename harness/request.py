"""What the command line asks for, and the plan that is made of it: a graph of nodes and the cells of the table.

Names of plugins are looked up here, groups expanded; `harness.plan` does the rest.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import plugins
from harness.collect import Result, result_of
from harness.jobs import Node
from harness.spec import Protocol as Setting
from harness.spec import UserError, suggest

Keep = Callable[[Sequence[Result], Sequence[Path]], str]  # keeps the tables of a plan's results from these runs folders, and says so


def words(text: str) -> tuple[str, ...]:
    """A list on the command line: by commas."""
    return tuple(w.strip() for w in text.split(",") if w.strip())


def integers(flag: str, text: str) -> tuple[int, ...]:
    """Seeds: integers by commas, each once."""
    try:
        values = tuple(int(w) for w in words(text))
    except ValueError as error:
        raise UserError(f"{flag} {text}: seeds are integers separated by commas, as in 0,1,2") from error
    if not values:
        raise UserError(f"{flag}: the list is empty: name at least one seed, as in {flag} 0")
    if len(set(values)) != len(values) or min(values) < 0:
        raise UserError(f"{flag} {text}: name each seed once, none below 0")
    return values


@dataclass(frozen=True)
class Request:
    """What the user asked for, as on the command line."""

    methods: tuple[str, ...]
    evals: tuple[str, ...]
    protocol: str = "demo"
    backbone: str | None = None
    seeds: tuple[int, ...] = (0,)
    eval_seeds: tuple[int, ...] = (0,)
    data: str | None = None
    pretrain_data: str | None = None
    settings: tuple[str, ...] = ()
    tuning: str | None = None
    on_bad_image: str = "fail"
    on_oom: str = "fail"
    precision: str | None = None  # what `auto` means; None: what it means on this machine


@dataclass(frozen=True)
class Cell:
    """One cell of the table: a node, or the reason why there is none."""

    about: Mapping[str, Any]
    node: Node | None
    skipped: str = ""


@dataclass(frozen=True)
class Plan:
    """The nodes in an order that respects dependencies, and the cells that they fill. `later`: alternatives of what follows once their records are there."""

    nodes: tuple[Node, ...]
    cells: tuple[Cell, ...]
    protocol: Setting
    later: tuple[tuple[Node, ...], ...] = ()

    def results(self, states: Mapping[str, Any], records: Mapping[str, Any]) -> list[Result]:
        """Cells with what became of them: states and records by key."""
        out = []
        for cell in self.cells:
            if cell.node is None:
                out.append(result_of(cell.about, "skipped", cell.skipped, None, ""))
            else:
                state = states[cell.node.key]
                out.append(result_of(cell.about, state.status, state.reason, records.get(cell.node.key), cell.node.key))
        return out


def requests_of(args: argparse.Namespace, precision: str | None) -> tuple[tuple[Request, ...], Keep | None]:
    """What the flags of `run` ask for, flags that are given taking the place of a --plan's own values; and what keeps that plan's tables.

    Raises:
        UserError: neither a plan nor --methods and --evals, or both; a plan that cannot be used.
    """
    given = {k: v for k in ("protocol", "backbone", "tuning", "data", "pretrain_data") if (v := getattr(args, k)) is not None}
    given |= {k: integers(f"--{k.replace('_', '-')}", v) for k in ("seeds", "eval_seeds") if (v := getattr(args, k)) is not None}
    if args.plan is not None:
        requests, keep = plugins.load("commands", "table")().claim(args, tuple(given))
    elif not (args.methods and args.evals) or args.out:
        raise UserError("--out: belongs to --plan: leave it out" if args.out else "run: name --methods and --evals, or --plan FILE (see `harness run --help`)")
    else:
        requests, keep = (Request(words(",".join(args.methods)), words(",".join(args.evals))),), None
    given |= {"on_bad_image": args.on_bad_image, "on_oom": args.on_oom, "precision": precision}
    return tuple(replace(r, **given, settings=(*r.settings, *args.set)) for r in requests), keep


def names(kind: str, words: Sequence[str]) -> list[tuple[str, bool]]:
    """Words of --methods or --evals, groups expanded: (name, named explicitly).

    Raises:
        UserError: empty list, or a name twice.
    """
    flag, found = f"--{kind}", []
    for word in words:
        known = word in plugins.installed(kind) or any(c in word for c in "@:")
        members = None if known else plugins.group(kind, word)
        if not known and members is None:
            variants = {f"{name}@{v}": v for name, plugin in plugins.importable(kind).items() for v in getattr(plugin, "variants", ())}
            same = [name for name, v in variants.items() if v == word]
            hint = f"did you mean {' or '.join(same)}?" if same else suggest(word, [*plugins.installed(kind), *plugins.groups(kind)], also=variants)
            raise UserError(f"{flag}: unknown name {word!r}: {hint}")
        found += [(word, True)] if known else [(m, False) for m in members or ()]
    if not found:
        raise UserError(f"{flag}: the list is empty: name at least one of {', '.join(plugins.installed(kind))}")
    explicit = [n for n, named in found if named]
    if twice := sorted({n for n in explicit if explicit.count(n) > 1}):
        raise UserError(f"{flag}: {', '.join(twice)} is named twice: name each once")
    unique: dict[str, bool] = {}
    for name, named in found:
        unique[name] = unique.get(name, False) or named
    return list(unique.items())


def resolve_precision() -> str:
    """What `auto` means on this machine, for all rows of a table alike: bf16 where there is hardware for it."""
    import torch

    if torch.cuda.is_available() and not os.environ.get("HARNESS_CPU"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "fp32"
