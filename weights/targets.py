"""Our ViT under the names of timm and of transformers: tensors and configuration, or the reason why the target cannot hold it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.checkpoint import Backbone
from harness.spec import UserError, ViTConfig

TRANSFORMERS = (
    (r"^cls_token", "embeddings.cls_token"), (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^norm\.", "layernorm."), (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."), (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."), (r"\.ls([12])\.gamma$", r".lambda_\1"),
)
QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Export:
    """What goes into the folder: `files` are JSON bodies by name, `model` the class that loads it, `snippet` how."""

    tensors: Mapping[str, Tensor]
    files: Mapping[str, Mapping[str, Any]]
    model: str
    snippet: str


def for_timm(backbone: Backbone) -> Export:
    """timm's VisionTransformer, or its Beit when there is a relative bias.

    Raises:
        UserError: Beit is needed and the weights have a k bias, which it has not.
    """
    config = backbone.config
    arguments: dict[str, Any] = {
        "img_size": list(config.size), "patch_size": config.patch, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio, "init_values": config.layer_scale, "num_classes": 0, "global_pool": "token",
    }
    name, model, tensors = "vit_base_patch16_224", "VisionTransformer", dict(backbone.state)
    if config.relative_bias != "none":
        name, model, tensors = "beit_base_patch16_224", "Beit", beit_names(backbone, "timm's Beit")
        shared = config.relative_bias == "shared"
        arguments |= {"use_abs_pos_emb": config.positions != "none", "use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared}
    elif config.positions == "none":
        arguments |= {"pos_embed": "none"}
    size = config.size
    cfg = {
        "num_classes": 0, "input_size": [3, *size], "pool_size": None, "crop_pct": 0.875 if max(size) <= 224 else 1.0, "interpolation": "bicubic",
        "fixed_input_size": True, "mean": list(backbone.mean), "std": list(backbone.std), "first_conv": "patch_embed.proj", "classifier": "head",
    }
    body = {"architecture": name, "num_classes": 0, "num_features": config.width, "global_pool": "token", "model_args": arguments, "pretrained_cfg": cfg}
    return Export(tensors, {"config.json": body}, model, 'import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()')


def beit_names(backbone: Backbone, target: str) -> dict[str, Tensor]:
    """The tensors as BEiT and timm's Beit name them. Raises UserError when there is a k bias."""
    width, tensors = backbone.config.width, {}
    for key, value in backbone.state.items():
        if key.endswith("attn.qkv.bias"):
            if value[width : 2 * width].any():
                reason = "a relative bias" if backbone.config.relative_bias != "none" else "LayerScale"
                raise UserError(f"export: the weights have {reason} and a k bias: {target} has no k bias, and no other model of the target has {reason}")
            tensors[key.replace("qkv.bias", "q_bias")] = value[:width].clone()
            tensors[key.replace("qkv.bias", "v_bias")] = value[2 * width :].clone()
        elif key.startswith("relative_bias."):
            shared = backbone.config.relative_bias == "shared"
            place = "rel_pos_bias" if shared else f"blocks.{key.split('.')[1]}.attn"
            tensors[f"{place}.relative_position_bias_table"] = value
        else:
            tensors[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key)] = value
    return tensors


def for_transformers(backbone: Backbone) -> Export:
    """transformers' ViTModel, or its BeitModel when there is a relative bias or LayerScale.

    Raises:
        UserError: neither can hold it: a k bias together with one of these, or then an image that is not square; no positions of any kind.
    """
    config = backbone.config
    beit = config.relative_bias != "none" or config.layer_scale is not None
    if beit:
        beit_names(backbone, "transformers' BEiT")  # for its refusal
    square = config.size[0] == config.size[1]
    if config.positions == "none" and not beit:
        raise UserError("export: no positions and no relative bias: transformers' ViT has a table of positions always: use --to timm")
    if beit and not square:
        raise UserError(f"export: images of {config.size[0]}x{config.size[1]} pixels: transformers' BEiT has positions for squares only: use --to timm")
    shared: dict[str, Any] = {
        "architectures": ["BeitModel" if beit else "ViTModel"], "model_type": "beit" if beit else "vit", "hidden_size": config.width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.heads, "intermediate_size": round(config.width * config.mlp_ratio),
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": config.size[0] if square else list(config.size), "patch_size": config.patch,
        "num_channels": 3,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "dtype": "float32",
    }
    if beit:
        shared |= {
            "layer_scale_init_value": config.layer_scale or 0.0, "use_absolute_position_embeddings": config.positions != "none",
            "use_mean_pooling": False, "use_mask_token": False,
            "use_relative_position_bias": config.relative_bias == "block", "use_shared_relative_position_bias": config.relative_bias == "shared",
            "drop_path_rate": 0.0,
        }
    else:
        shared |= {"qkv_bias": True}
    height, width = config.size
    processor = {
        "image_processor_type": "BeitImageProcessor" if beit else "ViTImageProcessor", "do_resize": True, "size": {"height": height, "width": width},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(backbone.mean), "image_std": list(backbone.std),
    }
    model = shared["architectures"][0]
    snippet = f'from transformers import {model}\nmodel = {model}.from_pretrained("FOLDER", add_pooling_layer=False).eval()'
    return Export(transformers_names(backbone.state, config, beit), {"config.json": shared, "preprocessor_config.json": processor}, model, snippet)


def transformers_names(state: Mapping[str, Tensor], config: ViTConfig, beit: bool) -> dict[str, Tensor]:
    """The tensors as ViTModel or BeitModel name them: q, k and v apart, BEiT's k without its (zero) bias."""
    tensors = {}
    for key, value in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
            place = f"encoder.layer.{match.group(1)}.attention.attention"
            for part, piece in zip(QKV, value.chunk(3), strict=True):
                if not (beit and (part, match.group(2)) == ("key", "bias")):
                    tensors[f"{place}.{part}.{match.group(2)}"] = piece.clone()
        elif match := re.fullmatch(r"relative_bias\.(\d+)\.table", key):
            place = "encoder" if config.relative_bias == "shared" else f"encoder.layer.{match.group(1)}.attention.attention"
            tensors[f"{place}.relative_position_bias.relative_position_bias_table"] = value
        else:
            for pattern, new in TRANSFORMERS:
                key = re.sub(pattern, new, key)
            tensors[key] = value
    return tensors


TARGETS = {"timm": for_timm, "hf": for_transformers}
