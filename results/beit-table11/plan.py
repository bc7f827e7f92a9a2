"""BEiT-paper Table 11: top-1 on CIFAR-100 by fine-tuning, ViT-B/16.

    python -m harness run --plan results/beit-table11/plan.py --data DIR

DIR holds imagenet, cifar-100-python and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected: DeiT-B 90.8; DINO-B 91.7; MoCo v3-B 87.1; BEiT-B 90.1; with intermediate fine-tuning 91.8.
Not run: ViT384 (no recipe in the paper).

Cost: 5.7e20 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("beit-table11",)


def plan() -> tuple[Request, ...]:
    """DeiT's CIFAR-100 recipe is the one that DINO's authors give for it."""
    return (
        Request(("deit", "dino"), ("cifar100@dino",), "paper", "vit-b16"),
        Request(("moco-v3",), ("cifar100@mocov3",), "paper", "vit-b16"),
        Request(("beit", "beit@intermediate"), ("cifar100",), "paper", "vit-b16"),
    )
