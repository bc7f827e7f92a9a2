"""The demo protocol on generated data, three seeds: every method, every evaluator that has generated data.

    python -m harness run --plan results/demo/plan.py

Expected: what table.md beside this file has. Cost: 2.5 to 3.6 hours of core time on two cores of an AMD EPYC (README.md).
"""

from harness.request import Request


def plan() -> Request:
    """All rows on one small ViT."""
    return Request(("scratch", "supervised", "beit-pixel", "beit", "mae"), ("imagenet", "linear", "inat2018", "places365", "ade20k", "coco"), seeds=(0, 1, 2))
