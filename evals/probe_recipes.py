"""Recipes of MoCo v3's, DINO's and iGPT's own linear probes (recipes A13 to A15), and which of a ViT's outputs DINO's reads."""

from __future__ import annotations

import dataclasses

from harness.spec import Augment, Recipe, ViTConfig

CROPS, CENTRE = Augment(crop_scale=(0.08, 1.0)), Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
EVERY_BLOCK = ("beit-repo", "igpt", "igpt-masked")  # protocols that probe every block and choose one (`evals.layers`)


def rivals(by: str, family: str, vit: ViTConfig) -> Recipe | None:
    """MoCo3-repo main_lincls.py (ViT-S, B, L) or DINO-repo eval_linear.py (ViT-S, B): SGD with momentum, a cosine without warm-up, no decay. For iGPT: `igpt`.

    demo, smoke: the same optimiser on the features of central crops, shorter in smoke (ours).
    """
    if by.startswith("igpt"):
        return igpt(family, vit)
    sizes = ("S/16", "S/16-12h", "B/16", *(("L/16",) if by == "mocov3" else ()))  # a probe is no matter of heads
    if family not in ("paper", "demo", "smoke") or (family == "paper" and vit.paper_size not in sizes):
        return None
    moco = by == "mocov3"
    sources: tuple[tuple[str, str], ...] = (
        ("all", "MoCo3-repo main_lincls.py (recipes A13)" if moco else "DINO-repo eval_linear.py (recipes A14)"),
        ("schedule", "ours: the rate falls with each step, not each epoch"), ("augment.crop_scale", "torchvision's default"),
        *(() if moco else (("batch", "ours: 128 a GPU, on eight"),)),
    )
    recipe = Recipe(batch=1024, lr=3.0 if moco else 1e-3, lr_batch=256, epochs=90 if moco else 100, optimizer="sgd", momentum=0.9, weight_decay=0.0,
                    frozen=("vit.*",), augment=CROPS, sources=sources)
    if family == "paper":
        return dataclasses.replace(recipe, sources=(("augment", "ours: crops are resized bicubic, not bilinear"), *sources))
    sources = (*sources, ("batch, augment", "ours: features of the central crops, computed once"), ("epochs", "smoke's length is ours"))
    return dataclasses.replace(recipe, batch=512 if family == "demo" else 64, epochs=recipe.epochs if family == "demo" else 20, augment=CENTRE, sources=sources)


def igpt(family: str, vit: ViTConfig) -> Recipe | None:
    """iGPT-paper (recipes A15): SGD with momentum, a million steps; `lr` is the highest of the learning rates of which one is chosen. All ViTs of the papers.

    demo, smoke: the same optimiser on the features of central crops, seconds (ours).
    """
    if family not in ("paper", "demo", "smoke") or (family == "paper" and not vit.paper_size):
        return None
    sources: tuple[tuple[str, str], ...] = (
        ("lr, optimizer, momentum, length", "iGPT-paper (recipes A15)"), ("batch, schedule, weight_decay, augment", "ours: not in A15; plain crops and flips"),
        ("all", "iGPT-paper (recipes A15), the block and the learning rate chosen on held-out training images"),
    )
    recipe = Recipe(batch=128, lr=30.0, iterations=1_000_000, optimizer="sgd", weight_decay=0.0, frozen=("vit.*",), augment=CROPS, sources=sources)
    if family == "paper":
        return recipe
    sources = (("batch, length, augment", "ours: features of the central crops, computed once"), *sources)
    return dataclasses.replace(recipe, batch=256 if family == "demo" else 64, iterations=1000 if family == "demo" else 60, augment=CENTRE, sources=sources)


def dino_blocks(vit: ViTConfig) -> tuple[int, bool]:
    """How many of the last class tokens DINO's probe reads, and whether the mean of the last patch tokens beside them: ViT-S 4, ViT-B 1 and the mean.

    Ours: narrower ViTs as ViT-S, wider ones as ViT-B.
    """
    return (min(4, vit.depth), False) if vit.width <= 384 else (1, True)
