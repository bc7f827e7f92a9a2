"""The rivals in the papers' tables beside BEiT and MAE, each pre-trained on the demo's ViT on generated data, one seed.

    python -m harness run --plan results/rivals/plan.py

Expected: what table.md beside this file has. Cost: two hours of core time on two cores of an AMD EPYC, and what of results/demo is not there yet
(README.md).
"""

from harness.request import Request


def plan() -> Request:
    """All rows on one small ViT, on the two dense tasks."""
    methods = ("scratch", "supervised", "deit", "deit@distilled", "moco-v3", "dino", "igpt", "beit-pixel", "beit", "beit-dino", "mae")
    return Request(methods, ("ade20k", "coco"))
