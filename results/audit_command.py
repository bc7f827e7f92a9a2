"""`harness audit`: is the comparison fair? Every item that rows should have equal, from the records, or with --plan from a plan before it is launched."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from harness.spec import UserError
from harness.store import Store
from results.ancestry import Archive, Step
from results.audit import ALONE, UNKNOWN, VERDICTS, Item, audit, compared, of_sheet, score
from results.budget import Budget
from results.cells import Sheet, sheets
from results.selection import Trials, trials_of, tried
from results.table import add_choice, choose


class Audit:
    """The command plugin `audit`."""

    help: ClassVar[str] = "is the comparison fair? what the rows of a table had, equal or unequal item by item"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Flags of the command."""
        parser.add_argument("--plan", action="store_true", help="look at what `run` with these flags would do, before launching")
        parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
        parser.add_argument("--data", help="with --plan: as for run")
        parser.add_argument("--pretrain-data", metavar="DIR", help="with --plan: as for run")
        parser.add_argument("--tuning", choices=("shared", "published"), help="with --plan: as for run")
        parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="with --plan: as for run")
        parser.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="with --plan: as for run")
        add_choice(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print the audit of each table.

        Raises:
            UserError: no results, none that a flag asks for, or a plan that cannot be made.
        """
        if args.plan:
            found = [("plan", planned(args))]
        else:
            if args.data or args.pretrain_data or args.tuning or args.set or args.sweep:
                raise UserError("audit: --data, --pretrain-data, --tuning, --set and --sweep describe a plan: add --plan, or leave them out")
            choice = choose(args)
            archive = choice.archive
            found = [(f"{s.protocol}, {s.backbone}, {s.data}, tuning {s.tuning}", of_sheet(s, archive))
                     for s in sheets(choice.results, choice.methods, choice.evals)]
            archive.tell()
        if args.format == "json":
            print(json.dumps([{"table": title, "items": [as_row(i) for i in items]} for title, items in found], indent=1, ensure_ascii=False))
        else:
            print("\n\n".join(as_text(title, items) for title, items in found))
        return 0


def as_row(item: Item) -> dict[str, Any]:
    """An item as JSON."""
    return {"item": item.name, "verdict": item.verdict, "values": dict(item.values)}


def as_text(title: str, items: Sequence[Item]) -> str:
    """An audit for reading: unequal items first, equal ones in one line each."""
    if not items:
        return f"{title}: no row with a score, nothing to compare"
    width = max(len(i.name) for i in items)
    if not compared(items):
        method = next(iter(items[0].values))
        return "\n".join([f"{title}: one row, nothing to compare it with; {method} had", *(f"{i.name:{width}}  {i.values[method]}" for i in items)])
    lines = [f"{title}: {score(items)}"]
    for item in sorted(items, key=lambda i: (*VERDICTS, ALONE).index(i.verdict)):
        groups = item.grouped()
        said = next(iter(groups)) if len(groups) == 1 else "; ".join(f"{', '.join(methods)}: {value}" for value, methods in groups.items())
        lines.append(f"{item.verdict:10} {item.name:{width}}  {said}")
    return "\n".join(lines)


def planned(args: argparse.Namespace) -> tuple[Item, ...]:
    """The audit of a plan: what is known before anything has run.

    Device-hours as `run --dry-run` estimates them for this machine; FLOPs from records that have counted them for the same computation, or counted without
    numbers (both `results.budget`); trials are those of the runs folder and of the plan. What none of these tells of is not known, nor is, before the
    trials of a sweep have ended, what the values of the sweep differ in.
    """
    from harness.jobs import Node
    from harness.plan import Planner
    from harness.request import Cell, Request
    from results.sweep import Sweep

    if not args.methods or not args.evals:
        raise UserError("audit --plan: name --methods and --evals, as for run")
    words = {flag: tuple(w.strip() for w in getattr(args, flag).split(",") if w.strip()) for flag in ("methods", "evals")}
    request = Request(words["methods"], words["evals"], args.protocol or "demo", args.backbone, data=args.data, pretrain_data=args.pretrain_data,
                      settings=tuple(args.set), tuning=args.tuning)

    store = Store((args.runs or [Path("runs")])[0])
    sweep = Sweep(request, argparse.Namespace(sweep=args.sweep, force=False, retry=False), store) if args.sweep else None
    plan = (sweep or Planner(request)).plan()
    costs = Budget(plan, store, True, None)
    swept = sweep.found if sweep else []
    ways: Iterable[Iterable[Cell]] = [plan.cells]
    if plan.later:  # each cell with each of its values; of how many there are decides the key that has most
        base = next(iter(swept[0].plans.values())).cells
        values = [next(([p.cells[i] for p in t.plans.values()] for t in swept if i in t.touched), [cell]) for i, cell in enumerate(base)]
        ways = [[found[min(way, len(found) - 1)] for found in values] for way in range(max(map(len, values)))]

    def trail(role: str, node: Node) -> list[Step]:
        step = Step(role, node.key, None, {**expected(node), "device_hours": costs.estimates[node.key].hours, "flops": costs.flops(node)})
        return [step, *(s for name, parent in node.parents.items() for s in trail(name, parent))]

    each = []
    counts = trials_of(like(plan.cells), Archive((store.root,)), {n.key: n.job(store.root) for n in plan.nodes})
    for cells in ways:
        found: dict[str, dict[str, tuple[Step, ...]]] = {}
        for index, cell in enumerate(cells):
            if cell.node is not None:
                method, name = cell.about["method"], cell.about["eval"]
                found.setdefault(method, {})[name] = tuple(trail("evaluation", cell.node))
                counts.setdefault((method, name), Trials()).sweeps |= {t.key: len(t.plans) for t in swept if index in t.touched}
        each.append(audit(found, {m: tried(counts, m) for m in found}, dict.fromkeys(found, "1")) if found else ())
    items = [either(same) for same in zip(*each, strict=True)]
    return tuple(replace(i, name=f"{i.name}, estimated") if i.name.endswith(("device-hours", "FLOPs")) else i for i in items)


def like(cells: Iterable[Any]) -> Sheet:
    """A sheet of the protocol, backbone, data and tuning of a plan's cells, without any of them."""
    about = next((cell.about for cell in cells), {})
    return Sheet(*(about.get(k, "") for k in ("protocol", "backbone", "data")), about.get("tuning", "published"), (), (), {})


def either(items: Sequence[Item]) -> Item:
    """An item of several plans, one of which is going to be done: what they differ in is not known."""
    first, *_ = items
    values = {m: dict.fromkeys(i.values[m] for i in items) for m in first.values}
    said = {m: next(iter(v)) if len(v) == 1 else f"{UNKNOWN} before the trials: {' or '.join(v)}" for m, v in values.items()}
    return replace(first, values=said, measured=first.measured and {m: v for m, v in first.measured.items() if said[m] == first.values[m]})


def expected(node: Any) -> Mapping[str, Any]:
    """What a record will say, as far as the plan alone knows it: images where the length is in steps."""
    recipe = node.identity.get("recipe")
    images = recipe["iterations"] * recipe["batch"] if recipe and recipe["iterations"] is not None else None if recipe else 0
    return {"kind": node.kind, "identity": node.identity, "about": node.about, "images_seen": images, "facts": {}}
