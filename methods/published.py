"""The papers' training recipes for ViT-B/16, L/16 and H/14 at 224 pixels, each with the table and row that it comes from; None where no source has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.spec import Augment, Overrides, Recipe, ViTConfig

NO_DECAY = ("vit.pos_embed", "vit.cls_token")
INFERRED_CROP = ("augment.crop_scale", "torchvision's and timm's default: no table has it")


def classification(erasing: float = 0.0, repeats: int = 1) -> Augment:
    """RandAugment (9, 0.5), mixup 0.8, cutmix 1.0, smoothing 0.1: MAE-paper Tables 9 and 11, BEiT-paper Table 13, DeiT-paper Table 9 (recipes A2, A5, A7)."""
    return Augment(
        crop_scale=(0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=erasing, repeats=repeats,
    )


def fixed(vit: ViTConfig) -> tuple[str, ...]:
    """Parameters that are not trained: sine-cosine positions."""
    return ("vit.pos_embed",) if vit.positions.startswith("sincos") else ()


def mae_pretraining(vit: ViTConfig, epochs: int, jitter: bool = False) -> Recipe | None:
    """MAE-paper Table 8, all rows, B/16, L/16, H/14 (recipes A1): lr 1.5e-4 x batch / 256, class and mask token decayed, no clipping, no drop path.

    Lengths that the paper has: 800 (4.1, ablations), 1600 (Tables 3 to 7), 100, 200, 400 (Figure 7).
    """
    if not vit.paper_size:
        return None
    lengths = {800: "MAE-paper 4.1, ablations", 1600: "MAE-paper Tables 3 to 7"} | dict.fromkeys((100, 200, 400), "MAE-paper Figure 7")
    return Recipe(
        batch=4096, lr=1.5e-4, lr_batch=256, epochs=epochs, warmup=40, betas=(0.9, 0.95), weight_decay=0.05, frozen=fixed(vit),
        augment=Augment(crop_scale=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4) if jitter else None),
        sources=(
            ("all", "MAE-paper Table 8 (recipes A1)"), ("epochs", lengths.get(epochs, "ours")), ("no_decay, min_lr", "MAE-repo main_pretrain.py (recipes A1)"),
            *((("augment.color_jitter", "ours: MAE-paper Table 1e gives no strength, these are BEiT's"),) if jitter else ()),
        ),
    )


def beit_pretraining(vit: ViTConfig, epochs: int) -> Recipe | None:
    """BEiT-paper Table 12, ImageNet-1K, columns Base and Large (recipes A6): lr 1.5e-3 absolute, clip 3.0 and 1.0. No ViT-H was published.

    800 epochs; 300 in Tables 4 and 5.
    """
    if vit.paper_size not in ("B/16", "L/16"):
        return None
    length = {800: "BEiT-paper Table 12", 300: "BEiT-paper Tables 4 and 5"}.get(epochs, "ours")
    return Recipe(
        batch=2048, lr=1.5e-3, epochs=epochs, warmup=10, min_lr=1e-5, schedule="cosine-stepwise",
        betas=(0.9, 0.999), weight_decay=0.05, no_decay=NO_DECAY, frozen=fixed(vit),
        clip=3.0 if vit.paper_size == "B/16" else 1.0, drop_path=0.1, augment=Augment(crop_scale=(0.08, 1.0), color_jitter=(0.4, 0.4, 0.4)),
        sources=(
            ("all", "BEiT-paper Table 12, BEiT-repo run_beit_pretraining.py (recipes A6)"), ("epochs", length),
            ("augment.crop_scale", "BEiT-repo datasets.py (recipes A6)"), ("no_decay", "BEiT-repo optim_factory.py (recipes A6)"),
        ),
    )


def from_scratch(vit: ViTConfig) -> Recipe | None:
    """MAE-paper Table 11 and A.2, ViT-B and ViT-L/H (recipes A5): lr 1e-4 x batch / 256, weight decay 0.3, EMA 0.9999, whose weights are reported."""
    if not vit.paper_size:
        return None
    base = vit.paper_size == "B/16"
    return Recipe(
        batch=4096, lr=1e-4, lr_batch=256, epochs=300 if base else 200, warmup=20, betas=(0.9, 0.95), weight_decay=0.3, no_decay=NO_DECAY,
        drop_path=0.1 if base else 0.2, ema=0.9999, frozen=fixed(vit), augment=classification(),
        sources=(
            ("all", f"MAE-paper Table 11, {'ViT-B' if base else 'ViT-L/H'} (recipes A5)"), INFERRED_CROP,
            ("no_decay", "MAE-repo main_finetune.py (recipes A2, A5)"),
        ),
    )


def deit(vit: ViTConfig) -> Recipe | None:
    """DeiT-paper Table 9, DeiT-B (recipes A5): lr 5e-4 x batch / 512, erasing, repeated augmentation. Of the sizes here DeiT has ViT-B/16 alone.

    The reported accuracy is the raw model's, so there is no EMA here. timm's scheduler moves once an epoch and its cosine runs from epoch 0; ours moves each
    step and runs from the end of the warm-up.
    """
    if vit.paper_size != "B/16":
        return None
    return Recipe(
        batch=1024, lr=5e-4, lr_batch=512, epochs=300, warmup=5, warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.05, no_decay=NO_DECAY, frozen=fixed(vit),
        drop_path=0.1, augment=classification(erasing=0.25, repeats=3),
        sources=(
            ("all", "DeiT-paper Table 9, DeiT-B; DeiT-repo main.py (recipes A5)"), ("schedule", "ours: per step, cosine after the warm-up"), INFERRED_CROP,
        ),
    )


def beit_finetuning(vit: ViTConfig) -> Recipe | None:
    """BEiT-paper Table 13, ImageNet-1K, columns Base and Large (recipes A7): absolute lr, layer decay 0.65 and 0.75, repeated augmentation for Base only.

    The paper takes the best of lr {2, 3, 4, 5}e-3; one value of it is chosen here. `evals.recipes.beit` has the same values and a test holds the two
    together: the intermediate fine-tuning trains by this one, and methods and evaluators do not import each other.
    """
    if vit.paper_size not in ("B/16", "L/16"):
        return None
    base = vit.paper_size == "B/16"
    return Recipe(
        batch=1024, lr=4e-3 if base else 2e-3, lr_batch=None, epochs=100 if base else 50, warmup=20 if base else 5, min_lr=1e-6, schedule="cosine-stepwise",
        betas=(0.9, 0.999),
        weight_decay=0.05, no_decay=NO_DECAY, layer_decay=0.65 if base else 0.75, drop_path=0.1, frozen=fixed(vit),
        augment=classification(erasing=0.25, repeats=3 if base else 1),
        sources=(
            ("all", f"BEiT-paper Table 13, ImageNet-1K, {'Base' if base else 'Large'} (recipes A7)"),
            ("lr", "ours: one of Table 13's {2, 3, 4, 5}e-3" + (", BEiT-repo README's value" if base else ", which won is not published")), INFERRED_CROP,
        ),
    )


def mae_table_9(vit: ViTConfig) -> Mapping[str, Any]:
    """MAE-paper Table 9 (recipes A2), the fine-tuning of models with plain pixel targets, where it differs from FINETUNE.md's of the released ones.

    Fields of a recipe: lr 1e-3 x batch / 256, layer decay 0.75, 100 epochs for ViT-B and 50 else, drop path 0.2 for ViT-H, no erasing.
    """
    if not vit.paper_size:
        return {}
    return {
        "batch": 1024, "lr": 1e-3, "lr_batch": 256, "epochs": 100 if vit.paper_size == "B/16" else 50, "warmup": 5, "weight_decay": 0.05,
        "layer_decay": 0.75, "drop_path": 0.2 if vit.paper_size == "H/14" else 0.1, "augment": classification(),
    }


def override(recipe: Recipe | None) -> Overrides:
    """A fine-tuning recipe as what a method sets for an evaluator, optimisation and augmentation; nothing for None."""
    if recipe is None:
        return Overrides()
    names = (
        "batch", "lr", "lr_batch", "epochs", "iterations", "warmup", "warmup_lr", "min_lr", "betas", "weight_decay", "no_decay", "layer_decay", "drop_path",
        "clip", "ema", "augment", "schedule",
    )
    return Overrides({name: getattr(recipe, name) for name in names}, source="; ".join(f"{what}: {where}" for what, where in recipe.sources))
