"""Is the comparison fair? What the rows of a table had, item by item, from the records behind them: equal or unequal.

`audit` looks at a sheet; `stamp` is the line that the table carries. The command is `results.audit_command`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from results.ancestry import Archive, Step
from results.cells import Sheet, seeds_of
from results.origins import device
from results.selection import trials_of, tried

UNKNOWN, NONE, UNTRAINED = "not known", "none", "not trained"  # what is not trained has no augmentation, EMA or precision to be unequal in
VERDICTS, ALONE = ("unequal", UNKNOWN, "equal"), "single row"
TRICKS = ("scales", "flip", "tta", "crops")  # fields of evaluators that score an image more than once
READ_OUT = ("by", "pooling", "layer", "taps", "k")
TOLERANCE = {"device-hours": 0.1, "FLOPs": 0.01}  # measured, so never equal to the last digit


@dataclass(frozen=True)
class Item:
    """One thing that a fair comparison holds equal: method -> what it had, in words. `measured` are the numbers behind it, where they are measured."""

    name: str
    values: Mapping[str, str]
    measured: Mapping[str, float] | None = None
    tolerance: float = 0.0

    @property
    def equal(self) -> bool | None:
        """Whether all rows had the same; None when it is not known of one of them and those that are known do not differ."""
        if self.measured:
            low, high = min(self.measured.values()), max(self.measured.values())
            same = high - low <= self.tolerance * high
        else:
            same = len({v for v in self.values.values() if v != UNTRAINED and not v.startswith(UNKNOWN)}) <= 1
        return None if same and any(v.startswith(UNKNOWN) for v in self.values.values()) else same

    @property
    def verdict(self) -> str:
        """equal, unequal, or not known; a single row is none of them."""
        return ALONE if len(self.values) < 2 else UNKNOWN if self.equal is None else "equal" if self.equal else "unequal"

    def grouped(self) -> dict[str, list[str]]:
        """Value -> the methods that had it."""
        found: dict[str, list[str]] = {}
        for method, value in self.values.items():
            found.setdefault(value, []).append(method)
        return found


Trail = tuple[Step, ...]  # the nodes behind a score, the evaluation first


def trails(sheet: Sheet, archive: Archive) -> dict[str, dict[str, Trail]]:
    """Method -> evaluator -> the nodes behind one of its scores."""
    found: dict[str, dict[str, Trail]] = {}
    for cell in sheet.cells.values():
        if cell.example is not None and cell.eval not in found.setdefault(cell.method, {}):
            found[cell.method][cell.eval] = archive.steps(cell.example)
    return {method: by_eval for method, by_eval in found.items() if by_eval}


def repeats(sheet: Sheet, archive: Archive) -> dict[str, list[Trail]]:
    """Method -> the nodes behind one score of each of its pre-training seeds."""
    found: dict[str, dict[int, Trail]] = {}
    for cell in sheet.cells.values():
        for result in cell.results:
            if result.seed not in (by_seed := found.setdefault(cell.method, {})):
                by_seed[result.seed] = archive.steps(result)
    return {method: list(by_seed.values()) for method, by_seed in found.items()}


def audit(
    found: Mapping[str, Mapping[str, Trail]], trials: Mapping[str, str], seeds: Mapping[str, str], every: Mapping[str, Sequence[Trail]] | None = None
) -> tuple[Item, ...]:
    """All items of a comparison. `found` is what `trails` gives, `trials` and `seeds` are method -> words, `every` is what `repeats` gives:
    what is measured is the mean over seeds, as in the cost columns (one seed's first minute on a busy machine would decide otherwise)."""
    before = {method: _before(next(iter(by_eval.values()))) for method, by_eval in found.items()}
    of_seeds = {method: [_before(t) for t in every[method]] if every else [steps] for method, steps in before.items()}

    def of_training(say: Callable[[Sequence[Step]], str]) -> dict[str, str]:
        return {m: say(steps) if steps and all(s.record for s in steps) else UNKNOWN for m, steps in before.items()}

    def measured(name: str, field: str, unit: str) -> Item:
        values = {m: [(s.record or {}).get(field) for steps in runs for s in steps] for m, runs in of_seeds.items()}
        known = {m: float(sum(v)) / len(of_seeds[m]) for m, v in values.items()
                 if all(of_seeds[m]) and None not in v and not any(s.foreign for steps in of_seeds[m] for s in steps)}
        on = {m: " and ".join(sorted({device(s) for steps in runs for s in steps} - {""})) for m, runs in of_seeds.items()} if field == "device_hours" else {}
        apart = len(set(on.values()) - {""}) > 1  # an hour of a GPU is not an hour of a processor
        words = {m: f"{v:.3g}{unit}{f' on {on[m]}' if apart else ''}" if v else NONE for m, v in known.items()}
        return Item(name, {m: words.get(m, UNKNOWN) for m in before}, None if apart else known, TOLERANCE[name.split()[-1]])

    items = [
        Item("pre-training length", of_training(lambda steps: _each(_trained(steps), length))),
        Item("images and crops seen", of_training(lambda steps: _each(_trained(steps), seen))),
        measured("pre-training FLOPs", "flops", ""),
        measured("pre-training device-hours", "device_hours", " h"),
        Item("architecture", of_training(lambda steps: architecture(steps[0]))),
        Item("parameters", of_training(lambda steps: parameters(steps[0].identity.get("vit") or {}))),
        Item("resolution", of_training(lambda steps: " then ".join(dict.fromkeys(size(s) for s in reversed(steps) if s.identity.get("vit"))) or UNKNOWN)),
        Item("data", of_training(lambda steps: _each(_trained(steps), data))),
        Item("tokenizer and its data", of_training(tokenizer)),
        Item("labels used in pre-training", of_training(lambda steps: labels(_trained(steps)))),
        Item("augmentation", of_training(lambda steps: _each(_trained(steps), augmentation))),
        Item("EMA", of_training(lambda steps: _each(_trained(steps), lambda s: recipe_value(s, "ema")))),
        Item("precision", of_training(lambda steps: _each(_trained(steps), lambda s: recipe_value(s, "precision")))),
        Item("hyper-parameter trials", trials),
        Item("seeds", seeds),
    ]
    evals = list(dict.fromkeys(name for by_eval in found.values() for name in by_eval))
    for name in evals:
        ends = {m: by_eval[name][0] for m, by_eval in found.items() if name in by_eval}

        def of_evaluation(title: str, say: Callable[[Step], str], ends: Mapping[str, Step] = ends) -> Item:
            return Item(title, {m: say(step) if step.record else UNKNOWN for m, step in ends.items()})

        items += [
            of_evaluation(f"{name}: fine-tuning budget", length),
            of_evaluation(f"{name}: fine-tuning recipe", recipe_words),
            of_evaluation(f"{name}: layer and pooling read", lambda s: plugin_words(s, READ_OUT)),
            of_evaluation(f"{name}: test-time tricks", lambda s: plugin_words(s, TRICKS)),
            of_evaluation(f"{name}: EMA", lambda s: recipe_value(s, "ema")),
            of_evaluation(f"{name}: data", data),
        ]
    return tuple(items)


def _before(trail: Trail) -> tuple[Step, ...]:
    """What came before the evaluations: the pre-training first, then its parents and assets."""
    return tuple(s for s in trail[1:] if s.kind != "evaluate")


def _trained(steps: Iterable[Step]) -> list[Step]:
    """The trainings of the ViT itself, in the order in which they were done."""
    return [s for s in reversed(list(steps)) if s.role in ("checkpoint", "parent")]


def _each(steps: Sequence[Step], say: Callable[[Step], str]) -> str:
    """What several trainings had, one after the other."""
    return " then ".join(say(s) for s in steps) or UNKNOWN


def length(step: Step) -> str:
    """Length of a training in its recipe's unit, "800 epochs" or "260 steps of 16"."""
    recipe = step.identity.get("recipe")
    if not recipe:
        return UNKNOWN if step.foreign else NONE
    return f"{recipe['epochs']:g} epochs" if recipe.get("epochs") is not None else f"{recipe['iterations']} steps of {recipe['batch']}"


def seen(step: Step) -> str:
    """Images that a training saw, and crops where one image gives several."""
    record = step.record or {}
    images, crops = record.get("images_seen"), (record.get("facts") or {}).get("crops_seen")
    return UNKNOWN if images is None or step.foreign else NONE if not images else f"{images}" + (f" ({crops} crops)" if crops and crops != images else "")


def architecture(step: Step) -> str:
    """The ViT without its input size."""
    vit = step.identity.get("vit")
    if not vit:
        return UNKNOWN
    extras = [f"{k} {vit[k]}" for k in ("positions", "relative_bias", "layer_scale", "key_bias") if k in vit and vit[k] not in (None, "none")]
    return f"patch {vit['patch']}, width {vit['width']}, {vit['depth']} blocks, {vit['heads']} heads; {', '.join(extras)}"


def parameters(vit: Mapping[str, Any]) -> str:
    """Parameters of the ViT as it is pre-trained, without any head: timm's blocks with fused qkv, two norms and an MLP each."""
    if not vit:
        return UNKNOWN
    d, patch, heads, grid = vit["width"], vit["patch"], vit["heads"], (vit["size"][0] // vit["patch"], vit["size"][1] // vit["patch"])
    hidden = int(d * vit["mlp_ratio"])
    block = 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (2 * d * hidden + hidden + d) + (2 * d if vit["layer_scale"] is not None else 0)
    table = ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3) * heads
    total = 3 * patch * patch * d + d + d + 2 * d + vit["depth"] * block
    total += (grid[0] * grid[1] + 1) * d if vit["positions"] != "none" else 0
    total += table * {"none": 0, "shared": 1, "block": vit["depth"]}[vit["relative_bias"]]
    return f"{total:,}"


def size(step: Step) -> str:
    """Input size in pixels."""
    height, width = step.identity["vit"]["size"]
    return f"{height}x{width}"


def data(step: Step) -> str:
    """Data sets with the first digits of their fingerprints."""
    return ", ".join(f"{name} {str(print_)[:6]}" for name, print_ in sorted((step.identity.get("data") or {}).items())) or (
        UNKNOWN if step.foreign else NONE)


def tokenizer(steps: Sequence[Step]) -> str:
    """What made the targets besides the images themselves: a node of the graph with its data, or a file."""
    made = [f"{s.role} trained on {data(s)}, {seen(s)} images" for s in steps if s.role not in ("checkpoint", "parent")]
    for step in _trained(steps):
        made += [f"{role} from a file, sha256 {str(digest)[:8]}: trained elsewhere" + " (DALL-E's on 250 million images)" * (role == "tokenizer")
                 for role, digest in (step.identity.get("files") or {}).items() if role != "weights"]
    return "; ".join(made) or NONE


def labels(steps: Sequence[Step]) -> str:
    """Whether a training of the ViT read labels."""
    read = [_reads_labels(s) for s in steps]
    return "yes" if True in read else UNKNOWN if None in read else "no"


def _reads_labels(step: Step) -> bool | None:
    """As its record says; an older record does not, and the plugin is asked. None where neither is possible."""
    from harness.canonical import restore

    about = (step.record or {}).get("about") or {}
    if step.foreign or "labels" in about:
        return None if step.foreign else bool(about["labels"])
    with contextlib.suppress(Exception):  # a plugin that is gone, or of another version
        return bool(getattr(restore(step.identity["plugin"]), "needs_labels", False))
    return None


def recipe_value(step: Step, name: str) -> str:
    """One value of a training's recipe."""
    recipe = step.identity.get("recipe")
    return UNKNOWN if step.foreign else UNTRAINED if not recipe else NONE if recipe.get(name) is None else str(recipe[name])


def augmentation(step: Step) -> str:
    """The parts of a recipe's augmentation that are switched on."""
    recipe = step.identity.get("recipe")
    if not recipe:
        return UNKNOWN if step.foreign else UNTRAINED
    mixes = recipe["augment"].get("mixup") or recipe["augment"].get("cutmix")
    shown = {k: v for k, v in recipe["augment"].items() if k not in ("class", "crop_ratio") and (mixes or not k.startswith("mixup_"))}
    return ", ".join(f"{k} {_short(v)}" for k, v in shown.items() if v not in (0, None) and (k, v) != ("repeats", 1)) or NONE


def recipe_words(step: Step) -> str:
    """A fine-tuning recipe without its length, sources and precision, shortened to a digest of what is left and its learning rate."""
    from harness.canonical import digest

    recipe = step.identity.get("recipe")
    if not recipe:
        return "nothing is trained" + (": the pre-training's own classifier" if step.identity.get("use_head") else "")
    rest = {k: v for k, v in recipe.items() if k not in ("epochs", "iterations", "sources", "precision")}
    return f"lr {recipe['lr']:g} at batch {recipe['batch']}, layer decay {recipe['layer_decay']}, drop path {recipe['drop_path']} ({digest(rest)[:6]})"


def plugin_words(step: Step, names: Iterable[str]) -> str:
    """Fields of an evaluator that matter for an item."""
    plugin = step.identity.get("plugin") or {}
    found = [f"{name} {_short(plugin[name])}" for name in names if plugin.get(name) is not None]
    return ", ".join(found) or "the protocol's" if any(name in plugin for name in names) else "none beyond the protocol's"


def _short(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"({', '.join(map(_short, value))})" if isinstance(value, (list, tuple)) else str(value)


def of_sheet(sheet: Sheet, archive: Archive, least: int = 1) -> tuple[Item, ...]:
    """The audit of a table: what its rows had, of a single row too; () where fewer than `least` rows have a score."""
    if len(found := trails(sheet, archive)) < least:
        return ()
    trials, seeds = trials_of(sheet, archive), seeds_of(sheet)
    return audit(found, {m: tried(trials, m) for m in found}, {m: seeds[m] for m in found}, repeats(sheet, archive))


def compared(items: Sequence[Item]) -> bool:
    """Whether there are two rows: one cannot be equal or unequal to anything."""
    return any(len(i.values) > 1 for i in items)


def score(items: Sequence[Item]) -> str:
    """How many items are equal, of those that two rows have."""
    return f"{sum(i.verdict == 'equal' for i in items)} of {sum(i.verdict != ALONE for i in items)} items equal"


def stamp(items: Sequence[Item]) -> str:
    """The audit in a line for under a table, "" for a single row."""
    unequal, unknown = ([i.name for i in items if i.verdict == wanted] for wanted in VERDICTS[:2])
    if not compared(items):
        return ""
    said = f"Fairness audit: {score(items)}"
    said += f"; unequal: {', '.join(unequal)}" if unequal else ""
    said += f"; not known: {', '.join(unknown)}" if unknown else ""
    return f"{said}. Who had what: harness audit."


