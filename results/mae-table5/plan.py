"""MAE-paper Table 5: mIoU on ADE20K, UperNet, ViT-B/16 and L/16.

    python -m harness run --plan results/mae-table5/plan.py --data DIR

DIR holds imagenet, ADEChallengeData2016 and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected (B, L): supervised 47.4, 49.9; MoCo v3 47.3, 49.1; BEiT 47.1, 53.3; MAE 48.1, 53.6.
The paper does not say which supervised weights it used: those of its own recipe are taken. BEiT as in its Table 4.

Cost: 1.6e21 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("mae-table5",)


def plan() -> tuple[Request, ...]:
    """A request for each backbone."""
    return (
        *(Request(("supervised", "moco-v3", "beit@plus", "mae@1600"), ("ade20k",), "paper", size) for size in ("vit-b16", "vit-l16")),
    )
