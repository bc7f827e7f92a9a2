"""MAE-paper Table 1, a to f: ablations of MAE, ViT-L/16, 800 epochs; top-1 on ImageNet-1K by fine-tuning (ft) and by linear probing (lin).

    python -m harness run --plan results/mae-table1/plan.py --data DIR

DIR holds imagenet and dall-e/encoder.pkl. One seed, as in the paper; --seeds 0,1,2 gives a verdict.

Expected (ft, lin), the default 84.9, 73.5:
a, decoder blocks: 1 84.8, 65.5; 2 84.9, 70.0; 4 84.9, 71.9; 12 84.4, 73.3.
b, decoder width: 128 84.9, 69.1; 256 84.8, 71.3; 768 84.4, 73.1; 1024 84.3, 73.1.
c, mask tokens in the encoder: 84.2, 59.6.
d, target: normalised pixels 85.4, 73.9; PCA 84.6, 72.3; tokens 85.3, 71.6.
e, augmentation: none 84.0, 65.7; crop of fixed size 84.7, 73.1; crop and colour jitter 84.3, 71.9.
f, masks: block 50 % 83.9, 72.3; block 75 % 82.8, 63.9; grid 75 % 84.0, 66.0.

Cost: 2.7e21 FLOPs of pre-training, counted on one step of each recipe (forward and backward, tokenizer included, multiply and add = 2). Fine-tuning and
device-hours: not measured. mae@pca was not counted.
"""

from harness.request import Request

LAYOUTS = ("mae-table1a", "mae-table1b", "mae-table1c", "mae-table1d", "mae-table1e", "mae-table1f",)


def plan() -> tuple[Request, ...]:
    """Each part's rows; `mae@pixels` is the default that every part repeats, `mae` the row with normalised pixels."""
    return (
        Request(
            (
                "mae@pixels", *(f"mae@dec-depth-{n}" for n in (1, 2, 4, 12)), *(f"mae@dec-width-{n}" for n in (128, 256, 768, 1024)),
                "mae@encoder-mask-tokens", "mae", "mae@pca", "mae@tokens", "mae@aug-none", "mae@aug-crop-fixed", "mae@aug-crop-jitter",
                "mae@mask-block-50", "mae@mask-block-75", "mae@mask-grid-75",
            ), ("imagenet", "linear"), "paper", "vit-l16",
        ),
    )
