"""BEiT-paper Table 3: mIoU on ADE20K, SETR-PUP on ViT-B/16.

    python -m harness run --plan results/beit-table3/plan.py --data DIR

DIR holds imagenet, ADEChallengeData2016 and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected: supervised 45.3; DINO 44.1; BEiT 45.6; with intermediate fine-tuning 47.7.
The paper does not say which supervised weights it used: DeiT's are taken (inferred from its Table 1).

Cost: 4.6e20 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("beit-table3",)


def plan() -> tuple[Request, ...]:
    """One backbone."""
    return (
        Request(("deit", "dino", "beit", "beit@intermediate"), ("ade20k@setr",), "paper", "vit-b16"),
    )
