"""What a plugin is, and how plugins are found.

Methods, evaluators, protocols, launchers, commands and options of `run` are entry points; those of this project come by the same road as a third
party's. A plugin is a frozen dataclass: its fields are its configuration and its identity. The protocols below say what the
harness calls; there is nothing to inherit from.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from harness.spec import Asset, Metric, Outcome, Overrides, Recipe, UserError, ViTConfig, suggest
from harness.spec import Protocol as Setting

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from harness.checkpoint import Backbone
    from harness.vit import ViT

FLAGS = {"protocols": "--protocol", "launchers": "--launcher"}  # others are called as their kind
KINDS = ("methods", "evals", "datasets", "launchers", "protocols", "loggers", "commands", "checks", "options")  # checks: flags of `doctor`; options: of `run`


@dataclass(frozen=True)
class Progress:
    """Where a job stands: shown by the launcher and written beside the job."""

    stage: str
    step: int
    steps: int
    images_per_s: float
    loss: float | None = None
    seconds_left: float | None = None


@dataclass
class Session:
    """What a running job may use: its folder, its seed, the machine, and the way to report and to be stopped.

    `report` tells how far the job is; `should_stop` is true once a signal came: save, then raise `Interrupted`.
    `dtype`: the autocast type (torch.float32: none). `workers`: loader processes (0: this one). `folders`: name of a data set of the job -> its folder.
    `micro_batch`: most images at a time on this device; `force_accumulation`: also for losses that couple a batch; `on_oom`: end, or halve the micro-batch.
    `milestones`, `nan_restarts`, `shard`: see `harness.checkpoint.States`, `harness.restarts`, `harness.sharding`.
    `recompute`: the blocks of a dense evaluator's ViT are computed again in the backward pass: less memory, the same numbers; FLOPs count it."""

    dir: Path
    seed: int
    device: torch.device
    dtype: torch.dtype
    folders: Mapping[str, Path]
    workers: int = 0
    on_bad_image: Literal["fail", "skip"] = "fail"
    on_oom: Literal["fail", "halve"] = "fail"
    checkpoint_every_s: float = 30.0
    micro_batch: int | None = None
    force_accumulation: bool = False
    recompute: bool = False
    milestones: int = 4
    nan_restarts: int = 0
    shard: bool = False
    report: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    skipped_images: dict[str, str] = field(default_factory=dict)
    log: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class TrainContext:
    """What an objective is built from besides the ViT: its recipe, length, assets (name -> folder or file) and the class names of its data."""

    vit: ViTConfig
    recipe: Recipe
    total_steps: int
    assets: Mapping[str, Path] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


@dataclass
class EvalContext:
    """What an evaluator is given besides the checkpoint. `recipe` has the method's overrides and the user's --set in it already."""

    session: Session
    protocol: Setting
    recipe: Recipe | None
    overrides: Overrides = Overrides()


@dataclass(frozen=True)
class Golden:
    """A known answer of an evaluator: a score on what is known, and what it must be, give or take `tolerance`."""

    what: str
    score: float
    expected: float
    tolerance: float


class Objective(Protocol):
    """A torch module that holds the lent ViT as `vit` and computes a loss. What it may add is optional (see `harness.train.fit`):

    "weight" beside "loss": what the loss is a mean over, when that is not images (the number of masked tokens): parts of a batch are weighed by it.
    batch_coupled = True: the loss couples the images of a batch, which must not be split on one device, nor on several unless gathers = True too.
    prepare(batch): before the first step, with up to 256 samples (what is learned from images rather than trained, e.g. a PCA).
    after_step(progress): after each optimiser step (momentum teacher, centring).
    export() -> ViT: the module to keep, by default the ViT that was lent.
    classifier() -> dict: the trained read-out, kept beside the ViT (see `harness.classifier`).
    check(loader) -> dict[str, float]: scores on held-out images at the end; raises JobFailed when a gate is not passed.
    pictures(batch) -> uint8 (H, W, 3) of the trained model's work for the report, or a str: why there is none.
    """

    def __call__(self, batch: Mapping[str, Tensor], progress: float) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Trainable(Protocol):
    """What methods and the makers of assets (tokenizers) have in common."""

    version: ClassVar[int]

    def datasets(self, protocol: Setting) -> tuple[str, ...]:
        """Names of the data sets that it trains on; the first is read."""
        ...

    def recipe(self, protocol: Setting, vit: ViTConfig) -> Recipe | None:
        """Training values for a protocol's family and a backbone; None when no source gives them and we chose none."""
        ...

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        """PIL RGB image and a generator of its own -> tensors of one sample. All randomness comes from the generator."""
        ...

    def objective(self, vit: ViT | None, context: TrainContext) -> nn.Module | None:
        """The module to train, having initialised the lent ViT; None when there is nothing to train. An asset's maker is lent no ViT."""
        ...


