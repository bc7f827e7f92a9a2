"""From the words of the command line to a graph of nodes: names -> plugins, data, recipes, precision, keys, and the cells of the table.

Nothing is started here. What can be found wrong with the request without doing any of it is found here; `harness.layout` says what is looked at in data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import data, layout, plugins
from harness.canonical import canonical, digest
from harness.jobs import Node, ordered
from harness.request import Cell, Plan, Request, names, resolve_precision
from harness.settings import Settings
from harness.spec import Asset, JobFailed, Overrides, Recipe, UserError, ViTConfig, pixels, suggest
from harness.spec import Protocol as Setting


class Planner:
    """Builds a Plan from a Request. `fingerprints` (data set -> its own) may be shared by planners of the same data."""

    def __init__(self, request: Request, fingerprints: dict[str, str] | None = None) -> None:
        self.request = request
        self.setting: Setting = plugins.build("protocols", request.protocol)
        name = request.backbone or self.setting.backbone
        if name not in self.setting.backbones:
            raise UserError(f"--backbone: {request.protocol} has no {name!r}: {suggest(name, self.setting.backbones)}")
        self.backbone, self.vit = name, self.setting.backbones[name]
        self.tuning = request.tuning or self.setting.tuning
        self.missing: dict[str, str] = {}
        self.settings = Settings(request.settings)
        self.precision = request.precision or resolve_precision()
        self.folders: dict[str, Path] = dict(data.locate(request.data, self.setting))
        if request.pretrain_data is not None:
            self.folders["folder"] = Path(request.pretrain_data)
            if not self.folders["folder"].is_dir():
                raise UserError(f"--pretrain-data {request.pretrain_data}: is no folder: name a folder of images")
        self.pending: set[str] = set()
        self.generated = self.request.data is None and self.setting.generator is not None  # whether anything reads generated data
        self._fingerprints: dict[str, str] = {} if fingerprints is None else fingerprints
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
            if self.request.data is None:
                layout.check_as_made(kind, folder)
            self._fingerprints[name] = layout.fingerprint(kind, folder)
        return self._fingerprints[name]

    def recipe(self, recipe: Recipe, prefix: str) -> tuple[Recipe, tuple[str, ...]]:
        """A recipe with its --set values and `auto` precision resolved."""
        recipe, notes = self.settings.apply(f"{prefix}.recipe", recipe)
        if recipe.precision == "auto":
            recipe = dataclasses.replace(recipe, precision=self.precision)  # type: ignore[arg-type]
        return recipe, notes

    def architecture(self, method: Any, vit: ViTConfig) -> ViTConfig:
        """The ViT that a method gets for a backbone: the protocol's, or that which the method says."""
        chosen: ViTConfig = method.architecture(vit, self.setting.architecture == "published") if hasattr(method, "architecture") else vit
        return chosen

    def recipe_of(self, name: str, plugin: Any, vit: ViTConfig) -> Recipe:
        """A plugin's recipe.

        Raises:
            UserError: it has one for another backbone of this protocol only.
            JobFailed: it has none for this protocol.
        """
        recipe: Recipe | None = plugin.recipe(self.setting, vit)
        if recipe is None:
            known = [n for n, v in self.setting.backbones.items() if plugin.recipe(self.setting, self.architecture(plugin, v)) is not None]
            at = "" if vit.size == self.vit.size else f" at {vit.size[0]}x{vit.size[1]} pixels"
            reason = f"{name} has no recipe for protocol {self.setting.name} with backbone {self.backbone}{at}"
            if known:
                variants = list[str]()
                for variant, fields in getattr(plugin, "variants", {}).items():
                    with contextlib.suppress(UserError):  # --set says what this one cannot have
                        other = dataclasses.replace(plugin, **fields)
                        if other.recipe(self.setting, self.architecture(other, vit)) is not None:
                            variants.append(f"{name.split()[0].split('@')[0]}@{variant}")
                also = f"; variants that have one here: {', '.join(variants)}" if variants else ""
                raise UserError(f"--backbone: {reason}: no source gives one; there is one for {', '.join(known)}{also}")
            raise JobFailed(reason)
        return recipe

    def file(self, role: str, asset: Asset) -> tuple[str, str]:
        """(path, sha256) of an asset that is a file; one that is not there is noted in `missing`."""
        path = Path(asset.file or "")
        if not path.is_absolute():
            root = Path(self.request.data or ".")
            path = (root if root.is_dir() else root.parent) / path
        if asset.sha256 is not None:
            return str(path.resolve()), asset.sha256
        if not path.is_file():
            self.missing[str(path)] = f"{path}: no such file: needed as {role}; {asset.origin or 'put it there'}"
            return str(path), "not there yet"
        if asset.check is not None:
            asset.check(path)
        return str(path.resolve()), hashlib.sha256(path.read_bytes()).hexdigest()

    def where(self, sets: Sequence[str]) -> dict[str, Any]:
        """What lies where, for a node that reads these sets."""
        folders = {s: str(data.folder_of(s, self.folders).resolve()) for s in sets}
        return {"folders": folders, "on_bad_image": self.request.on_bad_image, "on_oom": self.request.on_oom}

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
        recipe, more = self.recipe(self.recipe_of(name, maker, self.vit), name)
        sets = self.train_sets(maker)
        identity = {"plugin": canonical(maker), "version": maker.version, "recipe": canonical(recipe), "seed": seed, **pixels(self.vit)}
        about = {"title": role if role == name else f"{role} {name}", "method": name, "seed": seed, "protocol": self.setting.name}
        return self.node("asset", name, identity, {}, {**about, "deviations": [*notes, *more]}, sets), (*notes, *more)

    def pretrain(self, name: str, method: Any, seed: int, own: Sequence[str] = ()) -> tuple[Node, tuple[str, ...]]:
        """The node that pre-trains a method, with its assets and parent; notes besides its `own`. Raises JobFailed with the reason if it cannot run here."""
        vit = self.architecture(method, self.vit)
        if (reason := method.skip(vit)) is not None:
            raise self.settings.refusal(name, reason)
        notes: tuple[str, ...] = method.notes(vit) if hasattr(method, "notes") else ()
        recipe, trains = None, getattr(method, "trains", True)
        if trains:
            recipe, more = self.recipe(self.recipe_of(name, method, vit), name)
            notes = (*notes, *more)
        if vit != self.vit and self.setting.architecture == "shared":
            changed = [f.name for f in dataclasses.fields(vit) if getattr(vit, f.name) != getattr(self.vit, f.name)]
            notes = (*notes, f"{name} has a ViT of its own ({', '.join(f'{c} {getattr(vit, c)}' for c in changed)})")
        parents: dict[str, Node] = {}
        files: dict[str, tuple[str, str]] = {}
        for role, asset in method.assets(self.setting, vit).items():
            if asset.maker is None:
                files[role] = self.file(role, asset)
            else:
                parents[role], more = self.asset(role, asset.maker, seed)
                notes = (*notes, *more)
        if method.parent is not None:
            parent_name = plugins.name_of("methods", method.parent)
            before, told = self.settings.apply(parent_name, method.parent)
            parents["parent"], more = self.pretrain(parent_name, before, seed, told)
            notes = (*notes, *told, *more)
        sets, drawn = self.train_sets(method) if trains else (), method.drawn(vit, recipe) if hasattr(method, "drawn") else ""
        identity = {
            "plugin": canonical(method), "version": method.version, "recipe": canonical(recipe), "vit": canonical(vit), "seed": seed,
            **(pixels(vit) if trains else {}), **({"drawn": drawn} if drawn else {}), "files": {role: sha256 for role, (_, sha256) in files.items()},
        }
        about = {"title": f"pretrain {name}", "method": name, "seed": seed, "deviations": [*own, *notes], "protocol": self.setting.name,
                 "backbone": self.backbone, "labels": bool(getattr(method, "needs_labels", False))}
        label = getattr(method, "label", name)  # a name with a path in it is no name for a folder
        return self.node("pretrain", label, identity, parents, about, sets, {role: path for role, (path, _) in files.items()}), notes

    def evaluate(self, name: str, evaluator: Any, method_name: str, method: Any, parent: Node, eval_seed: int, about: dict[str, Any], own: Any) -> Node:
        """The node that scores a checkpoint. `own`: the evaluator's notes (the method's are in `about`). Raises JobFailed when it cannot run here, and why."""
        vit, plain, overrides = self.architecture(method, self.vit), evaluator, Overrides()
        if getattr(plain, "trains", True) and self.tuning == "published":
            if getattr(plain, "by", None) == getattr(plugins.build("evals", name), "by", None):  # otherwise the user has chosen
                overrides = method.transfer(name, self.setting, vit)
            if overrides.variant:
                evaluator = plugins.with_variant(plain, overrides.variant, f"--methods {method_name}: {name}")
        if (reason := evaluator.skip(vit)) is not None:
            raise self.settings.refusal(name, reason)
        if getattr(evaluator, "needs_classifier", False) and not getattr(method, "leaves_classifier", getattr(method, "needs_labels", False)):
            raise JobFailed(f"{method_name} brings no classifier of its own, and {name} trains none")
        ground: list[str] = []
        if first := getattr(evaluator, "after", ""):  # it goes on from the model that another evaluator has fine-tuned
            before, more = self.settings.apply(first, plugins.build("evals", first))
            stage = {**self.about(method_name, first, before, about["seed"], eval_seed), "deviations": about["deviations"]}
            parent = self.evaluate(first, before, method_name, method, parent, eval_seed, stage, more)
            ground, about["deviations"] = [stage["ground"]], stage["deviations"]
        recipe: Recipe | None = None
        notes: tuple[str, ...] = ()
        if getattr(evaluator, "trains", True) and not overrides.use_head:
            recipe, notes = self.recipe(overrides.on(self.recipe_of(f"{name} on {method_name}", evaluator, vit)), name)
        if recipe is None:  # nothing is trained: the fine-tuning seed cannot change the number
            eval_seed = parent.identity.get("eval_seed", 0)
        identity = {
            "plugin": canonical(evaluator), "version": evaluator.version, "recipe": canonical(recipe), "use_head": overrides.use_head,
            "seed": about["seed"], "eval_seed": eval_seed, **pixels(vit, getattr(evaluator, "size", None)),
        }
        about["deviations"] = [*about["deviations"], *own, *notes, *(evaluator.notes(self.setting, vit) if hasattr(evaluator, "notes") else ())]
        prints = [self.fingerprint(s) for s in evaluator.datasets(self.setting)]
        about["ground"] = digest([canonical(plain), plain.version, canonical(plain.recipe(self.setting, vit)), prints, *ground])
        about["title"] = f"evaluate {name} on {method_name}"
        label = f"{name}-{getattr(method, 'label', method_name)}"
        node = self.node("evaluate", label, identity, {"checkpoint": parent}, about, evaluator.datasets(self.setting))
        about["settings"] = node.settings
        return node

    def about(self, method: str, name: str, evaluator: Any, seed: int, eval_seed: int) -> dict[str, Any]:
        """What the table must know of a cell."""
        generated, place = self.generated, Path(self.request.data or ".").resolve()
        shown = "generated data" if generated else "own data" if self.request.data is None else place.name if place.is_dir() else place.stem
        if self.request.pretrain_data:
            shown += f", pre-trained on {Path(self.request.pretrain_data).resolve().name}"
        return {
            "method": method, "eval": name, "protocol": self.setting.name, "backbone": self.backbone, "data": shown, "seed": seed, "eval_seed": eval_seed,
            "columns": [{"name": m.name, "unit": m.unit, "higher_is_better": m.higher_is_better} for m in evaluator.columns],
            "caption": self.setting.caption if generated else f"{self.setting.name} protocol, {shown}{self.setting.caveat}",
            "tuning": self.tuning, "deviations": [],
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
        methods = [(n, *self.settings.apply(n, plugins.build("methods", n)), named) for n, named in names("methods", self.request.methods)]
        evaluators = [(n, *self.settings.apply(n, plugins.build("evals", n)), explicit) for n, explicit in names("evals", self.request.evals)]
        read = {s for _, e, *_ in evaluators for s in e.datasets(self.setting)}
        if self.request.pretrain_data is None:
            read |= {s for _, m, *_ in methods for s in m.datasets(self.setting)}
        self.generated &= any(":" not in s for s in read)
        cells = list[Cell]()
        for seed in self.request.seeds:
            for method_name, method, method_notes, named in methods:
                own = 0 if (seedless := getattr(method, "seedless", False)) else seed
                if seedless and seed != self.request.seeds[0]:
                    continue  # the same weights once more would pass for another run
                try:
                    parent, notes, skipped = *self.pretrain(method_name, method, own, method_notes), ""
                except (JobFailed, UserError) as error:
                    if named and isinstance(error, UserError):
                        raise
                    parent, notes, skipped = None, (), str(error)
                for name, evaluator, eval_notes, explicit in evaluators:
                    for eval_seed in self.request.eval_seeds:
                        about = self.about(method_name, name, evaluator, own, eval_seed)
                        about["deviations"] = [*method_notes, *notes]
                        if parent is None:
                            cells.append(Cell(about, None, skipped))
                            continue
                        try:
                            node = self.evaluate(name, evaluator, method_name, method, parent, eval_seed, about, eval_notes)
                        except (JobFailed, UserError) as error:
                            if explicit and isinstance(error, UserError):
                                raise
                            cells.append(Cell(about, None, str(error)))
                            continue
                        cells.append(Cell(about, node))
        for key in self.settings.unused():
            name = key.split(".")[0]
            known = [n for n, *_ in methods] + [n for n, _, _, _ in evaluators]
            if key.rsplit(".", 1)[0].removesuffix(".augment").removesuffix(".recipe") in known:
                raise UserError(f"--set {key}: {name} has no recipe here, nothing of it is trained: leave it out")
            raise UserError(f"--set {key}: no such method or evaluator in this run: {suggest(name, known)}")
        return Plan(tuple(ordered(c.node for c in cells if c.node is not None)), tuple(cells), self.setting)


class Planners:
    """The planners of several requests as one: equal nodes once."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.each = [Planner(r) for r in requests]

    def plan(self) -> Plan:
        """See `Planner.plan`; `pending` and `missing` are known after it."""
        plans = [p.plan() for p in self.each]
        self.pending, self.missing = {n for p in self.each for n in p.pending}, {k: v for p in self.each for k, v in p.missing.items()}
        return Plan(tuple(ordered(n for p in plans for n in p.nodes)), tuple(c for p in plans for c in p.cells), plans[0].protocol)

    def generate(self, workers: int) -> None:
        """Make what is `pending`."""
        for planner in self.each:
            if planner.pending:
                planner.generate(workers)
