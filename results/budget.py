"""Device-hours of a plan before anything is launched: what `run --dry-run` shows and `run --budget HOURS` refuses by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.canonical import restore
from harness.data import ImageList, read_images
from harness.jobs import Node
from harness.request import Plan
from harness.spec import UserError
from harness.store import Store
from results.flops import step_flops
from results.throughput import Figure, Work, computation, data_of, hardware_here, measured, shipped, work_of


@dataclass(frozen=True)
class Estimate:
    """Device-hours of a node, None where nothing like it was measured; `why` says from what, or what is missing."""

    hours: float | None
    why: str


class Budget:
    """The option `--budget` of `run`. Nodes that are done cost nothing (unless `force`); an unfinished one is counted whole.

    Where jobs run elsewhere (a launcher that says what `auto` means there), their hardware is not known here: figures of the runs folder
    alone count, whatever device they are from. Otherwise figures of this machine's device count, those of the runs folder first.
    """

    def __init__(self, plan: Plan, store: Store, force: bool, launcher: Any) -> None:
        self.plan, self.store, self.hardware = plan, store, None if hasattr(launcher, "precision") else hardware_here()
        self.tables = tuple(map(by_work, (measured(store), shipped()) if self.hardware else (measured(store),)))
        self.computed = {f.computed: f for f in (*shipped(), *measured(store)) if f.flops and f.images}  # on any hardware: FLOPs are the same there
        self._images: dict[str, ImageList | None] = {}
        self._steps: dict[tuple[str, int, int], float | None] = {}
        every = {n.key: n for nodes in (plan.nodes, *plan.later) for n in nodes}
        done = {key for key, n in every.items() if not force and store.state(store.folder(n)).status == "done"}
        self.estimates = {key: Estimate(0.0, "") if key in done else self.estimate(n) for key, n in every.items()}
        # Of what comes later one alternative is done: the dearest counts.
        self.nodes = list(max(({n.key: n for n in (*plan.nodes, *more)} for more in plan.later or ((),)), key=self.sum).values())

    def sum(self, nodes: Any) -> float:
        """Known hours of nodes (by key)."""
        return sum(self.estimates[key].hours or 0.0 for key in nodes)

    @property
    def total(self) -> float:
        """Known hours of the plan."""
        return self.sum(n.key for n in self.nodes)

    @property
    def unknown(self) -> list[Node]:
        """Nodes of which nothing is known."""
        return [n for n in self.nodes if self.estimates[n.key].hours is None]

    def estimate(self, node: Node) -> Estimate:
        """What a node will take, by the measured figure of the same work that is nearest: of its method, of as many images."""
        job = node.job(Path())
        work = work_of(job)
        for table in self.tables:
            found = [f for f in table.get(work, ()) if self.hardware in (None, f.hardware)]
            if work.trained:
                shown = [(f, n) for f in found if f.images and (n := self.images(node, f))]
            else:  # nothing is trained, the images that are scored decide
                shown = [(f, f.images) for f in found if f.data == data_of(job)]
            if found and not shown and work.trained:
                return Estimate(None, "its data is not there yet")
            if shown:
                method = node.about.get("method")
                near = {id(f): (f.method != method, abs(math.log(n / f.images)) if f.images else 0.0) for f, n in shown}
                best = min(near.values())
                same = [(f, n) for f, n in shown if near[id(f)] == best]
                hours = statistics.median(f.hours * (n / f.images if f.images else 1.0) for f, n in same)
                return Estimate(hours, f"as {same[-1][0].source} on {same[-1][0].hardware}")
        if node.kind == "pretrain" and not work.trained:
            return Estimate(0.0, "nothing is trained")
        return Estimate(None, f"nothing like it was measured on {self.hardware or 'any device'}: {describe(work)}")

    def flops(self, node: Node) -> float | None:
        """FLOPs of a node's training steps: those that a record has counted for the same computation, for as many images as it will be shown; where there is
        no record (a field, the ViT or the precision is another) those of one step of a pre-training or an asset, counted without numbers (`results.flops`),
        times its steps; of an asset always these. 0 where nothing is trained, None where neither tells or its data is not there yet."""
        recipe: Any = node.recipe
        if not recipe:
            return 0.0
        found = self.computed.get(same := computation(node.job(Path())))
        # Not those of assets: records of tokenizers from before 2026-11-22 have half as many again (CHANGELOG).
        if node.kind != "asset" and found and found.flops and (shown := self.images(node, found)):
            return found.flops * shown / found.images
        images = self.train_set(node)
        if node.kind == "evaluate" or not images:
            return None
        from harness.samples import steps_of

        classes = images.classes if images.labels is not None else ()
        if (key := (same, recipe.batch, len(classes))) not in self._steps:
            self._steps[key] = step_flops(node, classes)
        step, steps = self._steps[key], steps_of(recipe, round(len(images) * kept_of(node)))[1]
        return None if step is None else step * steps

    def images(self, node: Node, like: Figure) -> int | None:
        """How many images a training will be shown, as `like` counts them; None where its data cannot be read yet."""
        recipe: Any = restore(node.identity["recipe"])
        if recipe.iterations is not None and not like.once:
            return int(recipe.iterations * recipe.batch)
        images = self.train_set(node)
        return None if not images else max(1, round(len(images) * kept_of(node) * (1 if like.once else recipe.epochs)))

    def train_set(self, node: Node) -> ImageList | None:
        """The images that a training is shown, None where they cannot be read yet."""
        name, folder = next(iter(node.where["folders"].items()), ("", ""))
        if folder not in self._images:
            try:
                self._images[folder] = read_images(name.partition(":")[0], "train", Path(folder))
            except UserError:
                self._images[folder] = None
        return self._images[folder]

    def words(self, node: Node) -> str:
        """For behind a node in the list."""
        found = self.estimates[node.key]
        return "" if not found.why else f", {'device-hours unknown' if found.hours is None else f'{found.hours:.3g} device-hours'} ({found.why})"

    def __str__(self) -> str:
        """The total."""
        later = len(self.nodes) - len(self.plan.nodes)
        more = f", with {later} nodes of what comes then" if later > 0 else ""
        rest = f", and {len(self.unknown)} node{'s' if len(self.unknown) > 1 else ''} of which it is not known" if self.unknown else ""
        return f"total: {self.total:.3g} device-hours{more}{rest}"

    def check(self, limit: float) -> None:
        """Raises UserError when the plan needs more, or it cannot be known whether it does."""
        if not 0 < limit < math.inf:
            raise UserError(f"--budget {limit:g}: hours are a number above 0")
        dear = sorted((n for n in self.nodes if self.estimates[n.key].hours), key=lambda n: -(self.estimates[n.key].hours or 0.0))[:3]
        most = ", ".join(f"{n.about['title']} seed {n.about['seed']} ({self.estimates[n.key].hours:.3g})" for n in dear)
        if self.total > limit:
            least = "at least " if self.unknown else ""
            raise UserError(f"--budget {limit:g}: the plan needs {least}{self.total:.3g} device-hours, most for {most}: raise it, or ask for less")
        if self.unknown:
            first = self.unknown[0]
            raise UserError(
                f"--budget {limit:g}: {len(self.unknown)} of {len(self.nodes)} nodes cost nobody knows what, such as {first.about['title']} "
                f"({self.estimates[first.key].why}), the others {self.total:.3g} device-hours: run it once with less (fewer epochs by --set, "
                f"same --runs) to measure, or leave --budget out")


def kept_of(node: Node) -> float:
    """The part of a node's images that it does not hold out."""
    return 1.0 - float((node.identity.get("plugin") or {}).get("holdout") or 0.0)


def by_work(figures: Iterable[Figure]) -> dict[Work, list[Figure]]:
    """Figures by what was done."""
    found: dict[Work, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.work, []).append(figure)
    return found


def describe(work: Work) -> str:
    """A work in words."""
    return f"{work.kind} {work.name}, {'' if ' ' not in work.shape else f'ViT {work.shape}, '}{work.precision}"
