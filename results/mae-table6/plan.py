"""MAE-paper Table 6: top-1 on iNaturalist and Places by fine-tuning, ViT-B/16, L/16 and H/14, and H/14 at 448 pixels.

    python -m harness run --plan results/mae-table6/plan.py --data DIR

DIR holds imagenet, inat2017, inat2018, inat2019, places205 and places365. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected (B, L, H, H at 448): iNat 2017 70.5, 75.7, 79.3, 83.4; iNat 2018 75.4, 80.1, 83.0, 86.8; iNat 2019 80.5, 83.4, 85.7, 88.3; Places205 63.9, 65.8,
65.9, 66.8; Places365 57.9, 59.4, 59.8, 60.3. Learning rates and epochs of these sets were never published, nor was a recipe for 448 pixels: ours.

Cost: 9.6e20 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured.
"""

from harness.request import Request

LAYOUTS = ("mae-table6",)
SETS = ("inat2017", "inat2018", "inat2019", "places205", "places365")


def plan() -> tuple[Request, ...]:
    """A request for each backbone, and one for the column at 448 pixels."""
    return (
        *(Request(("mae@1600",), SETS, "paper", size) for size in ("vit-b16", "vit-l16", "vit-h14")),
        Request(("mae@1600",), tuple(f"{name}@448" for name in SETS), "paper", "vit-h14"),
    )
