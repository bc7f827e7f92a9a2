"""BEiT-paper Table 10: BEiT's and DINO's losses together, ViT-B/16, on ImageNet-1K and ADE20K (SETR-PUP).

    python -m harness run --plan results/beit-table10/plan.py --data DIR

DIR holds imagenet, ADEChallengeData2016 and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected (top-1, mIoU): DINO, 400 epochs 82.8, 44.08; BEiT, 300 epochs 82.86, 44.65; both, 300 epochs 82.9, 46.85.
The paper says nothing of how the two losses were weighed and tuned together: ours (`beit-dino`).

Cost: 5.4e20 FLOPs of pre-training, counted on one step of each recipe, BEiT's computed (forward and backward, tokenizer included, 2 a product), that of both
together as the sum of either's. Fine-tuning and device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("beit-table10",)


def plan() -> tuple[Request, ...]:
    """One backbone."""
    return (Request(("dino", "beit@300", "beit-dino"), ("imagenet", "ade20k@setr"), "paper", "vit-b16"),)
