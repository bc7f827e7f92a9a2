"""The papers' recipes for training a classifier on a pre-trained ViT, by its size, each with its table and row. None where no source has one.

What a source leaves open, and what was never published, is named "ours" in `Recipe.sources`. Over budget by a few lines: one table, read in one piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from harness.spec import Augment, Recipe

POLICY = "rand-m9-mstd0.5-inc1"
NO_DECAY = ("vit.pos_embed", "vit.cls_token")  # MAE's and BEiT's fine-tuning (recipes A2, A7); vectors are exempt anyway
CROP = ("augment.crop_scale", "timm's default (recipes A2)")
SIZES = ("B/16", "L/16", "H/14")


def augmentation(erasing: float = 0.0, repeats: int = 1, mixup: float = 0.8, cutmix: float = 1.0) -> Augment:
    """RandAugment (9, 0.5), mixup 0.8, cutmix 1.0, smoothing 0.1: MAE-paper Table 9, BEiT-paper Table 13, DeiT-paper Table 9 (recipes A2, A5, A7)."""
    return Augment(crop_scale=(0.08, 1.0), rand_augment=POLICY, erasing=erasing, mixup=mixup, cutmix=cutmix, smoothing=0.1, repeats=repeats)


def fine_tuning(batch: int, lr: float, epochs: int, sources: tuple[tuple[str, str], ...], **more: Any) -> Recipe:
    """What all of them share: AdamW (0.9, 0.999), cosine, class token and positions not decayed."""
    return Recipe(batch=batch, lr=lr, epochs=epochs, no_decay=NO_DECAY, sources=(*sources, CROP), **more)


def mae(size: str) -> Recipe | None:
    """MAE-repo FINETUNE.md, the released models (normalised pixels, 1600 epochs), rows B, L, H (recipes A2): mean of the patches, erasing 0.25."""
    if size not in SIZES:
        return None
    base = size == "B/16"
    return fine_tuning(
        1024, 5e-4 if base else 1e-3, 100 if base else 50, (("all", f"MAE-repo FINETUNE.md, ViT-{size[0]} (recipes A2)"),),
        lr_batch=256, warmup=5, min_lr=1e-6, weight_decay=0.05, layer_decay=0.65 if base else 0.75,
        drop_path={"B/16": 0.1, "L/16": 0.2, "H/14": 0.3}[size], augment=augmentation(0.25),
    )


def mae_table_9(size: str) -> Recipe | None:
    """MAE-paper Table 9, all rows, B, L, H (recipes A2): the ablations' setting (plain pixels), class token, no erasing."""
    if size not in SIZES:
        return None
    return fine_tuning(
        1024, 1e-3, 100 if size == "B/16" else 50, (("all", "MAE-paper Table 9 (recipes A2)"), ("min_lr", "MAE-repo FINETUNE.md (recipes A2)")),
        lr_batch=256, warmup=5, min_lr=1e-6, weight_decay=0.05, layer_decay=0.75, drop_path=0.2 if size == "H/14" else 0.1, augment=augmentation(),
    )


def scratch(size: str) -> Recipe | None:
    """MAE-paper Table 11 and A.2, ViT-B and ViT-L/H, training from scratch (recipes A5): lr 1e-4 x batch / 256, decay 0.3, EMA 0.9999 reported."""
    if size not in SIZES:
        return None
    base = size == "B/16"
    return fine_tuning(
        4096, 1e-4, 300 if base else 200,
        (("all", f"MAE-paper Table 11, {'ViT-B' if base else 'ViT-L/H'} (recipes A5)"), ("no_decay", "MAE-repo main_finetune.py (recipes A2, A5)"),
         ("min_lr", "ours: 0; Table 11 gives none"), ("pooling", "ours: the class token, which Table 9 reads; Table 11 does not say")),
        lr_batch=256, warmup=20, betas=(0.9, 0.95), weight_decay=0.3, drop_path=0.1 if base else 0.2, ema=0.9999, augment=augmentation(),
    )


def mae_448(size: str) -> Recipe | None:
    """Ours: MAE-paper 4.2 and Table 3 have ViT-H at 448 pixels (87.8) without a recipe. FINETUNE.md's of the same size is taken (recipes A2)."""
    recipe = mae(size)
    if recipe is None:
        return None
    return dataclasses.replace(recipe, sources=(("all", "ours: FINETUNE.md's at 224 pixels; for 448 none was ever published (recipes A2)"), CROP))


