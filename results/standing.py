"""May a measured value stand beside a published number? What differs between the two, and whether the published one lies within the spread.

The rule. It must be the same thing: method, evaluator, metric, architecture of the backbone, in a protocol whose recipes are the papers' and on
the benchmark's complete official split. Otherwise it does not stand there (what keeps a value out that is the same by name is told). What may differ is
told in footnotes: pre-training length, data of pre-training and of the tokenizer, head or probe, shared instead of published fine-tuning, and every
deviation from a recipe. A verdict is given where nothing differs and the spread is known. A checkpoint of somebody else's (`weights:`) is what it is
called: one that is known by its name stands beside its authors' numbers, which a note says; any other stands nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness.collect import Result
from harness.plugins import importable
from results.cells import Cell, Sheet
from results.reference.names import AS_IT_IS, AS_READ, BACKBONES, EVALUATORS, FAMILY, METHODS, OWN, PROTOCOL, SCORED, checkpoint_name, counterpart, released
from results.reference.published import METRICS, Published, published

SIZE = (224, 224)  # of all pre-training in published.csv that has a counterpart here
PARTS = ("patch", "width", "depth", "heads")


@dataclass(frozen=True)
class Standing:
    """A measured cell and a published number of the same name. `barred`: why it cannot stand there; `differences`: what is told if it does, and takes
    the verdict; `notes`: what is told besides."""

    cell: Cell
    row: Published
    barred: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Measured minus published, in the metric's unit."""
        return None if self.cell.value is None or self.barred else self.cell.value - self.row.value

    @property
    def spread(self) -> tuple[float, float] | None:
        """(low, high): where one further run would fall with 95 % probability; None below two pre-training seeds.

        Student's t prediction interval, mean +- t(0.975, n - 1) s sqrt(1 + 1/n): a published number is one run more, not the mean of many.
        """
        n, std = self.cell.n_pretrain, self.cell.std
        if std is None or self.cell.value is None or n < 2:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, n - 1)) * std * math.sqrt(1 + 1 / n)
        return self.cell.value - half, self.cell.value + half

    @property
    def verdict(self) -> str:
        """"within" or "outside" the spread (widened by half of the last published digit), or why there is none."""
        if self.difference is None:
            return "no verdict"
        if self.differences:
            return "no verdict: protocol differs"
        if self.spread is None:
            return f"no verdict: n = {self.cell.n_pretrain}"
        rounding = 0.5 * 10.0**-self.row.digits + 1e-9
        return "within" if self.spread[0] - rounding <= self.row.value <= self.spread[1] + rounding else "outside"


def compare(cell: Cell, row: Published) -> Standing | None:
    """How a measured cell stands to a published number; None when they are not of the same name (method, evaluator, metric, backbone), or when
    the cell has no score or its record does not say how it came about (demo, smoke, records of older versions)."""
    method, evaluator, example = counterpart(METHODS, row), counterpart(EVALUATORS, row), cell.example
    release = released(cell.method, cell.eval, row)
    if evaluator is None or example is None or (method is None and release is None):
        return None
    if cell.value is None or METRICS[row.metric] != cell.metric.name or len(example.lineage) < 2:
        return None
    evaluation, *trained = example.lineage
    if evaluation.get("family") != FAMILY or architecture(trained) != BACKBONES.get(row.backbone):
        return None
    differences = []
    ran = run_as(cell.eval, evaluation)
    ran = ran if ran in evaluator.names or ran in evaluator.near else AS_IT_IS.get(cell.eval, cell.eval)
    for name, line in ((cell.method, None if release else method), (ran, evaluator)):
        if line is None:  # a release is that method
            continue
        if name in line.near:
            differences.append(line.near[name])
        elif name not in line.names:
            return None
    barred = [f"another configuration: {d}" for d in cell.deviations if changes_plugin(d, cell)]
    official, scored = next((n for start, n in SCORED.items() if row.eval.startswith(start)), 0), scored_images(example)
    if not scored or not official or scored % official:  # a multiple: each image scored under several corruptions
        barred.append(f"scored on {scored or 'an unknown number of'} images ({cell.data}), the official split has {official}")
    differences += release.differences(row, cell.eval) if release else training_differences(row, evaluation, trained)
    if cell.protocol != PROTOCOL:
        differences.append(f"protocol {cell.protocol}: not each method as published")
    elif cell.tuning != "published":
        differences.append("one fine-tuning recipe for all methods, not each paper's")
    deviations = [d for d in cell.deviations if not changes_plugin(d, cell) and not (release and d.startswith(AS_READ))]
    notes = [f"published for {checkpoint_name(cell.method)}; taken by name"] if release else []
    if release and cell.n_pretrain > 1:
        notes.append("one checkpoint: its seeds are those of what was trained on it, not of pre-training")
    return Standing(cell, row, tuple(barred), (*differences, *(f"deviates from the recipe: {d}" for d in deviations)), tuple(notes))


def run_as(name: str, evaluation: Mapping[str, Any]) -> str:
    """An evaluator's name with the variant that it was run as: what a method's paper sets is taken under the plain name (`Overrides.variant`)."""
    taken, variants = (evaluation.get("plugin") or {}).get("by"), getattr(importable("evals").get(name), "variants", {})
    return next((f"{name}@{variant}" for variant, fields in variants.items() if fields == {"by": taken}), name)


