"""The option `--sweep KEY=V1,V2` of `run`: every value is tried on a held-out part of train, the one that scores best there goes to the reported split.

Each method chooses for itself, by the mean over the seeds of the line and the first column of the first evaluator that the key touches and that can hold
images out. A trial that fails takes its value out of the choice. Nothing is kept but nodes: the same line finds its trials by their keys.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.jobs import Node, ordered
from harness.plan import Planner
from harness.request import Cell, Plan, Request
from harness.spec import UserError
from harness.store import State, Store, read_record

HELD_OUT = 0.2  # of the training images, drawn once for all values, methods and seeds


@dataclass(frozen=True)
class Trials:
    """The trials of one key: a plan for each value as it would be reported, the cells that the key touches, and who chooses by what.

    `judges`: method -> evaluator. `cells`: (method, value) -> the judge's cells, scored on what is held out, one for each pair of seeds.
    """

    key: str
    plans: Mapping[str, Plan]
    touched: frozenset[int]
    judges: Mapping[str, str]
    cells: Mapping[tuple[str, str], Sequence[Cell]]

    @property
    def nodes(self) -> list[Node]:
        """What the trials end in."""
        return [cell.node for cells in self.cells.values() for cell in cells if cell.node is not None]


class Sweep:
    """Plans in place of a `Planner`: the trials until all of them have ended, then the cells of the table with what was chosen."""

    def __init__(self, request: Request, args: argparse.Namespace, store: Store, again: bool = False) -> None:
        if args.force:
            raise UserError("--force: a sweep is done anew in another --runs only: leave --force out")
        self.request, self.store, self.retry = request, store, args.retry and not again
        self.values = read_words(args.sweep)
        self.planners: list[Planner] = []
        self.found: list[Trials] = []
        self.fingerprints: dict[str, str] = {}

    @property
    def pending(self) -> set[str]:
        """See `Planner`."""
        return {name for planner in self.planners for name in planner.pending}

    @property
    def missing(self) -> dict[str, str]:
        """See `Planner`."""
        return {path: reason for planner in self.planners for path, reason in planner.missing.items()}

    def generate(self, workers: int) -> None:
        """See `Planner`."""
        next(p for p in self.planners if p.pending == self.pending).generate(workers)

    def plan(self) -> Plan:
        """The trials with what may come `later`; when all have ended the plan with what was chosen, said on stderr.

        Raises:
            UserError: no such field, a value of the wrong type, values that change nothing, keys that meet in a cell, or nothing to choose by.
        """
        found = self.found = [self.trials(key, values) for key, values in self.values.items()]
        base = next(iter(found[0].plans.values()))
        for one in found:
            for other in found[found.index(one) + 1 :]:
                for index in sorted(one.touched & other.touched):
                    where = f"{base.cells[index].about['eval']} on {base.cells[index].about['method']}"
                    raise UserError(f"--sweep {one.key} and {other.key} both change {where}: sweep one, then the other with --set {one.key}=... chosen")
        waiting = [n for t in found for n in t.nodes if self.fate(n).status not in ("done", "failed")]
        if not waiting:
            return self.chosen(found)
        skipped = tuple(c for c in base.cells if c.node is None)
        return Plan(told_apart(n for t in found for n in t.nodes), skipped, base.protocol, tuple(p.nodes for t in found for p in t.plans.values()))

    def planned(self, settings: Iterable[str]) -> Plan:
        """The plan of the whole line with some more --set."""
        settings = tuple(settings)
        self.planners.append(Planner(replace(self.request, settings=(*self.request.settings, *settings)), self.fingerprints))
        try:
            return self.planners[-1].plan()
        except UserError as error:
            raise UserError(re.sub(rf"--set (?={'|'.join(map(re.escape, self.values))})", "--sweep ", str(error))) from error

    def trials(self, key: str, values: Sequence[str]) -> Trials:
        """The trials of a key."""
        plans = {value: self.planned([f"{key}={value}"]) for value in values}
        rows = list(enumerate(zip(*(p.cells for p in plans.values()), strict=True)))
        keys = {i: {c.node.key for c in row if c.node is not None} for i, row in rows if all(c.node is not None for c in row)}
        touched = {i: row for i, row in rows if len(keys.get(i, ())) > 1}
        if not touched or any(len(keys[i]) < len(values) for i in touched):
            raise UserError(f"--sweep {key}={','.join(values)}: some of these values change nothing against one another: give values that differ")
        judges: dict[str, str] = {}
        for row in touched.values():
            name, identity = row[0].about["eval"], row[0].node.identity
            if "holdout" in identity["plugin"] and not identity.get("use_head"):
                judges.setdefault(row[0].about["method"], name)
            if identity["plugin"].get("holdout") or f"{name}.holdout" == key:
                raise UserError(f"--set {name}.holdout: --sweep holds out a part of train by itself, and reports on val: leave it out")
        for row in touched.values():
            if (method := row[0].about["method"]) not in judges:
                raise UserError(f"--sweep {key}: nothing that it changes of {method} can hold out a part of train: add imagenet, linear, ... to --evals")
        cells: dict[tuple[str, str], list[Cell]] = {}
        for value in values:
            held = self.planned([f"{key}={value}", *(f"{name}.holdout={HELD_OUT}" for name in dict.fromkeys(judges.values()))])
            for index in touched:
                cell = held.cells[index]
                if cell.node is not None and judges[cell.about["method"]] == cell.about["eval"]:
                    about = {**cell.node.about, "trial": f"{key}={value}", "title": f"{cell.node.about['title']}, trial {key}={value}"}
                    cells.setdefault((cell.about["method"], value), []).append(replace(cell, node=replace(cell.node, about=about)))
        return Trials(key, plans, frozenset(touched), judges, cells)

    def fate(self, node: Node) -> State:
        """What has become of a trial: failed too when something before it has. With --retry a failure is none yet."""
        state = self.store.state(self.store.folder(node))
        if state.status not in ("done", "failed"):
            state = next((s for p in node.parents.values() if (s := self.fate(p)).status == "failed"), state)
        return State("missing") if state.status == "failed" and self.retry else state

    def score(self, cells: Sequence[Cell]) -> float | None:
        """The mean of a value's trials, None when one has failed."""
        records = [read_record(self.store.folder(c.node)) for c in cells if c.node is not None]
        name = cells[0].about["columns"][0]["name"]
        return None if None in records else statistics.fmean(r["metrics"][name] for r in records if r is not None)

    def choose(self, trials: Trials, method: str) -> dict[str, Any]:
        """What the records of a method say of its trials: `chosen` is the best value, the first of equals, None where all have failed."""
        scores = {value: self.score(trials.cells[method, value]) for value in trials.plans}
        column = trials.cells[method, next(iter(scores))][0].about["columns"][0]
        known = {value: score for value, score in scores.items() if score is not None}
        best = (max if column["higher_is_better"] else min)(known, key=lambda v: known[v]) if known else None
        by = f"{trials.judges[method]} {column['name']}"
        return {"key": trials.key, "trials": len(scores), "chosen": best, "scores": scores, "by": by, "held_out": HELD_OUT}

    def chosen(self, found: Sequence[Trials]) -> Plan:
        """The cells of the table, each with the value that its method chose. Where no value came through the cell is that of a failed trial."""
        choices = {(t.key, method): self.choose(t, method) for t in found for method in t.judges}
        for (key, method), choice in choices.items():
            told = ", ".join(f"{v}: {'failed' if s is None else f'{s:.2f}'}" for v, s in choice["scores"].items())
            print(f"--sweep {key}: {choice['chosen'] or 'none'} for {method} ({choice['by']} on {HELD_OUT:.0%} of train held out: {told})", file=sys.stderr)
        plans: dict[tuple[str, ...], Plan] = {(f"{found[0].key}={v}",): p for v, p in found[0].plans.items()} if len(found) == 1 else {}
        cells, changed = [], dict[str, Node]()
        for index, cell in enumerate(next(iter(found[0].plans.values())).cells):
            method = cell.about["method"]
            values = tuple(f"{t.key}={choices.get((t.key, method), {}).get('chosen') or next(iter(t.plans))}" for t in found)
            if values not in plans:
                plans[values] = self.planned(values)
            cell = plans[values].cells[index]
            for trials in (t for t in found if index in t.touched and cell.node is not None):
                choice, node = choices[trials.key, method], cell.node
                if node is not None and choice["chosen"]:
                    node = changed[node.key] = replace(node, about={**node.about, "sweep": choice})
                else:
                    node = next(n for n in trials.nodes if n.about["method"] == method and self.fate(n).status == "failed")
                cell = replace(cell, node=node)
            cells.append(cell)
        nodes = tuple(changed.get(n.key, n) for n in ordered(c.node for c in cells if c.node is not None))
        return Plan(nodes, tuple(cells), next(iter(found[0].plans.values())).protocol)


