"""What a comparison is made of, as plain data: architecture, recipe, data names, seeds, metrics.

Everything that can change a number is a field of a frozen dataclass in this module or in a plugin. `harness.canonical` turns
such values into JSON and into keys.
Nothing here imports torch, so that planning and tables stay quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class UserError(ValueError):
    """Bad input of a user: shown as one line that names the file or flag and the remedy, exit code 2."""


class JobFailed(RuntimeError):
    """A job that ran and cannot give its result (a gate not passed, a loss that is not finite, a broken image)."""


class Interrupted(Exception):
    """A job was asked to stop and has saved where it stands; running it again goes on from there."""


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of the shared backbone, and nothing else (training values belong to a Recipe).

    `size` is (height, width) of the input in pixels, `patch` the side of a patch in pixels. `positions`: learned, fixed
    sine-cosine in the layout of MAE (column first) or of MoCo v3 (row first), or none (BEiT with a relative bias). `relative_bias`:
    none, one table shared by all blocks (BEiT pre-training) or one per block (BEiT fine-tuning). `layer_scale`: initial value, None
    for no LayerScale. `key_bias` False keeps the k part of the fused qkv bias at zero, as BEiT has it.
    """

    size: tuple[int, int] = (224, 224)
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    positions: Literal["learned", "sincos-mae", "sincos-moco", "none"] = "learned"
    relative_bias: Literal["none", "shared", "block"] = "none"
    layer_scale: float | None = None
    key_bias: bool = True

    def __post_init__(self) -> None:
        if self.size[0] % self.patch or self.size[1] % self.patch:
            raise UserError(f"patch size {self.patch} does not divide the image size {self.size[0]}x{self.size[1]}: choose a "
                            f"backbone whose patch does, or another image size")
        if self.width % self.heads:
            raise UserError(f"width {self.width} is no multiple of {self.heads} heads")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row, (H/P, W/P)."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def patches(self) -> int:
        """Number of patches N of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def paper_size(self) -> str:
        """"S/16", "S/16-12h" (MoCo v3's, with 12 heads), "B/16", "L/16" or "H/14" at 224 pixels, the sizes that recipes are published for; "" for others."""
        sizes = {(16, 384, 12, 6): "S/16", (16, 384, 12, 12): "S/16-12h", (16, 768, 12, 12): "B/16", (16, 1024, 24, 16): "L/16", (14, 1280, 32, 16): "H/14"}
        return sizes.get((self.patch, self.width, self.depth, self.heads), "") if self.size == (224, 224) else ""


def within(whose: str, owner: Any, **ranges: tuple[float, float | None]) -> None:
    """Check numeric fields, and each number of those that hold several: name=(lowest, highest or None). A field that is None is passed over.

    Raises:
        UserError: one lies outside.
    """
    for name, (low, high) in ranges.items():
        value = getattr(owner, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if not low <= number <= (math.inf if high is None else high):
                raise UserError(f"{whose} {name} must be {f'at least {low:g}' if high is None else f'from {low:g} to {high:g}'}, not {number:g}")


@dataclass(frozen=True)
class Augment:
    """Image augmentation of a recipe. Sizes are fractions of the area; a value of 0 or None switches a part off."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: tuple[float, float, float] | None = None
    rand_augment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    smoothing: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        within("augment's", self, crop_scale=(0, 1), crop_ratio=(0, None), flip=(0, 1), color_jitter=(0, None), erasing=(0, 1), mixup=(0, None),
               cutmix=(0, None), mixup_prob=(0, 1), mixup_switch_prob=(0, 1), smoothing=(0, 1), repeats=(1, None))
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high:
                raise UserError(f"augment's {name} must rise from above 0, not {low:g}, {high:g}")


@dataclass(frozen=True)
class Recipe:
    """How something is trained. Exactly one of `epochs` and `iterations` is set; `warmup` is in the same unit.

    `lr` is multiplied by batch / `lr_batch` (None: absolute). `batch` is the global batch, however many devices
    and micro-batches it is split over (`harness.batches`). `schedule`: see `harness.optim.lr_at`. `no_decay` and `frozen` are
    fnmatch patterns over parameter names; parameters with one dimension are exempt from weight decay when `decay_vectors` is False.
    `sources` names for each value the table and row it comes from, or "ours".
    """

    batch: int
    lr: float
    epochs: float | None = None
    iterations: int | None = None
    lr_batch: int | None = None
    warmup: float = 0.0
    warmup_lr: float = 0.0
    schedule: Literal["cosine", "cosine-stepwise", "poly", "step", "constant"] = "cosine"
    min_lr: float = 0.0
    poly_power: float = 1.0
    steps: tuple[float, ...] = ()
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    decay_vectors: bool = False
    no_decay: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    layer_decay: float | None = None
    drop_path: float = 0.0
    clip: float | None = None
    clip_mode: Literal["global", "tensor"] = "global"
    ema: float | None = None
    augment: Augment = Augment()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    sources: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.iterations is None):
            raise UserError("a recipe needs either epochs or iterations, and not both")
        within(
            "a recipe's", self, batch=(1, None), epochs=(0, None), iterations=(1, None), lr=(0, None), lr_batch=(1, None), warmup=(0, None),
            warmup_lr=(0, None), min_lr=(0, None), poly_power=(0, None), eps=(0, None), momentum=(0, 1), betas=(0, 1), weight_decay=(0, None),
            weight_decay_end=(0, None), layer_decay=(0, 1), drop_path=(0, 1), clip=(0, None), ema=(0, 1),
        )
        if (self.epochs or self.iterations or 0) <= 0:
            raise UserError("a recipe's length must be above 0")
        if self.min_lr > self.peak_lr:
            raise UserError(f"min_lr {self.min_lr:g} lies above the peak learning rate {self.peak_lr:g}: set a lower min_lr first")

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, with the scaling rule applied."""
        return self.lr if self.lr_batch is None else self.lr * self.batch / self.lr_batch

    def __str__(self) -> str:
        """Learning rate x rule = peak, batch, length, and where the recipe and its learning rate come from, on one line."""
        rule = "" if self.lr_batch is None else f" x {self.batch}/{self.lr_batch} = {self.peak_lr:g}"
        length = f"{self.iterations} iterations" if self.epochs is None else f"{self.epochs:g} epochs"
        told = {word.strip(): source for words, source in reversed(self.sources) for word in words.split(",")}
        source = "; lr ".join(dict.fromkeys(told[word] for word in ("all", "lr") if word in told))
        return f"lr {self.lr:g}{rule}, batch {self.batch}, {length} [{source or 'no source given'}]"


@dataclass(frozen=True)
class Metric:
    """One table column of an evaluator. Scores are 0..100."""

    name: str
    unit: str = "%"
    higher_is_better: bool = True


@dataclass(frozen=True)
class Outcome:
    """Result of an evaluator: metric name -> score, and the file of compact per-image outcomes."""

    metrics: Mapping[str, float]
    outcomes: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Overrides:
    """What a method's own paper sets for its transfer to one evaluator.

    `variant`: the evaluator's variant that has the paper's recipe and read-out; the column keeps the plain name. `recipe`: fields of its Recipe that differ
    besides. `source`: where these come from, or, where there are none, the choice of the evaluator's own.
    `use_head`: score the classifier that the pre-training made, without any training (a supervised row on its own task).
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    use_head: bool = False
    source: str = ""
    variant: str = ""

    def on(self, recipe: Recipe) -> Recipe:
        """A recipe with what is overridden; its sources say where that comes from."""
        told = ((", ".join(self.recipe) or "all", self.source),) if self.source else ()
        return dataclasses.replace(recipe, **{"sources": (*told, *recipe.sources), **self.recipe})


@dataclass(frozen=True)
class Asset:
    """Something a method needs besides images: made by a node of the graph (`maker`), or a file.

    A relative `file` lies below the root that --data names. `sha256` is part of the key; None: that of the file as found when planning.
    `origin` says where to get a file that is missing. `check(path)` reads it when planning and raises UserError when it is no such thing.
    """

    maker: Any = None
    file: str | None = None
    sha256: str | None = None
    origin: str = ""
    check: Callable[[Path], Any] | None = None


@dataclass(frozen=True)
class Protocol:
    """Scale, data, backbones and default variants of a comparison. Plugins choose their recipe by `family`.

    `generator`: "module:function" that makes the data sets named in `generates`, called with (folder, names, family, workers); None for data
    that the user brings.
    `architecture`: every method gets the backbone as it stands ("shared"), or changed as the method was published on it ("published": a
    method's `architecture`). `tuning` is used where --tuning is not given.
    `caption` stands over a table of the protocol's own data, `caveat` behind the name of other data.
    """

    name: str
    family: str
    summary: str
    backbones: Mapping[str, ViTConfig]
    backbone: str
    architecture: Literal["shared", "published"] = "shared"
    tuning: Literal["shared", "published"] = "published"
    generator: str | None = None
    generates: tuple[str, ...] = ()
    data_version: str = ""
    caption: str = ""
    caveat: str = ""


def fields_of_type(value: Any) -> Mapping[str, Any]:
    """Name -> type of the fields of a dataclass instance: what --set may name."""
    hints = typing.get_type_hints(type(value))
    return {f.name: hints[f.name] for f in dataclasses.fields(value) if f.init}


def suggest(word: str, valid: Iterable[str], most: int = 500, also: Iterable[str] = ()) -> str:
    """"did you mean X? valid: ...", for an unknown name; the five nearest where they have over `most` characters. `also` may be meant, and is not listed."""
    names: Sequence[str] = sorted(valid)
    close = difflib.get_close_matches(word, [*names, *also], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    if len(text := ", ".join(names)) > most:
        return f"{hint}nearest of {len(names)}: {', '.join(difflib.get_close_matches(word, names, n=5, cutoff=0.0))}"
    return f"{hint}valid: {text or 'none'}"


LARGE = 96  # views with sides from here on are resized by torch, smaller ones by PIL, so that the demo's pixels stay what they were


def pixels(vit: ViTConfig, side: int | None = None) -> dict[str, str]:
    """What an identity says of resizing by torch. A view is as large as the input or `side`, a quarter larger for scoring, or has 8 pixels a patch (dVAE)."""
    return {"pixels": "torch"} if max(*vit.size, *(8 * g for g in vit.grid), side or 0) >= 0.8 * LARGE else {}
