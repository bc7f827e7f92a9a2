"""What the papers and the public reproductions prescribe for ADE20K, each with its source; None for sizes of which none gives it (recipes A9).

Three protocols that must not be mixed: MAE's UperNet, the UperNet of BEiT's released code, and the SETR-PUP decoder of BEiT's paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from harness.spec import Recipe

IMAGES = 20_210  # training images of the official set
WARMUP = 1500  # iterations at batch 16
COMMON = "BEiT-repo semantic_segmentation/configs, common to all (recipes A9)"
REPRODUCED = "MAESeg ViT-B and MMSeg mae-base, 48.1 mIoU (recipes A9)"


def training(lr: float, layer_decay: float, drop_path: float, sources: tuple[tuple[str, str], ...], epochs: float | None = None) -> Recipe:
    """What all have in common: batch 16, AdamW (0.9, 0.999), weight decay 0.05, linear warm-up over 1500 iterations from 1e-6 of the lr, then linearly to 0.

    160,000 iterations unless `epochs` are given. Positions and class token are decayed: BEiT's code exempts them by names that its segmentor does not
    have (recipes A9), and the others go by that code. The decay of the lr begins after the warm-up, as in MMSeg's configurations of today; mmcv 1, on
    which BEiT and MAESeg ran, counts it from the first iteration, so that after the warm-up their lr was 0.99 of this one.
    """
    length: dict[str, Any] = {"iterations": 160_000, "warmup": WARMUP} if epochs is None else {"epochs": epochs, "warmup": WARMUP * 16 / IMAGES}
    return Recipe(
        batch=16, lr=lr, layer_decay=layer_decay, drop_path=drop_path, warmup_lr=lr * 1e-6, schedule="poly", poly_power=1.0, weight_decay=0.05,
        sources=(*sources, ("warmup, warmup_lr, schedule, weight_decay, betas, no_decay", COMMON)), **length,
    )


def mae(size: str) -> Recipe | None:
    """MAE-paper A.4 and Table 5: 100 epochs at batch 16. lr, layer decay and drop path were searched for every entry, never published: ours."""
    if size not in ("B/16", "L/16", "H/14"):
        return None
    base, of = size == "B/16", "ours: searched for every entry of MAE-paper Table 5 and never published; "
    decay, path = (0.65 if base else 0.75), {"B/16": 0.1, "L/16": 0.2, "H/14": 0.3}[size]
    chosen: tuple[tuple[str, str], ...] = (("lr, layer_decay, drop_path", f"{of}those of the public reproductions"),)
    if not base:
        chosen = (("lr", f"{of}that of the public reproductions with ViT-B"),
                  ("layer_decay, drop_path", f"{of}those of the same size in MAE's fine-tuning on ImageNet"))
    told = (("batch, epochs", "MAE-paper A.4 (recipes A9)"), ("crop, single scale", "not stated: BEiT's code, which MAE-paper A.4 follows (recipes A9)"))
    return training(1e-4, decay, path, (*told, *chosen), epochs=100)


def mae_160k(size: str) -> Recipe | None:
    """The public reproductions of MAE's 48.1 with ViT-B."""
    return training(1e-4, 0.65, 0.1, (("lr, layer_decay, drop_path, iterations, batch", REPRODUCED),)) if size == "B/16" else None


def mae_long_seq(size: str) -> Recipe | None:
    """An author of MAE's group on ViT-B, in another paper's setting: a lower lr and a layer decay of 0.8."""
    sources = (("lr, layer_decay, drop_path, iterations, batch", "facebookresearch/long_seq_mae, issue 1 (recipes A9)"),
               ("relative bias", "ours: not stated there, added as MAE's"))
    return training(8e-5, 0.8, 0.1, sources) if size == "B/16" else None


def beit(size: str) -> Recipe | None:
    """BEiT-repo base_512_pt: a ViT that saw no labels. None was released for large."""
    said = "BEiT-repo upernet_beit_base_12_512_slide_160k_ade20k_pt (recipes A9)"
    return training(7e-4, 0.65, 0.1, (("lr, layer_decay, drop_path, iterations, batch", said),)) if size == "B/16" else None


def beit_labelled(size: str) -> Recipe | None:
    """BEiT-repo, _pt2ft at 512 and at 640 pixels: a ViT with intermediate fine-tuning. Large at 640 takes two iterations of 8 images to a step."""
    if size not in ("B/16", "L/16"):
        return None
    base = size == "B/16"
    sources = (("lr, layer_decay, drop_path, iterations, batch", f"BEiT-repo upernet_beit_{'base' if base else 'large'}, _pt2ft (recipes A9)"),)
    return training(3e-5 if base else 2e-5, 0.9 if base else 0.95, 0.1 if base else 0.2, sources)


def setr(size: str) -> Recipe | None:
    """BEiT-paper Tables 3, 4 and 10, ViT-B. Its decoder was not released: SETR's own for a ViT of twelve blocks, as mmsegmentation has it."""
    if size != "B/16":
        return None
    return training(1e-3, 0.65, 0.1, (
        ("lr, layer_decay, drop_path, iterations, batch", "BEiT-paper, ADE20K with SETR-PUP (recipes A9)"),
        ("decoder, auxiliary heads", "ours: BEiT's was not released; mmsegmentation's, on the blocks of SETR-repo SETR_PUP_DeiT_512x512_160k_ade20k"),
    ))


class Published(NamedTuple):
    """A recipe by `ViTConfig.paper_size`, and what else its source has.

    Attributes:
        head: the decoder.
        crop, stride: side of training crops and test windows, and the step between windows, in pixels.
        bias: "kept": a relative position bias where the pre-training had one, copied into each block; "added": a bias of zero for each block
            of a ViT that has none, on top of its absolute positions.
        layer_scale: LayerScale with this value in each block of a ViT that has none, to train; None: none is added.
        positions: how absolute positions are brought to the crop's grid.
    """

    recipe: Callable[[str], Recipe | None]
    head: Literal["upernet", "setr"] = "upernet"
    crop: int = 512
    stride: int = 341
    bias: Literal["kept", "added"] = "kept"
    layer_scale: float | None = None
    positions: Literal["bicubic", "bilinear"] = "bicubic"


PUBLISHED: Mapping[str, Published] = {
    "mae": Published(mae, bias="added"), "mae-160k": Published(mae_160k, bias="added", layer_scale=1.0),
    "mae-long-seq": Published(mae_long_seq, bias="added"), "beit": Published(beit), "beit-pt2ft": Published(beit_labelled),
    "beit-640": Published(beit_labelled, crop=640, stride=426), "setr": Published(setr, head="setr", positions="bilinear"),
}
USUAL = "mae"  # what plain `ade20k` means under the papers' protocols: the one protocol by which a paper compares several methods
