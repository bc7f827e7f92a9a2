"""Recipes for Mask R-CNN on COCO: Li et al. 2021 (MAE-paper Table 4) for ViT-B and L, ViTDet for ViT-B, L and H, and ours for the demo (recipes A10)."""

from __future__ import annotations

import dataclasses

from harness.spec import Recipe

DEMO = Recipe(
    batch=8, lr=1.5e-3, iterations=400, warmup=40, schedule="cosine", weight_decay=0.1, layer_decay=0.9, drop_path=0.05, clip=10.0,
    no_decay=("*.cls_token", "*.pos_embed"), sources=(
        ("schedule, weight_decay", "recipes A10: Li21"), ("batch, iterations, lr, layer_decay, drop_path, warmup, clip", "ours"),
    ),
)
SMOKE = Recipe(
    batch=4, lr=6e-4, iterations=10, warmup=2, schedule="cosine", weight_decay=0.1, layer_decay=0.75, drop_path=0.05, clip=10.0,
    no_decay=("*.cls_token", "*.pos_embed"), sources=(("all", "ours"),),
)
VITDET_ITERATIONS = 184_375  # 100 epochs of 118,000 images at batch 64
VITDET_STEPS = (163_889, 177_546)  # 88.9 % and 96.3 % of them


def li21(size: str, epochs: int) -> Recipe | None:
    """Li21, ViT-B and L, for a pre-trained ViT. The values were searched on val2017 by the authors; 25, 50 and 100 epochs were tried, 100 is best."""
    if size not in ("B/16", "L/16"):
        return None
    return Recipe(
        batch=64, lr=8e-5, epochs=epochs, warmup=0.25, schedule="cosine", betas=(0.9, 0.999), weight_decay=0.1, drop_path=0.1 if size == "B/16" else 0.3,
        sources=(
            ("batch, lr, epochs, warmup, schedule, betas, weight_decay, drop_path", "Li21 (arXiv 2111.11429), MAE-paper Table 4 (recipes A10)"),
            ("layer_decay, clip", "Li21: none (recipes A10)"),
            ("min_lr, warmup_lr", "ours: 0, Li21 does not say"), ("decay_vectors, no_decay", "ours: vectors exempt, Li21 does not say"),
        ),
    )


def vitdet(size: str) -> Recipe | None:
    """detectron2's mask_rcnn_vitdet_b, _l (100 epochs) and _h (75 epochs); ViT-H there has patches of 16 pixels."""
    if size not in ("B/16", "L/16", "H/14"):
        return None
    huge = size == "H/14"
    share = 3 if huge else 4  # of four: ViT-H trains three quarters as long
    return Recipe(
        batch=64, lr=1e-4, iterations=VITDET_ITERATIONS * share // 4, warmup=250, warmup_lr=1e-7, schedule="step",
        steps=tuple(step * share // 4 for step in VITDET_STEPS), betas=(0.9, 0.999), weight_decay=0.1, decay_vectors=True,
        no_decay=() if huge else ("*.norm*", "*.ln.*", "*.pos_embed"), layer_decay={"B/16": 0.7, "L/16": 0.8, "H/14": 0.9}[size],
        drop_path={"B/16": 0.1, "L/16": 0.4, "H/14": 0.5}[size],
        sources=(
            ("batch, lr, iterations, steps, betas, weight_decay, layer_decay, drop_path",
             f"detectron2 projects/ViTDet mask_rcnn_vitdet_{size[0].lower()} (recipes A10)"),
            ("warmup, warmup_lr", "the same: 250 iterations from 0.001 of lr"),
            ("no_decay, decay_vectors", f"the same: {'all' if huge else 'all but norms and absolute positions'} decayed"),
        ),
    )


def scaled_down(family: str, by: str) -> Recipe | None:
    """The demo's and smoke's, for any way of setting up the detector; ViTDet keeps its schedule."""
    recipe = {"demo": DEMO, "smoke": SMOKE}.get(family)
    if recipe is None or by != "vitdet":
        return recipe
    length = recipe.iterations or 0
    return dataclasses.replace(
        recipe, schedule="step", steps=(0.889 * length, 0.963 * length), sources=(("schedule, steps", "ViTDet (recipes A10)"), *recipe.sources),
    )
