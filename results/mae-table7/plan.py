"""MAE-paper Table 7: pixels against tokens as MAE's target; ImageNet-1K by fine-tuning (B, L, H), COCO box AP and ADE20K mIoU (B, L).

    python -m harness run --plan results/mae-table7/plan.py --data DIR

DIR holds imagenet, coco, ADEChallengeData2016 and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected (ImageNet B, L, H; COCO B, L; ADE20K B, L): pixels 83.3, 85.1, 86.2; 49.5, 52.8; 48.0, 51.8; normalised pixels 83.6, 85.9, 86.9; 50.3, 53.3; 48.1,
53.6; tokens 83.6, 85.7, 86.9; 50.3, 53.2; 48.1, 53.4.

Cost: 3.3e21 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("mae-table7",)
TARGETS = ("mae@pixels-1600", "mae@1600", "mae@tokens-1600")


def plan() -> tuple[Request, ...]:
    """A request for each backbone; ViT-H is on ImageNet alone."""
    return (
        *(Request(TARGETS, ("imagenet", "coco", "ade20k"), "paper", size) for size in ("vit-b16", "vit-l16")),
        Request(TARGETS, ("imagenet",), "paper", "vit-h14"),
    )
