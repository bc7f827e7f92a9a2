"""The papers' training recipes for ViT-S, B, L and H at 224 pixels, each with the table and row that it comes from; None where no source has one."""

from __future__ import annotations

from harness import plugins
from harness.spec import Augment, Protocol, Recipe, ViTConfig

NO_DECAY = ("vit.pos_embed", "vit.cls_token")
INFERRED_CROP = ("augment.crop_scale", "torchvision's and timm's default: no table has it")


def fixed(vit: ViTConfig) -> tuple[str, ...]:
    """Parameters that are not trained: sine-cosine positions."""
    return ("vit.pos_embed",) if vit.positions.startswith("sincos") else ()


def mae_pretraining(vit: ViTConfig, epochs: int, jitter: bool = False) -> Recipe | None:
    """MAE-paper Table 8, all rows, B/16, L/16, H/14 (recipes A1): lr 1.5e-4 x batch / 256, class and mask token decayed, no clipping, no drop path.

    Lengths that the paper has: 800 (4.1, ablations), 1600 (Tables 3 to 7), 100, 200, 400 (Figure 7).
    """
    if vit.paper_size not in ("B/16", "L/16", "H/14"):
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
            ("augment.color_jitter", "BEiT-paper Table 12"),
        ),
    )


def mocov3_pretraining(vit: ViTConfig, epochs: int, frozen: tuple[str, ...]) -> Recipe | None:
    """MoCo3-repo CONFIG.md and main_moco.py, ViT-S and ViT-B; MoCo3-paper 6.3 trains ViT-L alike (recipes A13). Everything is decayed, vectors too.

    Lengths that the paper has: 300 (Table 4), 600 (6.2).
    """
    if vit.paper_size not in ("S/16-12h", "B/16", "L/16"):
        return None
    return Recipe(
        batch=4096, lr=1.5e-4, lr_batch=256, epochs=epochs, warmup=40, weight_decay=0.1, decay_vectors=True, frozen=frozen,
        augment=Augment(crop_scale=(0.08, 1.0), color_jitter=(0.4, 0.4, 0.2)),
        sources=(
            ("all", "MoCo3-repo CONFIG.md, main_moco.py (recipes A13)"),
            ("epochs", {300: "MoCo3-repo CONFIG.md", 600: "MoCo3-paper 6.2"}.get(epochs, "ours")),
        ),
    )


def dino_pretraining(vit: ViTConfig, by: str, epochs: int, frozen: tuple[str, ...]) -> Recipe | None:
    """DINO-repo main_dino.py (recipes A14): its defaults for ViT-S/16 and ViT-B/16 ("repo"), or what the released ViT-B/16 was trained with.

    lr x batch / 256; weight decay rises in half a cosine; each tensor's gradient is clipped by itself; class token and positions are decayed.
    """
    released = by == "vit-b16"
    if vit.paper_size != "B/16" and (released or vit.paper_size != "S/16"):
        return None
    told = (("lr, clip, augment.crop_scale", "DINO-repo, arguments of the released ViT-B/16, recalled and not verified (recipes A14)"),
            ("epochs", "BEiT-paper Table 10, 400 epochs")) if released else ()
    return Recipe(
        batch=1024, lr=7.5e-4 if released else 5e-4, lr_batch=256, epochs=epochs, warmup=10, min_lr=1e-6, schedule="cosine-stepwise",
        weight_decay=0.04, weight_decay_end=0.4, clip=0.3 if released else 3.0, clip_mode="tensor", drop_path=0.1, frozen=frozen,
        augment=Augment(crop_scale=(0.25, 1.0) if released else (0.4, 1.0), color_jitter=(0.4, 0.4, 0.2)),
        sources=(*told, ("all", "DINO-repo main_dino.py (recipes A14)")),
    )


def deit(vit: ViTConfig) -> Recipe | None:
    """DeiT-paper Table 9, DeiT-B (recipes A5), and by DeiT-repo README_deit.md DeiT-S alike: lr 5e-4 x batch / 512, erasing, repeated augmentation.

    The reported accuracy is the raw model's, so there is no EMA here. timm's scheduler moves once an epoch and its cosine runs from epoch 0; ours moves each
    step and runs from the end of the warm-up.
    """
    if vit.paper_size not in ("S/16", "B/16"):
        return None
    small = vit.paper_size == "S/16"
    told = "DeiT-repo README_deit.md, DeiT-small: main.py's defaults" if small else "DeiT-paper Table 9, DeiT-B; DeiT-repo main.py (recipes A5)"
    return Recipe(
        batch=1024, lr=5e-4, lr_batch=512, epochs=300, warmup=5, warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.05, no_decay=NO_DECAY, frozen=fixed(vit),
        drop_path=0.1,
        augment=Augment(crop_scale=(0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25, repeats=3),
        sources=(
            ("all", told), ("schedule", "ours: per step, cosine after the warm-up"), INFERRED_CROP,
        ),
    )


def as_evaluated(name: str, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
    """The recipe of an evaluator, for a method that trains as it does: a table stands once, in `evals.recipes`, which is reached as any plugin is."""
    recipe: Recipe | None = plugins.build("evals", name).recipe(protocol, vit)
    return recipe