def architecture(trained: list[Mapping[str, Any]]) -> tuple[int, ...] | None:
    """Patch side, width, blocks and heads of the pre-trained ViT."""
    vit = next((t["vit"] for t in trained if t.get("vit")), None)
    return tuple(vit[name] for name in PARTS) if vit else None


def changes_plugin(deviation: str, cell: Cell) -> bool:
    """Whether a deviation (text of --set) is one of the method's or evaluator's own fields, which makes it another method or evaluator.

    A field `epochs` is the length of training, which is compared by itself."""
    return any(deviation.startswith(f"{name}.") and not deviation.startswith((f"{name}.recipe.", f"{name}.epochs=")) for name in (cell.method, cell.eval))


def scored_images(example: Result) -> int | None:
    """Number of images that a score stands on, by the record's facts."""
    found = example.facts.get("scored_images")
    return int(found) if isinstance(found, (int, float)) else None


def training_differences(row: Published, evaluation: Mapping[str, Any], trained: list[Mapping[str, Any]]) -> list[str]:
    """What differs in the training before the evaluation: its length, resolution and images, the tokenizer's images."""
    found = []
    first = trained[-1]  # the pre-training itself, where something trained on from it
    recipes = [node["recipe"] for node in (*reversed(trained), evaluation) if node.get("recipe")]  # from scratch, the evaluation is the training
    if row.epochs and recipes and (epochs := recipes[0].get("epochs")) != row.epochs:
        length = f"{epochs:g} epochs" if epochs is not None else f"{recipes[0].get('iterations')} iterations"
        found.append(f"{'trained' if row.method == 'scratch' else 'pre-trained'} for {length}, published with {row.epochs} epochs")
    if (size := tuple((first.get("vit") or {}).get("size", SIZE))) != SIZE:
        found.append(f"pre-trained at {size[0]}x{size[1]} pixels, published at {SIZE[0]}x{SIZE[1]}")
    if first.get("recipe") and "imagenet" not in first.get("data", {}):
        found.append(f"pre-trained on other images ({', '.join(first.get('data', {})) or 'none'}), published on ImageNet-1K")
    made, given = ("tokenizer" in first.get(kind, {}) for kind in ("parents", "files"))
    if (made or given) and made == ("DALLE" in row.pretrain_data):
        found.append("tokenizer trained here, published with DALL-E's" if made else "DALL-E's tokenizer, published with another")
    return found


def choices(cell: Cell) -> tuple[str, ...]:
    """Footnotes on a row's recipes: by which variant of its column it was tuned, where its method's paper names one, and what the papers leave open and a
    recipe of theirs has filled in: values whose source begins with "ours"."""
    lineage = cell.example.lineage if cell.example is not None else ()
    found = []
    plugin, recipe = (((lineage[0].get(part) if lineage else None) or {}) for part in ("plugin", "recipe"))
    by, asked = plugin.get("by", "default"), any(d.startswith(f"{cell.eval}.by=") for d in cell.deviations)
    if recipe and by != "default" and "@" not in cell.eval and not asked and by != getattr(importable("evals").get(cell.eval), "by", None):
        found.append(f"{cell.eval} tuned by {dict(recipe.get('sources', ())).get('all', by)}")
    for node in lineage if lineage and lineage[0].get("family") == FAMILY else ():
        stage = {"pretrain": "pre-training"}.get(node.get("kind", ""), cell.eval if node is lineage[0] else "fine-tuning")
        sources = {word.strip(): source for words, source in reversed((node.get("recipe") or {}).get("sources", ())) for word in words.split(",")}
        by_source: dict[str, list[str]] = {}
        for word, source in reversed(sources.items()):
            by_source.setdefault(source, []).append("everything" if word == "all" else word)
        found += [f"ours, not published: {', '.join(words)} of {stage}{source.removeprefix('ours')}" for source, words in by_source.items()
                  if source.startswith("ours")]
    files = [node["files"]["tokenizer"] for node in lineage if "tokenizer" in node.get("files", {})]
    return (*found, *(f"encoder.pkl is taken for DALL-E's by its name: its sha256 ({sha[:12]}...) is not checked against a known one" for sha in files))


def with_published(sheet: Sheet) -> Sheet:
    """A sheet whose cells have the published number of exactly their protocol, where there is one, and footnotes on what was never published."""

    def beside(cell: Cell) -> Cell:
        same = same_protocol(cell)
        return replace(cell, published=same.row if same else None, remarks=(*cell.remarks, *choices(cell), *(same.notes if same else ())))

    return replace(sheet, cells={key: beside(cell) for key, cell in sheet.cells.items()})


def same_protocol(cell: Cell) -> Standing | None:
    """The published number that a cell repeats without any difference; of several the one of the method's own paper, then the first of the file."""
    if cell.example is None or not cell.example.lineage or cell.example.lineage[0].get("family") != FAMILY:
        return None
    found = [s for row in published() if (s := compare(cell, row)) is not None and not s.barred and not s.differences]
    return min(found, key=lambda s: s.row.paper not in OWN.get(s.row.method, ()), default=None)