class Method(Trainable, Protocol):
    """A way to pre-train the lent ViT. One that trains nothing (scratch) says so by a class variable `trains` = False and has no recipe; one that draws nothing
    (weights) by `seedless` = True, so that it counts as one run whatever the seeds; one that reads labels by `needs_labels` = True, so that --pretrain-data
    is refused for it. Optional are `architecture(vit, published)` -> ViTConfig (the ViT that it gets in place of a protocol's backbone; `published`: the
    protocol wants each method as published), and beside `variants` (variant -> fields that differ) `variant_sources` (variant -> table and row), notes(vit) ->
    footnotes of its row, `label` -> its name in the runs folder, facts(vit, context) -> facts of its record (crops_seen, where an image gives several), and for
    one that trains nothing classifier(context) -> the read-out that its weights come with; `leaves_classifier`: whether there is one (by default: where
    labels are needed); drawn(vit, recipe) -> what of a sample's pixels neither of them says, for the key."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def parent(self) -> Method | None:
        """The method whose checkpoint this one trains on from, or None."""
        ...

    def assets(self, protocol: Setting, vit: ViTConfig) -> Mapping[str, Asset]: ...

    def transfer(self, evaluator: str, protocol: Setting, vit: ViTConfig) -> Overrides:
        """What its paper sets for one evaluator (NAME or NAME@VARIANT). Not asked where the user has set the evaluator's `by`."""
        ...

    def skip(self, vit: ViTConfig) -> str | None:
        """Why it cannot run on this ViT, or None."""
        ...