def mae_transfer(size: str) -> Recipe | None:
    """MAE-paper A.5 on iNaturalist and Places: Table 9, with lr and epochs adjusted for each set to values never published. Ours: Table 9's own."""
    recipe = mae_table_9(size)
    if recipe is None:
        return None
    return dataclasses.replace(recipe, sources=(
        ("all", "MAE-paper A.5: the setting of Table 9 (recipes A11)"),
        ("lr, epochs", "ours: Table 9's; the values adjusted for each set were never published (recipes A11)"), ("min_lr", "MAE-repo FINETUNE.md"), CROP,
    ))


def beit(size: str) -> Recipe | None:
    """BEiT-paper Table 13, ImageNet columns Base and Large (recipes A7): lr absolute and swept over 2e-3 to 5e-3, of which we take one."""
    if size not in ("B/16", "L/16"):
        return None
    base = size == "B/16"
    return fine_tuning(
        1024, 4e-3 if base else 2e-3, 100 if base else 50,
        (("all", f"BEiT-paper Table 13, ImageNet, {'Base' if base else 'Large'} (recipes A7)"),
         ("lr", "ours: one of the paper's sweep of 2e-3 to 5e-3"), ("augment.repeats", "three views: DeiT's sampler (recipes A5, A7)")),
        warmup=20 if base else 5, min_lr=1e-6, schedule="cosine-stepwise", weight_decay=0.05, layer_decay=0.65 if base else 0.75, drop_path=0.1,
        augment=augmentation(0.25, repeats=3 if base else 1),
    )


def beit_repo(size: str) -> Recipe | None:
    """BEiT-repo README, fine-tuning from pt22k, base and large (recipes A7): no repeated augmentation, drop path 0.2 for large."""
    if size not in ("B/16", "L/16"):
        return None
    base = size == "B/16"
    return fine_tuning(
        1024, 4e-3 if base else 1e-3, 100 if base else 50, (("all", f"BEiT-repo README, {'base' if base else 'large'} from pt22k (recipes A7)"),),
        warmup=20 if base else 5, min_lr=1e-6, schedule="cosine-stepwise", weight_decay=0.05, layer_decay=0.65 if base else 0.75,
        drop_path=0.1 if base else 0.2, augment=augmentation(0.25),
    )


def beit_from_22k(size: str) -> Recipe | None:
    """BEiT-repo README, fine-tuning from pt22k_ft22k, base and large (recipes A7): 30 epochs, lr 2e-5 absolute, neither mixup nor cutmix."""
    if size not in ("B/16", "L/16"):
        return None
    base = size == "B/16"
    return fine_tuning(
        512, 2e-5, 30, (("all", f"BEiT-repo README, {'base' if base else 'large'} from pt22k_ft22k (recipes A7)"),),
        warmup=5, min_lr=1e-6, schedule="cosine-stepwise", weight_decay=1e-8, layer_decay=0.85 if base else 0.9, drop_path=0.1 if base else 0.4,
        augment=augmentation(0.25, mixup=0.0, cutmix=0.0),
    )


def deit_384(size: str) -> Recipe | None:
    """DeiT-repo README_deit.md, 224 to 384 pixels, ViT-B (recipes A5): 30 epochs at batch 512 with lr 5e-6 throughout, after the training at 224."""
    if size != "B/16":
        return None
    return fine_tuning(
        512, 5e-6, 30,
        (("all", "DeiT-repo README_deit.md, 224 to 384 (recipes A5)"),
         ("warmup, warmup_lr, drop_path, augment", "DeiT-repo main.py's defaults, which that command leaves (recipes A5)")),
        lr_batch=512, warmup=5, warmup_lr=1e-6, min_lr=5e-6, weight_decay=1e-8, drop_path=0.1, augment=augmentation(0.25, repeats=3),
    )


def beit_384(size: str) -> Recipe | None:
    """BEiT-paper 3.1 and Table 1: ten more epochs at 384 pixels after the fine-tuning at 224, in DeiT's high-resolution setting (recipes A5, A7)."""
    deits = deit_384("B/16")
    if size not in ("B/16", "L/16") or deits is None:
        return None
    return dataclasses.replace(deits, epochs=10, sources=(("epochs", "BEiT-paper: 10 more epochs (recipes A7)"), *deits.sources))


