"""A checkpoint of somebody else's as our ViT: architecture found, keys and shapes and numbers checked, nothing left out silently."""

from __future__ import annotations

import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.pickles import read_weights
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, UserError, ViTConfig
from harness.vit import ViT, sincos_positions
from weights.architecture import Hints, from_json
from weights.keys import Style, detect, listed, rename, unwrap

HALF = (0.5, 0.5, 0.5)
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # DeiT Ti, S; ViT-B, L, H of the ViT and MAE papers
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
FILES = {"config": "config.json", "preprocessor": "preprocessor_config.json"}


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
    """

    config: ViTConfig
    state: Mapping[str, Tensor]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    style: str
    heads_from: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def files_of(path: Path) -> dict[str, Path]:
    """Role -> file of a checkpoint: the file itself, or those in a folder of Hugging Face's or timm's.

    Raises:
        UserError: nothing is there, or a folder without weights.
    """
    if path.is_file():
        return {"weights": path}
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder: name a checkpoint, or a timm model")
    weights = next((path / n for n in WEIGHT_NAMES if (path / n).is_file()), None)
    if weights is None:
        shards = " (weights in several pieces are not read: save them as one file)" if list(path.glob("*.index.json")) else ""
        raise UserError(f"{path}: no {' or '.join(WEIGHT_NAMES)} in it{shards}: name a folder that transformers or timm saved")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json in it: name a folder that transformers or timm saved, or the file {weights.name} itself")
    return {"weights": weights, **{role: path / name for role, name in FILES.items() if (path / name).is_file()}}


def sha256(path: Path) -> str:
    """Of a file's content."""
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size)


@lru_cache
def _sha256(path: Path, changed: int, size: int) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(2**20):
            total.update(piece)
    return total.hexdigest()


def read(files: Mapping[str, Path]) -> Loaded:
    """The checkpoint in the files that `files_of` found; the last one is remembered.

    Raises:
        UserError: one of them is damaged, malicious, no ViT, or not exactly what its style says.
    """
    return _read(stamped(files))


def summary(files: Mapping[str, Path]) -> Loaded:
    """What `read` finds, without the tensors: all that planning needs, remembered for every file. Raises UserError as `read` does."""
    return _summary(stamped(files))


def stamped(files: Mapping[str, Path]) -> tuple[tuple[str, Path, int, int], ...]:
    """Files with the time and size by which a change is noticed."""
    return tuple((role, p, p.stat().st_mtime_ns, p.stat().st_size) for role, p in sorted(files.items()))


@lru_cache
def _summary(files: tuple[tuple[str, Path, int, int], ...]) -> Loaded:
    return replace(_read.__wrapped__(files), state={})


@lru_cache(maxsize=1)
def _read(files: tuple[tuple[str, Path, int, int], ...]) -> Loaded:
    places = {role: path for role, path, _, _ in files}
    state, beside = unwrap(read_weights(places["weights"]), str(places["weights"]))
    described = {role: read_config(path) for role, path in places.items() if role != "weights"}
    hints = from_json(described, str(places.get("config", ""))) if "config" in described else from_arguments(beside.get("args"))
    return convert(state, hints, str(places["weights"]))


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({type(error).__name__}): download it again") from error
    if not isinstance(body, dict):
        raise UserError(f"{path}: holds no JSON object: download it again")
    return body


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
    style = detect(state, where)
    ours, left_out = rename(state, style, where)
    before = energy(v for k, v in state.items() if k not in left_out)
    if not torch.isfinite(before):
        raise UserError(f"{where}: holds values that are not finite: a training that diverged, or a damaged file")
    config, heads_from = architecture(ours, hints, where)
    ours = place_bias(ours)
    if abs(energy(ours.values()) - before) > 1e-6 * before:
        raise UserError(f"{where}: the numbers changed on the way from style {style.name}: please report it with the file's source")
    notes = []
    fc_norm = [ours.pop(k) for k in ("fc_norm.weight", "fc_norm.bias") if k in ours]
    if fc_norm and style.norm_optional and not {"norm.weight", "norm.bias"} & set(ours):
        ours |= {"norm.weight": torch.ones(config.width), "norm.bias": torch.zeros(config.width)}
        notes.append("fine-tuned with mean pooling, no norm for single tokens in the file: final norm without scale and shift")
    check_contract(ours, config, where)
    for layout in ("sincos-mae", "sincos-moco") if config.positions != "none" else ():
        if torch.allclose(ours["pos_embed"], sincos_positions(config.width, config.grid, layout), atol=1e-5):
            config = replace(config, positions=layout)
    (mean, std), assumed = statistics_of(style, hints, bool(fc_norm))
    if assumed:
        notes.append(f"mean and std are not in the file: {assumed}")
    return Loaded(config, ours, mean, std, style.name, heads_from, left_out, (*hints.notes, *notes))


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


def statistics_of(style: Style, hints: Hints, fine_tuned: bool) -> tuple[tuple[Any, Any], str]:
    """((mean, std), what was assumed when the file does not say it)."""
    if hints.statistics is not None:
        return hints.statistics, ""
    if style.name in ("beit", "hf-beit", "hf-vit"):
        return (HALF, HALF), "0.5, the default of the code that made it"  # recipes A6, A7; transformers' ViT and BEiT processors
    quiet = style.name in ("mae-pretrain", "hf-mae")  # MAE's code knows no other (recipes A1)
    return (IMAGENET_MEAN, IMAGENET_STD), "" if quiet else "ImageNet's"
