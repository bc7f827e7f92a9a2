"""BEiT-paper Table 1: top-1 on ImageNet-1K by fine-tuning, ViT-B/16 and ViT-L/16 at 224 and 384 pixels.

    python -m harness run --plan results/beit-table1/plan.py --data DIR

DIR holds imagenet and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected: DeiT-B 81.8, DeiT384-B 83.1; MoCo v3-B 83.2, -L 84.1; DINO-B 82.8; BEiT-B 83.2, BEiT384-B 84.6; BEiT-L 85.2, BEiT384-L 86.3.
Not run: ViT384 (its recipe is not in the paper, ImageNet-22K and JFT-300M are no data sets here), iGPT (another architecture; `igpt` is
its objective on our ViT).

Cost: 1.4e21 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("beit-table1",)


def plan() -> tuple[Request, ...]:
    """DeiT and DINO have ViT-B alone; each column at 384 pixels goes on from the model fine-tuned at 224."""
    return (
        Request(("deit",), ("imagenet", "imagenet@deit-384"), "paper", "vit-b16"),
        Request(("moco-v3", "dino"), ("imagenet",), "paper", "vit-b16"),
        Request(("moco-v3",), ("imagenet",), "paper", "vit-l16"),
        *(Request(("beit",), ("imagenet", "imagenet@384"), "paper", size) for size in ("vit-b16", "vit-l16")),
    )
