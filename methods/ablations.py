"""The rows of the papers' ablation tables, each as the fields in which it differs from its method, with table and row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, tuple[Mapping[str, Any], str]]


def without_normalisation(**fields: Any) -> Mapping[str, Any]:
    """MAE's Table 1 and figures are about plain pixels, 800 epochs (recipes A1)."""
    return {"normalise_pixels": False, **fields}


# MAE. The default is normalised pixels and 800 epochs: Table 1d, "pixel (w/ norm)".
MAE: Rows = {
    "1600": ({"epochs": 1600}, "MAE-paper Tables 3 to 6; Table 7, pixel (w/ norm); the released weights"),
    "pixels": (without_normalisation(), "MAE-paper Table 1, the default of every part"),
    **{f"dec-depth-{n}": (without_normalisation(decoder_depth=n), f"MAE-paper Table 1a, {n} block{'s' * (n > 1)} (8: mae@pixels)") for n in (1, 2, 4, 12)},
    **{f"dec-width-{n}": (without_normalisation(decoder_width=n), f"MAE-paper Table 1b, width {n} (512: mae@pixels)") for n in (128, 256, 768, 1024)},
    "encoder-mask-tokens": (without_normalisation(mask_tokens="encoder"), "MAE-paper Table 1c, encoder w/ [M]"),
    "pca": (without_normalisation(target="pca"), "MAE-paper Table 1d, PCA"),
    "tokens": ({"target": "tokens"}, "MAE-paper Table 1d, dVAE token"),
    "aug-none": (without_normalisation(augmentation="none"), "MAE-paper Table 1e, none"),
    "aug-crop-fixed": (without_normalisation(augmentation="crop-fixed"), "MAE-paper Table 1e, crop, fixed size"),
    "aug-crop-jitter": (without_normalisation(augmentation="crop-jitter"), "MAE-paper Table 1e, crop + color jit (crop, rand size: mae@pixels)"),
    "mask-block-50": (without_normalisation(masking="block", mask_ratio=0.5), "MAE-paper Table 1f, block 50"),
    "mask-block-75": (without_normalisation(masking="block"), "MAE-paper Table 1f, block 75"),
    "mask-grid-75": (without_normalisation(masking="grid"), "MAE-paper Table 1f, grid 75 (random 75: mae@pixels)"),
    **{
        f"mask-ratio-{n}": (without_normalisation(mask_ratio=n / 100), f"MAE-paper Figure 5, {n} % (75 %: mae@pixels)")
        for n in (10, 20, 30, 40, 50, 60, 70, 80, 90)
    },
    **{f"pixels-{n}": (without_normalisation(epochs=n), f"MAE-paper Figure 7, {n} epochs (800: mae@pixels)") for n in (100, 200, 400)},
    "pixels-1600": (without_normalisation(epochs=1600), "MAE-paper Figure 7, 1600 epochs; Table 7, pixel (w/o norm)"),
    "tokens-1600": ({"target": "tokens", "epochs": 1600}, "MAE-paper Table 7, dVAE token"),
}

# BEiT. The default is 800 epochs: Table 4, "Pretrain longer (800 epochs)".
BEIT: Rows = {
    "300": ({"epochs": 300}, "BEiT-paper Table 4, BEiT (300 epochs)"),
    "algorithm-1": ({"masking": "algorithm-1"}, "BEiT-paper Algorithm 1; beit masks as the released code does (recipes A6)"),
    "random": ({"masking": "random", "epochs": 300}, "BEiT-paper Table 4, - Blockwise masking"),
    "pixels": ({"target": "pixels", "epochs": 300}, "BEiT-paper Table 4, - Visual tokens; loss and pixel scale ours"),
    "pixels-random": (
        {"target": "pixels", "masking": "random", "epochs": 300}, "BEiT-paper Table 4, - Visual tokens - Blockwise masking; loss and pixel scale ours",
    ),
    "all": ({"recover": "all", "epochs": 300}, "BEiT-paper Table 4, + Recover 100% visual tokens"),
    "unmasked": ({"masking": "none", "recover": "all", "epochs": 300}, "BEiT-paper Table 4, - Masking + Recover 100% visual tokens"),
    "layer-scale": ({"layer_scale": True, "epochs": 300}, "BEiT-paper Table 5, + LayerScale"),
    "plus-300": ({"layer_scale": True, "relative_bias": True, "epochs": 300}, "BEiT-paper Table 5, + LayerScale + relative position bias"),
    "plus": ({"layer_scale": True, "relative_bias": True}, "BEiT-repo's default, 800 epochs: the BEiT of Li21 and of MAE-paper Tables 4 and 5 (recipes A6)"),
    "intermediate": ({"intermediate": True}, "BEiT-paper Tables 3 and 11, + Intermediate Fine-Tuning (on ImageNet-1K)"),
}


def variants(rows: Rows) -> Mapping[str, Mapping[str, Any]]:
    """Variant -> fields that differ."""
    return {name: fields for name, (fields, _) in rows.items()}


def sources(rows: Rows) -> Mapping[str, str]:
    """Variant -> table and row."""
    return {name: source for name, (_, source) in rows.items()}
