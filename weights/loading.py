"""A checkpoint of somebody else's as our ViT: architecture found, keys and shapes and numbers checked, nothing left out silently."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.spec import IMAGENET_MEAN, IMAGENET_STD, UserError, ViTConfig
from harness.vit import ViT, sincos_positions
from weights.architecture import Hints, from_json
from weights.files import BESIDE, read_config, read_state
from weights.keys import Style, detect, listed, read_out, rename, split_second_token

HALF = (0.5, 0.5, 0.5)
DISTILLED = "methods.deit:DistilledClassifier"  # whose read-out DeiT's distilled files bring: the rooms know one another by name only
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # DeiT Ti, S; ViT-B, L, H of the ViT and MAE papers


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as read.

    Attributes:
        config: its architecture; `heads` counts only when `heads_from` says where they are known from.
        state: exactly the keys of `harness.vit.ViT(config)`.
        mean, std: what its input was normalised with.
        style: whose names it uses.
        heads_from: where the number of heads stands, "" when nowhere.
        left_out: keys of the file that are no part of the backbone.
        notes: what had to be assumed or filled in, for the footnotes.
        classifier: what `harness.classifier` restores, but for the names of its classes; None when the file has none that reads the class token
            or the mean of the patches.
    """

    config: ViTConfig
    state: Mapping[str, Tensor]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    style: str
    heads_from: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    classifier: Mapping[str, Any] | None = None


def read(files: Mapping[str, Path], size: tuple[int, int] | None = None) -> Loaded:
    """The checkpoint in the files that `files_of` found; the last one is remembered.

    Args:
        size: height and width in pixels that it was trained at, where nothing beside the weights says it and it is no square: 2 x 4 patches have as many
            positions as 4 x 2.

    Raises:
        UserError: one of them is damaged, malicious, no ViT, or not exactly what its style says.
    """
    return _read(stamped(files), size)


def summary(files: Mapping[str, Path]) -> Loaded:
    """What `read` finds, without the tensors: all that planning needs, remembered for every file. Raises UserError as `read` does."""
    return _summary(stamped(files))


def stamped(files: Mapping[str, Path]) -> tuple[tuple[str, Path, int, int], ...]:
    """Files with the time and size by which a change is noticed."""
    return tuple((role, p, p.stat().st_mtime_ns, p.stat().st_size) for role, p in sorted(files.items()))


@lru_cache
def _summary(files: tuple[tuple[str, Path, int, int], ...]) -> Loaded:
    loaded = _read.__wrapped__(files)
    return replace(loaded, state={}, classifier=loaded.classifier and {**loaded.classifier, "state": {}})


@lru_cache(maxsize=1)
def _read(files: tuple[tuple[str, Path, int, int], ...], size: tuple[int, int] | None = None) -> Loaded:
    places = {role: path for role, path, _, _ in files}
    state, beside = read_state(places)
    described = {role: read_config(path) for role, path in places.items() if role in BESIDE}
    hints = from_json(described, str(places.get("config", ""))) if "config" in described else from_arguments(beside.get("args"))
    return convert(state, replace(hints, size=hints.size or size), str(places["weights"] if "weights" in places else places["index"].parent))


def from_arguments(arguments: object) -> Hints:
    """What MAE's and BEiT's `args` tell: the model's name, and BEiT's choice of mean and std."""
    if not isinstance(arguments, Namespace):
        return Hints()
    name, heads = str(getattr(arguments, "model", "")), None
    if match := re.search(r"(tiny|small|base|large|huge)_patch", name):
        heads = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}[match.group(1)]
    flag = getattr(arguments, "imagenet_default_mean_and_std", None)
    statistics = None if flag is None else (IMAGENET_MEAN, IMAGENET_STD) if flag else (HALF, HALF)
    return Hints(heads=heads, heads_from=f"args.model {name}" if heads else "", statistics=statistics)


