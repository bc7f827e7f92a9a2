"""BEiT-paper Table 9: linear probing on ImageNet-1K, ViT-B/16 and ViT-L/16, each method by its own paper's probe.

    python -m harness run --plan results/beit-table9/plan.py --data DIR

DIR holds imagenet and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected: DINO-B 78.2; MoCo v3-B 76.7 (of 600 epochs: MoCo3-paper 6.2), -L 77.6; BEiT-B 56.7, -L 73.5.
Not run: iGPT-L and iGPT-XL (another architecture; `igpt` is its objective on our ViT).

Cost: 1.4e21 FLOPs of pre-training, counted on one step of each recipe, BEiT's computed (forward and backward, tokenizer included, 2 a product). Probing and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("beit-table9",)


def plan() -> tuple[Request, ...]:
    """`linear` takes each method's own probe; DINO has ViT-B alone, and MoCo v3's ViT-B is that of 600 epochs."""
    return (
        Request(("dino", "moco-v3@600", "beit"), ("linear",), "paper", "vit-b16"),
        Request(("moco-v3", "beit"), ("linear",), "paper", "vit-l16"),
    )