HEAD = ("head", "inferred: as timm's, 0.02, which DeiT's code leaves")


def inat_dino(size: str) -> Recipe | None:
    """DINO's transfer to iNaturalist 2018 and 2019, ViT-B (DINO-repo issue #171; recipes A11): 300 epochs, lr 5e-5 before scaling, erasing 0.25."""
    if size != "B/16":
        return None
    return fine_tuning(
        1024, 5e-5, 300,
        (HEAD, ("all, augment.erasing", "DINO-repo issue #171 (recipes A11)"), ("batch", "ours: that issue's 128 a GPU, on eight"),
         ("lr_batch", "ours: DeiT's code scales a given lr so"),
         ("warmup, warmup_lr, min_lr, weight_decay, drop_path, augment", "DeiT-paper Table 9, which the issue leaves (recipes A5)")),
        lr_batch=512, warmup=5, warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.05, drop_path=0.1, augment=augmentation(0.25, repeats=3),
    )


def inat_deit(size: str) -> Recipe | None:
    """DeiT's transfer to iNaturalist 2018 and 2019, ViT-B (DeiT issues #105 and #141; recipes A11): 360 epochs, lr 7.5e-5 after scaling."""
    if size != "B/16":
        return None
    return fine_tuning(
        768, 7.5e-5, 360,
        (HEAD, ("all", "DeiT-repo issues #105 and #141 (recipes A11)"),
         ("warmup, warmup_lr, min_lr, augment.rand_augment, augment.smoothing", "DeiT-paper Table 9 (recipes A5)")),
        warmup=5, warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.05, drop_path=0.1, augment=augmentation(0.1, repeats=3),
    )


def cifar_beit(size: str) -> Recipe | None:
    """BEiT-paper Table 13, CIFAR-100, Base (recipes A7): 150 epochs at batch 512, weight decay 0.3, no erasing."""
    if size != "B/16":
        return None
    return fine_tuning(
        512, 4e-3, 150,
        (("all", "BEiT-paper Table 13, CIFAR-100, Base (recipes A7)"), ("lr", "ours: one of the paper's sweep of 2e-3 to 5e-3"),
         ("augment.repeats", "three views: DeiT's sampler (recipes A5, A7)")),
        warmup=20, min_lr=1e-6, schedule="cosine-stepwise", weight_decay=0.3, layer_decay=0.65, drop_path=0.1, augment=augmentation(repeats=3),
    )


def mocov3(size: str) -> Recipe | None:
    """MoCo3-paper Table 5, ViT-B 150 epochs, ViT-L 100 with drop path 0.5 (recipes A13), with DeiT's code: the rest, and ViT-S, is DeiT-paper Table 9."""
    recipe, epochs = inat_dino("B/16"), {"S/16-12h": 300, "B/16": 150, "L/16": 100}.get(size)
    if epochs is None or recipe is None:
        return None
    length = "inferred: DeiT's default, MoCo3-repo README names another for ViT-B alone" if epochs == 300 else "MoCo3-paper Table 5 (recipes A13)"
    told = (("epochs", length), ("drop_path", "MoCo3-paper Table 5 (recipes A13)"), HEAD, ("all", "DeiT-paper Table 9 and DeiT's code (recipes A5)"))
    return dataclasses.replace(recipe, lr=5e-4, epochs=epochs, drop_path=0.5 if size == "L/16" else 0.1, sources=(*told, CROP))


def dino(size: str) -> Recipe | None:
    """DINO's fine-tuning on ImageNet, ViT-S and ViT-B (DINO-repo issue #31): DeiT's code and augmentation, lr 5e-4 before scaling, a head that starts small."""
    recipe = inat_dino("B/16")
    if size not in ("S/16", "B/16") or recipe is None:
        return None
    told = (("lr, batch, augment", "DINO-repo issue #31, an author"), ("epochs", "inferred: DeiT's default; the issue names no other"),
            ("head", "ours: as MAE's and BEiT's; how much smaller than DeiT's is not known here"), ("all", "DeiT-paper Table 9 and DeiT's code (recipes A5)"))
    return dataclasses.replace(recipe, lr=5e-4, sources=(*told, CROP))