class Evaluator(Protocol):
    """A way to score a checkpoint. `version` is bumped whenever the number would change. Optional are `trains` = False for one that trains nothing and has no
    recipe; `after`, the name of an evaluator: `run` is then given the model that this one has fine-tuned (its job's checkpoint/backbone.pt, classifier
    included), not the pre-training's; `needs_classifier`: it scores the classifier that the method leaves; a field `by`: whose recipe is taken (as long as it
    is as the name has it, a method's transfer applies); a field `holdout`: the part of train to score in place of val; notes(protocol, vit) -> footnotes on
    what it changes for a ViT; "deviations" among the facts of an Outcome -> footnotes on what happened; `distributed`: whether all processes of a job may
    call `run` (see `harness.ranks.spreads`); golden(folder) -> tuple of Golden, made inside `folder` in seconds on a CPU: what perfect and shuffled
    predictions score, and a fixed checkpoint, for `doctor --evaluators`."""

    version: ClassVar[int]

    @property
    def columns(self) -> tuple[Metric, ...]:
        """The scores: a class variable, or a property where its fields decide."""

    def datasets(self, protocol: Setting) -> tuple[str, ...]: ...

    def recipe(self, protocol: Setting, vit: ViTConfig) -> Recipe | None: ...

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Train what is to be trained, score, and write the outcomes file; resumable inside context.session.dir."""

    def skip(self, vit: ViTConfig) -> str | None: ...


@cache
def installed(kind: str) -> Mapping[str, Any]:
    """Entry points of a kind ("methods", "evals", ...) by name, not loaded yet."""
    assert kind in KINDS, kind
    return {e.name: e for e in sorted(entry_points(group=f"harness.{kind}"), key=lambda e: e.name)}


def load(kind: str, name: str, flag: str | None = None) -> Any:
    """The object behind an entry point or a "package.module:Name".

    Raises:
        UserError: no such plugin (names the close ones), or it cannot be imported.
    """
    flag = flag or FLAGS.get(kind, f"--{kind}")
    found = installed(kind)
    if name in found:
        try:
            return found[name].load()
        except ImportError as error:
            raise UserError(f"{flag}: {name} cannot be imported ({error}): run `python -m harness doctor`") from error
    if ":" in name and "/" not in name:
        module, _, attribute = name.partition(":")
        try:
            plugin = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{flag}: {name} cannot be imported ({error})") from error
        if kind in ("methods", "evals") and not dataclasses.is_dataclass(plugin):
            raise UserError(f"{flag}: {name} is no plugin, which is a dataclass: see `harness/plugins.py`")
        return plugin
    raise UserError(f"{flag}: unknown name {name!r}: {suggest(name, found)}")


def build(kind: str, name: str) -> Any:
    """A plugin from its name on the command line: NAME, NAME@VARIANT, NAME:ARGUMENT or package.module:Name.

    A class names its variants in `variants` (variant -> fields that differ) and takes an argument by `from_argument(text)`.

    Raises:
        UserError: unknown name, variant or argument.
    """
    found, flag = installed(kind), FLAGS.get(kind, f"--{kind}")
    base, _, variant = name.partition("@")
    head, colon, argument = name.partition(":")
    if colon and head in found:
        cls = load(kind, head, flag)
        if not hasattr(cls, "from_argument"):
            raise UserError(f"{flag}: {head} takes no argument ({name!r})")
        path, _, last = argument.rpartition("@")
        variant = last if path and last in getattr(cls, "variants", {}) else ""  # any other @ is part of a path
        plugin = cls.from_argument(path if variant else argument)
    else:
        cls = load(kind, base, flag)
        if hasattr(cls, "from_argument"):
            raise UserError(f"{flag}: {base} needs an argument, as in {base}:PATH")
        plugin = cls() if isinstance(cls, type) else cls
        if "@" in name and not variant:
            raise UserError(f"{flag}: {name!r} names no variant: leave the @ out, or {suggest('', getattr(plugin, 'variants', {}))}")
    return with_variant(plugin, variant, f"{flag}: {base}") if variant else plugin


def with_variant(plugin: Any, variant: str, where: str) -> Any:
    """A plugin with the fields of one of its variants. Raises UserError when it has none of that name."""
    variants = getattr(plugin, "variants", {})
    if variant not in variants:
        raise UserError(f"{where} has no variant {variant!r}: {suggest(variant, variants)}")
    return dataclasses.replace(plugin, **variants[variant])


def name_of(kind: str, plugin: Any) -> str:
    """NAME or NAME@VARIANT under which a plugin is installed; its class's name when it is none of these."""
    for name, cls in importable(kind).items():
        if cls is type(plugin):
            same = [v for v, fields in getattr(cls, "variants", {}).items() if dataclasses.replace(cls(), **fields) == plugin]
            return name if not same or plugin == cls() else f"{name}@{same[0]}"
    return type(plugin).__name__


def importable(kind: str) -> dict[str, Any]:
    """Name -> object of the plugins that can be imported: one that is broken, or lacks an extra, must not take the others down."""
    found = {}
    for name in installed(kind):
        with suppress(UserError):
            found[name] = load(kind, name)
    return found


def group(kind: str, name: str) -> tuple[str, ...] | None:
    """Members of a group of plugins ("all" of those that train or score by themselves, or a name in their `groups`), or None when there is no such group."""
    plain = {n: cls for n, cls in importable(kind).items() if not hasattr(cls, "from_argument")}
    if name == "all":
        return tuple(n for n, cls in plain.items() if getattr(cls, "needs_classifier", False) is not True)
    members = tuple(n for n, cls in plain.items() if name in getattr(cls, "groups", ()))
    return members or None


def groups(kind: str) -> tuple[str, ...]:
    """Names of the groups of a kind."""
    return ("all", *sorted({g for cls in importable(kind).values() for g in getattr(cls, "groups", ())}))