def convert(state: Mapping[str, Tensor], hints: Hints, where: str) -> Loaded:
    """Our ViT's architecture and state from a state dict of any known style.

    Raises:
        UserError: keys, shapes or values are not exactly those of a ViT that this harness has.
    """
    whole, (state, second) = state, split_second_token(state, where)
    style = detect(state, where)
    ours, left_out = rename(state, style, where)
    left_out += tuple(k for k in whole if k not in state)
    before = energy(v for k, v in state.items() if k not in left_out)
    if not torch.isfinite(before + energy(second.values())):
        raise UserError(f"{where}: holds values that are not finite: a training that diverged, or a damaged file")
    config, heads_from = architecture(ours, hints, where)
    ours = place_bias(ours)
    if abs(energy(ours.values()) - before) > 1e-6 * before:
        raise UserError(f"{where}: the numbers changed on the way from style {style.name}: please report it with the file's source")
    notes = []
    fc_norm = {k: ours.pop(k) for k in ("fc_norm.weight", "fc_norm.bias") if k in ours}
    classifier = classifier_of({**read_out(state, style), **fc_norm}, "norm.weight" in ours, hints.pooling, config.width)
    if second:
        notes.append("distillation token left out, but where its own classifier is scored")
        classifier = classifier and {**classifier, "class": DISTILLED, "state": {**classifier["state"], **second}}
    if fc_norm and style.norm_optional and not {"norm.weight", "norm.bias"} & set(ours):
        ours |= {"norm.weight": torch.ones(config.width), "norm.bias": torch.zeros(config.width)}
        notes.append("fine-tuned with mean pooling, no norm for single tokens in the file: final norm without scale and shift")
    check_contract(ours, config, where)
    for layout in ("sincos-mae", "sincos-moco") if config.positions != "none" else ():
        if torch.allclose(ours["pos_embed"], sincos_positions(config.width, config.grid, layout), atol=1e-5):
            config = replace(config, positions=layout)
    if (style.name == "mocov3" or config.positions == "sincos-moco") and config.width == 384 and hints.heads is None:
        config, heads_from = replace(config, heads=12), "MoCo v3's ViT-S"  # of its probe's and its converted files, too; all others of this width have 6 (A13)
    (mean, std), assumed = statistics_of(style, hints, config)
    if assumed:
        notes.append(f"mean and std are not in the file: {assumed}")
    return Loaded(config, ours, mean, std, style.name, heads_from, left_out, (*hints.notes, *notes), classifier)


def classifier_of(parts: Mapping[str, Tensor], normed: bool, told: str | None, width: int) -> dict[str, Any] | None:
    """The read-out of a fine-tuned file: of the class token where it has a norm for single tokens, of the patches' mean where it has fc_norm instead.

    Args:
        parts: the head's weight and bias, and fc_norm's, as far as they are there.
        normed: whether there is a final norm for single tokens.
        told: what the configuration beside the file says that is pooled, None: nothing.
    """
    pooling, shape = "cls" if normed else "mean", tuple(parts["head.weight"].shape) if "head.weight" in parts else ()
    names = {"head.weight", "head.bias", *(() if normed else ("fc_norm.weight", "fc_norm.bias"))}
    if set(parts) != names or told not in (None, pooling) or len(shape) != 2 or shape[1] != width or shape[0] < 2 or parts["head.bias"].shape != shape[:1]:
        return None
    return {"pooling": pooling, "probe": False, "state": dict(parts)}


def energy(tensors: Any) -> Tensor:
    """Sum of the squares of all values, float64: the same before and after renaming, splitting and joining."""
    return sum((t.double().pow(2).sum() for t in tensors if t.is_floating_point()), torch.zeros((), dtype=torch.float64))