def cifar_mocov3(size: str) -> Recipe | None:
    """MoCo3-repo transfer/README.md, CIFAR-100, ViT-B (recipes A11): DeiT's code, 100 epochs, mixup 0.5."""
    if size != "B/16":
        return None
    return fine_tuning(
        1024, 3e-4, 100,
        (HEAD, ("all", "MoCo3-repo transfer/README.md (recipes A11)"), ("lr_batch", "ours: DeiT's code scales a given lr so"),
         ("warmup_lr, min_lr, augment.rand_augment, augment.smoothing", "DeiT-paper Table 9 (recipes A5)")),
        lr_batch=512, warmup=3, warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.1, drop_path=0.1, augment=augmentation(mixup=0.5),
    )


def cifar_dino(size: str) -> Recipe | None:
    """DINO-repo issue #144, CIFAR-100, ViT-B (recipes A11): DeiT's code, 1000 epochs at batch 768."""
    if size != "B/16":
        return None
    return fine_tuning(
        768, 5e-6, 1000,
        (HEAD, ("all, augment.repeats", "DINO-repo issue #144 (recipes A11)"), ("lr_batch", "ours: DeiT's code scales a given lr so"),
         ("min_lr", "ours: 0; the 1e-5 of DeiT's code lies above this peak"), ("warmup_lr, drop_path, augment", "DeiT-paper Table 9 (recipes A5)")),
        lr_batch=512, warmup=5, warmup_lr=1e-6, weight_decay=0.05, drop_path=0.1, augment=augmentation(0.25, repeats=3),
    )


def scaled_down(family: str) -> Recipe | None:
    """The recipes of the demo and of smoke, for all data sets alike."""
    sources = (
        ("betas, smoothing, weight_decay, layer-wise decay, drop_path's rule", "MAE-paper Table 9 (recipes A2)"),
        ("batch, lr, length, warmup, layer_decay, drop_path, augment", "ours, for a budget of seconds"),
    )
    if family == "demo":
        return Recipe(
            batch=32, lr=3e-3, iterations=80, warmup=8, min_lr=1e-6, weight_decay=0.05, no_decay=NO_DECAY, layer_decay=0.9,
            augment=Augment(crop_scale=(0.4, 1.0), smoothing=0.1), sources=sources,
        )
    if family == "smoke":
        augment = Augment(crop_scale=(0.4, 1.0), rand_augment=POLICY, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
        return Recipe(
            batch=32, lr=1e-3, iterations=16, warmup=2, min_lr=1e-6, weight_decay=0.05, no_decay=NO_DECAY, layer_decay=0.75, drop_path=0.1,
            augment=augment, sources=sources,
        )
    return None


class Published(NamedTuple):
    """A recipe by size, and what its classifier reads: the class token after the final norm, or the mean of the patch tokens. `small_head`: the new head
    starts next to zero (`harness.classifier`), not as timm's does, which is how DeiT's code leaves it, and where nothing is pre-trained."""

    recipe: Callable[[str], Recipe | None]
    pooling: Literal["cls", "mean"]
    small_head: bool = True


PUBLISHED: Mapping[str, Published] = {
    "mae": Published(mae, "mean"), "mae-table9": Published(mae_table_9, "cls"), "mae-448": Published(mae_448, "mean"),
    "mae-transfer": Published(mae_transfer, "cls"), "scratch": Published(scratch, "cls", small_head=False), "beit": Published(beit, "mean"),
    "beit-repo": Published(beit_repo, "mean"), "beit-from-22k": Published(beit_from_22k, "mean"), "beit-384": Published(beit_384, "mean"),
    "deit-384": Published(deit_384, "cls"), "cifar-beit": Published(cifar_beit, "mean"), "dino": Published(dino, "cls"),
    # heads as DeiT's code starts them; DINO's on ImageNet is smaller, by its author's word
    "inat-deit": Published(inat_deit, "cls", small_head=False), "inat-dino": Published(inat_dino, "cls", small_head=False),
    "mocov3": Published(mocov3, "cls", small_head=False), "cifar-mocov3": Published(cifar_mocov3, "cls", small_head=False),
    "cifar-dino": Published(cifar_dino, "cls", small_head=False),
}