def told_apart(trials: Iterable[Node]) -> tuple[Node, ...]:
    """The nodes of all trials, parents first; a pre-training that one value alone needs has it in its title."""
    nodes, needed = dict[str, Node](), dict[str, set[str]]()
    for trial in trials:
        for node in ordered([trial]):
            nodes.setdefault(node.key, node)
            needed.setdefault(node.key, set()).add(trial.about["trial"])
    alone = {key: min(words) for key, words in needed.items() if len(words) == 1 and "trial" not in nodes[key].about}
    titles = {key: {**nodes[key].about, "title": f"{nodes[key].about['title']}, {word}"} for key, word in alone.items()}
    return tuple(replace(n, about=titles[n.key]) if n.key in titles else n for n in nodes.values())


def read_words(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Key -> values of --sweep. A comma in brackets is part of a value. Raises UserError."""
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = tuple(v.strip() for v in re.split(r",(?![^(]*\))", text) if v.strip())
        if not equals or "." not in key:
            raise UserError(f"--sweep {word}: expected NAME.FIELD=V1,V2, as in mae.recipe.lr=1e-4,2e-4")
        if not values:
            raise UserError(f"--sweep {word}: names no value: give two or more, as in {key}=1e-4,2e-4")
        if len(values) < 2:
            raise UserError(f"--sweep {word}: one value is no sweep: give two or more, or --set {word}")
        if key in found:
            raise UserError(f"--sweep {key}: given twice: give it once, with all values")
        found[key] = values
    return found
