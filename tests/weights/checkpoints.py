"""Small checkpoints of every style: models of timm and transformers themselves, and the originals' recorded states."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 48, 2, 4
COMMON = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
HF = {
    "image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH, "layer_norm_eps": 1e-6, "attn_implementation": "eager",
}


def images(size: int = SIZE, count: int = 2) -> Tensor:
    """Normalised images."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def shaken(model: Any) -> Any:
    """No parameter at its initial value, so that a missing term shows; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or "pos" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def timm_vit(**changes: Any) -> VisionTransformer:
    return shaken(VisionTransformer(**{**COMMON, "num_classes": 0, **changes}))


def timm_beit(**changes: Any) -> Beit:
    return shaken(Beit(**{**COMMON, "num_classes": 0, "global_pool": "token", "init_values": 0.1, "use_abs_pos_emb": False, **changes}))


def transformer(kind: str, **changes: Any) -> nn.Module:
    """A model of transformers with a random configuration: "ViTModel", "ViTMAEForPreTraining", "BeitModel", ..."""
    import transformers

    config = {"ViTMAE": "ViTMAEConfig", "Beit": "BeitConfig"}.get(next((p for p in ("ViTMAE", "Beit") if kind.startswith(p)), ""), "ViTConfig")
    extra = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "mask_ratio": 0.0}
    extra = extra if config == "ViTMAEConfig" else {"vocab_size": 16, "use_mean_pooling": False, "use_mask_token": True} if config == "BeitConfig" else {}
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**HF, **extra, **changes}))
    if config == "ViTMAEConfig":
        from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding as table

        side, width = SIZE // PATCH, model.config.hidden_size  # the constructor leaves it at zero; the released files hold it with its halves swapped
        with torch.no_grad():
            model.base_model.embeddings.position_embeddings.copy_(table(height=side, width=side, embed_dim=width, cls_token=True).roll(width // 2, -1)[None])
    return shaken(model)


def recorded(arrays: Mapping[str, np.ndarray], names: str | None = None) -> dict[str, Tensor]:
    """The recorded state dict of an original, or the part of it that a variant uses."""
    wanted = None if names is None else {str(n) for n in arrays[names]}
    return {k[6:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("state/") and (wanted is None or k[6:] in wanted)}


def mm_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under mmpretrain's names."""
    import re

    rules = (
        (r"patch_embed\.proj", "patch_embed.projection"), (r"blocks\.(\d+)\.norm([12])", r"layers.\1.ln\2"), (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"), (r"ls1\.gamma", "attn.gamma1.weight"), (r"ls2\.gamma", "ffn.gamma2.weight"), (r"^fc_norm", "ln2"), (r"^norm", "ln1"),
        (r"^blocks", "layers"),
    )
    heads = {f"head.layers.{k}": v for k, v in state.items() if k.startswith("head.")}
    out = {}
    for key, value in state.items():
        if not key.startswith("head."):
            for pattern, new in rules:
                key = re.sub(pattern, new, key)
            out[f"backbone.{key}"] = value
    return {**out, **heads}


def arguments(**values: Any) -> Namespace:
    """What MAE's and BEiT's training scripts keep beside the weights."""
    return Namespace(device="cuda", lr=1.5e-4, betas=[0.9, 0.95], **values)
