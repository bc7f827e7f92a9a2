"""The demo protocol on photographs, one seed.

    python -m harness run --plan results/photos/plan.py --data photos

`photos` is the folder of README.md, which has the layouts of ImageNet, ADE20K and COCO.
Expected: what table.md beside this file has. Cost: 34 to 50 minutes of core time on two cores of an AMD EPYC (README.md).
"""

from harness.request import Request


def plan() -> Request:
    """All rows on one small ViT."""
    return Request(("scratch", "supervised", "beit-pixel", "beit", "mae"), ("imagenet", "linear", "ade20k", "coco"), data="photos")
