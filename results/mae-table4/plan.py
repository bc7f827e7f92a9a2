"""MAE-paper Table 4: AP on COCO, Mask R-CNN as in Li et al. 2021, ViT-B/16 and L/16.

    python -m harness run --plan results/mae-table4/plan.py --data DIR

DIR holds imagenet, coco and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected (box B, L; mask B, L): supervised 47.9, 49.3; 42.9, 43.9; MoCo v3 47.9, 49.3; 42.7, 44.0;
BEiT 49.8, 53.3; 44.4, 47.1; MAE 50.3, 53.3; 44.9, 47.2.
BEiT is the one that MAE's authors re-trained (relative bias, LayerScale); supervised is DeiT's for B, MAE's recipe for L.

Cost: 1.6e21 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("mae-table4",)


def plan() -> tuple[Request, ...]:
    """A request for each backbone."""
    return (
        Request(("deit", "moco-v3", "beit@plus", "mae@1600"), ("coco",), "paper", "vit-b16"),
        Request(("supervised", "moco-v3", "beit@plus", "mae@1600"), ("coco",), "paper", "vit-l16"),
    )
