"""BEiT-paper Table 4: ablations of BEiT, ViT-B/16, on ImageNet-1K and ADE20K (SETR-PUP).

    python -m harness run --plan results/beit-table4/plan.py --data DIR

DIR holds imagenet, ADEChallengeData2016 and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected (top-1, mIoU): 300 epochs 82.86, 44.65; random masks 82.77, 42.93; pixels 81.04, 41.38; pixels and random masks 80.50, 37.09; all tokens
recovered 82.59, 40.93; no masks, all tokens recovered 81.67, 36.73; 800 epochs 83.19, 45.58.

Cost: 5.0e20 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("beit-table4",)


def plan() -> tuple[Request, ...]:
    """One backbone; the last row is the method's default."""
    return (
        Request(
            ("beit@300", "beit@random", "beit@pixels", "beit@pixels-random", "beit@all", "beit@unmasked", "beit"), ("imagenet", "ade20k@setr"),
            "paper", "vit-b16",
        ),
    )
