"""MAE-paper Table 3: top-1 on ImageNet-1K by fine-tuning, ViT-B/16, L/16 and H/14, and H/14 at 448 pixels.

    python -m harness run --plan results/mae-table3/plan.py --data DIR

DIR holds imagenet and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected (B, L, H): scratch 82.3, 82.6, 83.1; DINO 82.8; MoCo v3 83.2, 84.1; BEiT 83.2, 85.2; MAE 83.6, 85.9, 86.9, at 448 pixels 87.8 (its recipe was
never published: ours). BEiT has no recipe for ViT-H.

Cost: 2.3e21 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("mae-table3",)


def plan() -> tuple[Request, ...]:
    """A request for each backbone, and one for the column at 448 pixels."""
    return (
        *(Request(("scratch", "moco-v3", "beit", "mae@1600"), ("imagenet",), "paper", size) for size in ("vit-b16", "vit-l16")),
        Request(("dino",), ("imagenet",), "paper", "vit-b16"),
        Request(("scratch", "mae@1600"), ("imagenet",), "paper", "vit-h14"),
        Request(("mae@1600",), ("imagenet@448",), "paper", "vit-h14"),
    )