def architecture(ours: Mapping[str, Tensor], hints: Hints, where: str) -> tuple[ViTConfig, str]:
    """(architecture, where the number of heads is known from) as the tensors' shapes tell it."""
    needed = ("cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight")
    if missing := [k for k in needed if k not in ours]:
        raise UserError(f"{where}: no {listed(missing)} in it: another architecture, or a part of a checkpoint")
    patch, hidden = ours["patch_embed.proj.weight"], ours["blocks.0.mlp.fc1.weight"]
    if patch.ndim != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3] or hidden.ndim != 2:
        raise UserError(f"{where}: patch embedding {tuple(patch.shape)}: expected (width, 3, patch, patch): another architecture")
    width, side = patch.shape[0], patch.shape[-1]
    tables = {k: v for k, v in ours.items() if k.startswith("relative_bias.")}
    kind: Any = "none" if not tables else "shared" if "relative_bias.shared" in tables else "block"
    table = next(iter(tables.values()), None)
    if table is not None and table.ndim != 2:
        raise UserError(f"{where}: relative position bias of shape {tuple(table.shape)}: expected (offsets, heads): another architecture")
    rows = ours["pos_embed"].shape[1] - 1 if "pos_embed" in ours and ours["pos_embed"].ndim == 3 else None
    grid = find_grid(rows, None if table is None else table.shape[0] - 3, hints.size and (hints.size[0] // side, hints.size[1] // side), where)
    heads, source = hints.heads, hints.heads_from
    if table is not None:
        heads, source = table.shape[1], "relative bias"
    elif heads is None and width in PUBLISHED_HEADS:
        heads, source = PUBLISHED_HEADS[width], "published size"
    qkv = ours.get("blocks.0.attn.qkv.bias")
    if heads is None or width % heads:
        heads, source = 1, ""
    config = ViTConfig(
        size=(grid[0] * side, grid[1] * side), patch=side, width=width, depth=1 + max(int(k.split(".")[1]) for k in ours if k.startswith("blocks.")),
        heads=heads, mlp_ratio=hidden.shape[0] / width, positions="none" if tables and "pos_embed" not in ours else "learned",
        relative_bias=kind, layer_scale=0.1 if "blocks.0.ls1.gamma" in ours else None,
        key_bias=qkv is None or bool(qkv[width : 2 * width].any()),
    )
    return config, source


def find_grid(positions: int | None, offsets: int | None, told: tuple[int, int] | None, where: str) -> tuple[int, int]:
    """Patches per column and row, from the rows of the position table and of the bias table; a square unless the file says otherwise."""
    square = round(positions**0.5) if positions is not None else (round((offsets or 0) ** 0.5) + 1) // 2
    for grid in ((square, square), told):
        fits = grid is not None and min(grid) > 0 and positions in (None, grid[0] * grid[1])
        if fits and grid is not None and offsets in (None, (2 * grid[0] - 1) * (2 * grid[1] - 1)) and (told is None or grid == told):
            return grid
    found = ", ".join(f"{n} {what}" for n, what in ((positions, "positions"), (offsets, "offsets of a relative bias")) if n is not None) or "no positions"
    raise UserError(f"{where}: {found}: no grid of patches with a class token fits: another architecture")


def place_bias(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bias tables under the names of `harness.vit.ViT`."""
    named = {k: re.sub(r"relative_bias\.(?:shared|block\.(\d+))", lambda m: f"relative_bias.{m.group(1) or 0}.table", k) for k in ours}
    return {named[k]: v for k, v in ours.items()}


def check_contract(ours: Mapping[str, Tensor], config: ViTConfig, where: str) -> None:
    """Raises UserError with the difference when the keys and shapes are not exactly the ViT's."""
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in ViT(config).state_dict().items()}
    found = {k: tuple(v.shape) for k, v in ours.items()}
    parts = []
    if missing := sorted(set(expected) - set(found)):
        parts.append(f"missing {listed(missing)}")
    if unexpected := sorted(set(found) - set(expected)):
        parts.append(f"unexpected {listed(unexpected)}")
    if shapes := [f"{k} {found[k]} instead of {expected[k]}" for k in sorted(set(found) & set(expected)) if found[k] != expected[k]]:
        parts.append(f"shape {listed(shapes)}")
    if parts:
        shown = f"ViT of width {config.width}, {config.depth} blocks, patch {config.patch}"
        raise UserError(f"{where}: not exactly a {shown}: {'; '.join(parts)}: a part of a checkpoint, or another architecture")


def statistics_of(style: Style, hints: Hints, config: ViTConfig) -> tuple[tuple[Any, Any], str]:
    """((mean, std), what was assumed when the file does not say it)."""
    if hints.statistics is not None:
        return hints.statistics, ""
    if style.name in ("beit", "hf-beit", "hf-vit"):
        return (HALF, HALF), "0.5, the default of the code that made it"  # recipes A6, A7; transformers' ViT and BEiT processors
    # the code of MAE, MoCo v3 and DINO knows no other (recipes A1, A13, A14)
    quiet = style.name in ("mae-pretrain", "hf-mae", "mocov3", "dino") or config.positions.startswith("sincos")
    return (IMAGENET_MEAN, IMAGENET_STD), "" if quiet else "ImageNet's"
