"""From the words of the command line to a graph of nodes: names -> plugins, data, recipes, precision, keys, and the cells of the table.

Nothing is started here, and everything that can be wrong with the request is found here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import data, layout, plugins
from harness.canonical import canonical, digest
from harness.jobs import Node, ordered
from harness.settings import Settings
from harness.spec import JobFailed, Overrides, Recipe, UserError, suggest
from harness.spec import Protocol as Setting
from harness.store import Result, result_of


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
    tuning: str = "published"
    on_bad_image: str = "fail"


@dataclass(frozen=True)
class Cell:
    """One cell of the table: a node, or the reason why there is none."""

    about: Mapping[str, Any]
    node: Node | None
    skipped: str = ""


@dataclass(frozen=True)
class Plan:
    """The nodes in an order that respects dependencies, the cells that they fill, and data sets to generate first."""

    nodes: tuple[Node, ...]
    cells: tuple[Cell, ...]
    protocol: Setting

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
            raise UserError(f"{flag}: unknown name {word!r}: {suggest(word, [*plugins.installed(kind), *plugins.groups(kind)])}")
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
    cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if cpu() else "fp32"


class Planner:
    """Builds a Plan from a Request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.setting: Setting = plugins.build("protocols", request.protocol)
        name = request.backbone or self.setting.backbone
        if name not in self.setting.backbones:
            raise UserError(f"--backbone: {request.protocol} has no {name!r}: {suggest(name, self.setting.backbones)}")
        self.backbone, self.vit = name, self.setting.backbones[name]
        self.settings = Settings(request.settings)
        self.precision = resolve_precision()
        self.folders: dict[str, Path] = dict(data.locate(request.data, self.setting))
        if request.pretrain_data is not None:
            self.folders["folder"] = Path(request.pretrain_data)
            if not self.folders["folder"].is_dir():
                raise UserError(f"--pretrain-data {request.pretrain_data}: no such folder: name a folder of images")
        self.pending: set[str] = set()
        self._fingerprints: dict[str, str] = {}
        self._nodes: dict[str, Node] = {}

    def train_sets(self, trainable: Any) -> tuple[str, ...]:
        """Data sets of a method or maker; --pretrain-data takes the place of one that reads no labels."""
        sets: tuple[str, ...] = tuple(trainable.datasets(self.setting))
        if sets and self.request.pretrain_data is not None:
            if getattr(trainable, "needs_labels", False):
                raise UserError(f"--pretrain-data: {type(trainable).__name__} trains on labels and cannot use an unlabelled folder: leave it out of --methods")
            return ("folder", *sets[1:])
        return sets

    def fingerprint(self, name: str) -> str:
        """Content fingerprint of a data set, its layout checked first."""
        if name not in self._fingerprints:
            kind = name.partition(":")[0]
            folder = data.folder_of(name, self.folders)
            if self.setting.generator and self.request.data is None and data.missing([name], self.folders):
                self.pending.add(name)
                return "to be generated"
            layout.check_layout(kind, folder)
            self._fingerprints[name] = layout.fingerprint(kind, folder)
        return self._fingerprints[name]

    def recipe(self, recipe: Recipe, prefix: str) -> tuple[Recipe, tuple[str, ...]]:
        """A recipe with its --set values and `auto` precision resolved."""
        recipe, notes = self.settings.apply(f"{prefix}.recipe", recipe)
        if recipe.precision == "auto":
            recipe = dataclasses.replace(recipe, precision=self.precision)  # type: ignore[arg-type]
        return recipe, notes

    def where(self, sets: Sequence[str]) -> dict[str, Any]:
        """What lies where, for a node that reads these sets."""
        return {"folders": {s: str(data.folder_of(s, self.folders).resolve()) for s in sets}, "on_bad_image": self.request.on_bad_image}

    def node(self, kind: Any, name: str, identity: dict[str, Any], parents: dict[str, Node], about: dict[str, Any], sets: Sequence[str],
             files: Mapping[str, str] | None = None) -> Node:
        """A node, the same object for the same key."""
        prints = {s.partition(":")[0]: self.fingerprint(s) for s in sets}  # a folder's path is where it lies, not what it is
        identity = {**identity, "data": prints, "family": self.setting.family}
        node = Node(kind, name, identity, parents, about, {**self.where(sets), "files": dict(files or {})})
        return self._nodes.setdefault(node.key, node)

    def asset(self, role: str, maker: Any, seed: int) -> tuple[Node, tuple[str, ...]]:
        """The node that makes an asset."""
        name = maker.name
        maker, notes = self.settings.apply(name, maker)
        recipe = maker.recipe(self.setting, self.vit)
        if recipe is None:
            raise JobFailed(f"{name} has no recipe for protocol {self.setting.name}")
        recipe, more = self.recipe(recipe, name)
        sets = self.train_sets(maker)
        identity = {"plugin": canonical(maker), "version": maker.version, "recipe": canonical(recipe), "seed": seed}
        notes = (*notes, *more)
        about = {"title": f"{role} {name}", "method": name, "seed": seed, "deviations": list(notes), "protocol": self.setting.name}
        return self.node("asset", name, identity, {}, about, sets), notes

    def pretrain(self, name: str, method: Any, seed: int) -> tuple[Node, tuple[str, ...]]:
        """The node that pre-trains a method, with its assets and parent. Raises JobFailed with the reason when it cannot run here."""
        if (reason := method.skip(self.vit)) is not None:
            raise JobFailed(reason)
        notes: tuple[str, ...] = ()
        recipe = method.recipe(self.setting, self.vit)
        trains = getattr(method, "trains", True)
        if recipe is None and trains:
            raise JobFailed(f"{name} has no recipe for protocol {self.setting.name} with backbone {self.backbone}")
        if recipe is not None:
            recipe, more = self.recipe(recipe, name)
            notes = (*notes, *more)
        parents: dict[str, Node] = {}
        for role, asset in method.assets(self.setting, self.vit).items():
            if asset.maker is not None:
                parents[role], more = self.asset(role, asset.maker, seed)
                notes = (*notes, *more)
        if method.parent is not None:
            parents["parent"], more = self.pretrain(name, method.parent, seed)
            notes = (*notes, *more)
        sets = self.train_sets(method) if trains else ()
        files = {role: a for role, a in method.assets(self.setting, self.vit).items() if a.maker is None}
        identity = {
            "plugin": canonical(method), "version": method.version, "recipe": canonical(recipe), "vit": canonical(self.vit), "seed": seed,
            "files": {role: a.sha256 for role, a in files.items()},
        }
        about = {"title": f"pretrain {name}", "method": name, "seed": seed, "deviations": list(notes), "protocol": self.setting.name, "backbone": self.backbone}
        return self.node("pretrain", name, identity, parents, about, sets, {role: str(a.file) for role, a in files.items()}), notes

    def evaluate(self, name: str, evaluator: Any, method_name: str, method: Any, parent: Node, eval_seed: int, about: dict[str, Any]) -> Node:
        """The node that scores a checkpoint. Raises JobFailed with the reason when it cannot run here."""
        if (reason := evaluator.skip(self.vit)) is not None:
            raise JobFailed(reason)
        recipe = evaluator.recipe(self.setting, self.vit)
        if recipe is None:
            raise JobFailed(f"{name} has no recipe for protocol {self.setting.name} with backbone {self.backbone}")
        overrides: Overrides = method.transfer(name, self.setting) if self.request.tuning == "published" else Overrides()
        base, own = recipe, None
        recipe, notes = self.recipe(overrides.on(recipe), name)
        if overrides.use_head:  # nothing is trained: neither recipe nor fine-tuning seed can change the number
            eval_seed, notes = 0, ()
        else:
            own = recipe
        identity = {
            "plugin": canonical(evaluator), "version": evaluator.version, "recipe": canonical(own), "use_head": overrides.use_head,
            "seed": about["seed"], "eval_seed": eval_seed,
        }
        about["deviations"] = [*about["deviations"], *notes]
        prints = [self.fingerprint(s) for s in evaluator.datasets(self.setting)]
        about["ground"] = digest([identity["plugin"], evaluator.version, canonical(base), prints])
        about["title"] = f"evaluate {name} on {method_name}"
        node = self.node("evaluate", f"{name}-{method_name}", identity, {"checkpoint": parent}, about, evaluator.datasets(self.setting))
        about["settings"] = node.settings
        return node

    def about(self, method: str, name: str, evaluator: Any, seed: int, eval_seed: int) -> dict[str, Any]:
        """What the table must know of a cell."""
        generated = self.request.data is None and self.setting.generator is not None
        shown = "generated data" if generated else Path(self.request.data or "").resolve().stem
        if self.request.pretrain_data:
            shown += f", pre-trained on {Path(self.request.pretrain_data).name}"
        return {
            "method": method, "eval": name, "protocol": self.setting.name, "backbone": self.backbone, "data": shown, "seed": seed, "eval_seed": eval_seed,
            "columns": [{"name": m.name, "unit": m.unit, "higher_is_better": m.higher_is_better} for m in evaluator.columns],
            "caption": self.setting.caption if generated else f"{self.setting.name} protocol, {shown}{self.setting.caveat}",
            "tuning": self.request.tuning, "deviations": [],
        }

    def generate(self, workers: int) -> None:
        """Make the data sets that `plan` found missing."""
        assert self.setting.generator is not None
        plugins.load("protocols", self.setting.generator)(data.generated_root(self.setting), sorted(self.pending), self.setting.family, workers)

    def plan(self) -> Plan:
        """The whole graph, every name, value and data set in it looked at.

        Sets that the protocol generates and that are not there yet are named in `pending` and stand in the keys by a placeholder: make
        them with `generate` and plan again with a new Planner.
        """
        methods = [(n, *self.settings.apply(n, plugins.build("methods", n))) for n, _ in names("methods", self.request.methods)]
        evaluators = [(n, *self.settings.apply(n, plugins.build("evals", n)), explicit) for n, explicit in names("evals", self.request.evals)]
        cells, tops = [], []
        for seed in self.request.seeds:
            for method_name, method, method_notes in methods:
                try:
                    parent, notes = self.pretrain(method_name, method, seed)
                    skipped = ""
                except JobFailed as error:
                    parent, notes, skipped = None, (), str(error)
                for name, evaluator, eval_notes, explicit in evaluators:
                    for eval_seed in self.request.eval_seeds:
                        about = self.about(method_name, name, evaluator, seed, eval_seed)
                        about["deviations"] = [*method_notes, *notes, *eval_notes]
                        if parent is None:
                            cells.append(Cell(about, None, skipped))
                            continue
                        try:
                            node = self.evaluate(name, evaluator, method_name, method, parent, eval_seed, about)
                        except (JobFailed, UserError) as error:
                            if explicit and isinstance(error, UserError):
                                raise
                            cells.append(Cell(about, None, str(error)))
                            continue
                        cells.append(Cell(about, node))
                        tops.append(node)
        for key in self.settings.unused():
            name = key.split(".")[0]
            known = [n for n, _, _ in methods] + [n for n, _, _, _ in evaluators]
            if key.rsplit(".", 1)[0].removesuffix(".augment").removesuffix(".recipe") in known:
                raise UserError(f"--set {key}: {name} has no recipe here, nothing of it is trained: leave it out")
            raise UserError(f"--set {key}: no such method or evaluator in this run: {suggest(name, known)}")
        return Plan(tuple(ordered(tops)), tuple(cells), self.setting)
