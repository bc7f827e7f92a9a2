"""What the configuration beside a checkpoint says about its architecture: transformers' config.json, timm's, and timm's models themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.spec import UserError

EPS = (1e-12, 1e-6)  # ours is 1e-6; transformers writes 1e-12 even for MAE and BEiT, which were trained with 1e-6


@dataclass(frozen=True)
class Hints:
    """What the tensors themselves do not tell. `size` is (height, width) in pixels, `statistics` (mean, std), `pooling` what a classifier reads
    ("cls", "mean", or "other" than ours can); None where it is not said."""

    heads: int | None = None
    heads_from: str = ""
    size: tuple[int, int] | None = None
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    notes: tuple[str, ...] = ()
    pooling: str | None = None


def from_json(described: Mapping[str, Mapping[str, Any]], where: str) -> Hints:
    """Hints of a folder that transformers ("model_type") or timm ("architecture") saved.

    Raises:
        UserError: another model, or a ViT with parts that ours has not.
    """
    config = described["config"]
    try:
        if "architecture" in config:
            return from_timm_config(config, where)
        if config.get("model_type") in ("vit", "vit_mae", "beit"):
            return from_transformers(config, described.get("preprocessor", {}), where)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not understood ({type(error).__name__}: {error}): expected what transformers or timm saved") from error
    raise UserError(f"{where}: model_type {config.get('model_type')!r}: another architecture; vit, vit_mae and beit are read")


def from_transformers(config: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str) -> Hints:
    """Hints of ViTConfig, ViTMAEConfig, BeitConfig and an image processor."""
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise UserError(f"{where}: hidden_act {act!r}: the shared ViT has gelu only")
    eps = float(config.get("layer_norm_eps", 1e-12))
    if not EPS[0] <= eps <= EPS[1]:
        raise UserError(f"{where}: layer_norm_eps {eps:g}: the shared ViT has 1e-6")
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    notes = () if eps == EPS[1] else (f"LayerNorm eps {eps:g} in config.json, 1e-6 in the shared ViT",)
    return Hints(int(config["num_attention_heads"]), "config.json", pair(config["image_size"]), (triple(mean), triple(std)) if mean and std else None, notes)


def from_timm_config(config: Mapping[str, Any], where: str) -> Hints:
    """Hints of a config.json of timm; the model is built without memory to learn what its name implies."""
    arguments, cfg = dict(config.get("model_args") or {}), config.get("pretrained_cfg") or {}
    model = build_timm(str(config["architecture"]), where, **arguments)
    return from_timm_model(model, cfg, where)


def build_timm(name: str, where: str, **arguments: Any) -> nn.Module:
    """A timm model on the meta device, without weights. Raises UserError when timm has no such model or arguments."""
    import timm

    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
            return model
    except Exception as error:
        raise UserError(f"{where}: timm cannot build {name!r} ({' '.join(str(error).split())[:120]}): expected one of its ViTs") from error


def from_timm_model(model: nn.Module, cfg: Mapping[str, Any], where: str) -> Hints:
    """Hints of a model of timm and its pretrained_cfg.

    Raises:
        UserError: it is neither timm's VisionTransformer nor its Beit, or one with parts that ours has not.
    """
    from timm.models.beit import Beit
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, (VisionTransformer, Beit)):
        raise UserError(f"{where}: {type(model).__name__} is no ViT: timm's VisionTransformer and Beit are read")
    parts: Any = model
    block = parts.blocks[0]
    if not isinstance(block.mlp.act, nn.GELU) or getattr(block.mlp.act, "approximate", "none") != "none":
        raise UserError(f"{where}: activation {type(block.mlp.act).__name__}: the shared ViT has GELU only")
    if block.norm1.eps != EPS[1]:
        raise UserError(f"{where}: {type(block.norm1).__name__} with eps {block.norm1.eps:g}: the shared ViT has LayerNorm with 1e-6")
    tokens = 2 if isinstance(model, VisionTransformerDistilled) else 1  # the second is taken apart (`weights.keys.split_second_token`)
    if getattr(parts, "num_prefix_tokens", 1) != tokens or getattr(parts, "no_embed_class", False) or not getattr(block, "attn", None):
        raise UserError(f"{where}: a ViT without exactly one class token with a position of its own: the shared ViT has that")
    mean, std = cfg.get("mean"), cfg.get("std")
    heads, size = int(block.attn.num_heads), pair(parts.patch_embed.img_size)
    normed = not isinstance(parts.fc_norm, nn.Identity)
    pooling = {("token", False): "cls", ("avg", True): "mean"}.get((parts.global_pool, normed), "other")
    pooling = "other" if getattr(parts, "pool_include_prefix", False) else pooling
    return Hints(heads, "timm", size, (triple(mean), triple(std)) if mean and std else None, pooling=pooling)


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a number or a list of two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def triple(value: Any) -> tuple[float, float, float]:
    """Three floats of a list."""
    red, green, blue = value
    return float(red), float(green), float(blue)
