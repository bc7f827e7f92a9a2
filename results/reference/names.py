"""Which of our plugins means what a published row means: the one place to adjust when a plugin is added or renamed.

Patterns are fnmatch over the fields of a published row; of several lines that fit, the first counts. A row without a line has no counterpart here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from results.reference.published import Published

FAMILY = "paper"  # recipes of another family (demo, smoke) are not the papers'
PROTOCOL = "paper"  # the one protocol of the family in which each method has its own ViT and fine-tuning


@dataclass(frozen=True)
class Counterpart:
    """`names` are the plugins that do what the rows do, as NAME or NAME@VARIANT; () for none.

    `near` are plugins that measure the same with one difference, which is named: their number may stand there, with that footnote.
    """

    names: tuple[str, ...]
    paper: str = "*"
    table: str = "*"
    method: str = "*"
    variant: str = "*"
    eval: str = "*"
    near: Mapping[str, str] = field(default_factory=dict)

    def fits(self, row: Published) -> bool:
        """Whether the line is about a row."""
        return row.fits(paper=self.paper, table=self.table, method=self.method, variant=self.variant, eval=self.eval)


TRANSFER_SETS = ("iNat2017", "iNat2018", "iNat2019", "Places205", "Places365")
ROBUSTNESS = (("imagenet-c", "IN-C"), ("imagenet-a", "IN-A"), ("imagenet-r", "IN-R"), ("imagenet-sketch", "IN-Sketch"))
WHICH = "the paper does not say which {} it used"
METHODS: tuple[Counterpart, ...] = (
    # MAE: normalised pixels where nothing else is said; several lengths of one configuration share a line, their epochs are compared
    Counterpart(("mae", "mae@1600"), method="MAE", variant="norm-pix*"),
    Counterpart(("mae", "mae@1600"), method="MAE", variant="*pixel-norm"),
    Counterpart(("mae@tokens", "mae@tokens-1600"), method="MAE", variant="*dVAE-token"),
    # the default of the ablations, which each part of Table 1 prints
    *(Counterpart(("mae@pixels", *(f"mae@pixels-{n}" for n in (100, 200, 400, 1600))), method="MAE", variant=v) for v in (
        "dec-depth-8", "dec-width-512", "encoder-without-mask-token", "target-pixel-no-norm", "aug-crop-rand-size", "mask-random-75", "mask-ratio-75",
        "schedule", "baseline", "dec8", "pixel-no-norm")),
    *(Counterpart((f"mae@dec-depth-{n}",), method="MAE", variant=f"dec-depth-{n}") for n in (1, 2, 4, 12)),
    *(Counterpart((f"mae@dec-width-{n}",), method="MAE", variant=f"dec-width-{n}") for n in (128, 256, 768, 1024)),
    *(Counterpart((f"mae@mask-ratio-{n}",), method="MAE", variant=f"mask-ratio-{n}") for n in (10, 20, 30, 40, 50, 60, 70, 80, 90)),
    *(Counterpart((f"mae@{ours}",), method="MAE", variant=theirs) for ours, theirs in (
        ("dec-depth-1", "dec1"), ("encoder-mask-tokens", "encoder-with-mask-token"), ("pca", "target-PCA96"), ("aug-none", "aug-none"),
        ("aug-crop-fixed", "aug-crop-fixed-size"), ("aug-crop-jitter", "aug-crop+colorjit"), ("mask-block-50", "mask-block-50"),
        ("mask-block-75", "mask-block-75"), ("mask-grid-75", "mask-grid-75"))),
    # BEiT: the plain ViT where nothing else is said
    *(Counterpart(("beit", "beit@300"), method="BEiT", variant=v) for v in ("plain-ViT", "plain-ViT-layer*", "default-*", "as-published",
                                                                           "retrained-dVAE-IN1K")),
    *(Counterpart((f"beit@{ours}",), method="BEiT", variant=theirs) for ours, theirs in (
        ("random", "random-mask"), ("pixels", "pixel-target"), ("pixels-random", "pixel-target+random-mask"), ("all", "recover-100pct"),
        ("unmasked", "no-mask+recover-100pct"), ("intermediate", "plain-ViT+interm-IN1K-ft"), ("layer-scale", "LayerScale"))),
    *(Counterpart(("beit@plus", "beit@plus-300"), method="BEiT", variant=v) for v in ("LayerScale+relpos", "official-code-rerun")),
    Counterpart((), paper="MAE", method="BEiT", variant="MAE-authors-protocol", near={"beit": WHICH.format("BEiT"), "beit@plus": WHICH.format("BEiT")}),
    Counterpart(("mae", "mae@1600"), method="ViTDet", variant="MAE-1600"),
    # labels
    Counterpart(("scratch",), method="scratch", variant="random-init"),
    *(Counterpart(("scratch", "supervised", "supervised@mean"), method="scratch", variant=v) for v in ("MAE-recipe-EMA", "MAE-recipe")),
    Counterpart(("supervised", "supervised@mean"), method="supervised", variant="MAE-recipe"),
    Counterpart(("supervised@deit",), method="scratch", variant="DeiT*"),
    Counterpart(("supervised@deit",), method="supervised", variant="DeiT*"),
    *(Counterpart((), paper=paper, method="supervised", variant=v, near=dict.fromkeys(("supervised", "supervised@deit"), WHICH.format("supervised weights")))
      for paper, v in (("MAE", ""), ("BEiT", "IN1K"))),
    Counterpart(("mocov3",), method="MoCo-v3", variant="default"),
    Counterpart(("dino",), method="DINO", variant="default"),
)
PROBED_OTHERWISE = "probed by MAE's protocol, the published value by another"
SETR = "head UperNet, published with SETR-PUP"
EVALUATORS: tuple[Counterpart, ...] = (
    # fine-tuning: `imagenet` takes each method's own recipe; a variant fixes one
    Counterpart(("imagenet",), eval="IN1K-224"),
    *(Counterpart(("imagenet", "imagenet@mae"), eval="IN1K-ft-224", method="MAE", variant=v, near={
        "imagenet@mae-table9": "fine-tuned by Table 9, the published value by the released recipe"}) for v in ("norm-pix*", "*pixel-norm", "*dVAE-token")),
    Counterpart(("imagenet", "imagenet@mae-table9"), eval="IN1K-ft-224", method="MAE",
                near={"imagenet@mae": "fine-tuned by the released recipe, the published value by Table 9"}),
    Counterpart(("imagenet", "imagenet@beit"), eval="IN1K-ft-224", method="BEiT", near={
        "imagenet@beit-repo": "fine-tuned by the released commands, the published value by the paper's Table 13"}),
    Counterpart(("imagenet",), eval="IN1K-ft-224"),
    Counterpart(("imagenet@384",), eval="IN1K*-384"),
    Counterpart(("imagenet@448",), eval="IN1K-ft-448"),
    *(Counterpart((f"{name.lower()}@deit",), paper="DINO", eval=f"{name}-ft", near={name.lower(): "fine-tuned as by MAE, published as by DeiT"})
      for name in ("iNat2018", "iNat2019")),
    *(Counterpart((name.lower(),), eval=f"{name}-ft") for name in TRANSFER_SETS),
    *(Counterpart((f"{name.lower()}@448",), eval=f"{name}-ft-448") for name in TRANSFER_SETS),
    Counterpart(("cifar100@dino",), eval="CIFAR100-ft-224", method="DINO"), Counterpart(("cifar100@dino",), eval="CIFAR100-ft-224", method="supervised"),
    Counterpart(("cifar100@mocov3",), eval="CIFAR100-ft-224", method="MoCo-v3"), Counterpart(("cifar100",), eval="CIFAR100-ft-224"),
    *(Counterpart((f"partial@{n}",), eval=f"IN1K-partial-{n}") for n in ("0", "0.5", "1", "2", "4", "6", "12", "18", "24")),
    # probes
    Counterpart(("linear@beit",), eval="IN1K-linear", paper="BEiT", method="BEiT", near={"linear": PROBED_OTHERWISE}),
    Counterpart(("linear@dino",), eval="IN1K-linear", method="DINO", near={"linear": PROBED_OTHERWISE}),
    Counterpart(("linear@mocov3",), eval="IN1K-linear", method="MoCo-v3", near={"linear": PROBED_OTHERWISE}),
    Counterpart(("linear",), eval="IN1K-linear"),
    Counterpart(("knn",), eval="IN1K-knn"),
    # dense
    Counterpart(("ade20k@setr",), eval="ADE20K-SETRPUP-ss", near={"ade20k": SETR, "ade20k@beit": SETR}),
    Counterpart(("ade20k@beit",), eval="ADE20K-UperNet-ss", near={"ade20k": "UperNet set up as by MAE, published as by BEiT"}),
    Counterpart(("ade20k",), eval="ADE20K-UperNet-MAEproto"),
    Counterpart((), eval="COCO-Li21", method="scratch", near=dict.fromkeys(
        ("coco", "coco@li21", "coco@li21-200", "coco@li21-400"), "the published value is the best of 100, 200 and 400 epochs")),
    Counterpart(("coco", "coco@li21"), eval="COCO-Li21"),
    *(Counterpart((f"coco@li21-{n}",), eval=f"COCO-Li21-{n}ep") for n in (25, 50)),
    Counterpart(("coco@vitdet",), eval="COCO-ViTDet-MRCNN"),
    # robustness
    *(Counterpart((ours,), eval=theirs) for ours, theirs in ROBUSTNESS), *(Counterpart((f"{ours}@448",), eval=f"{theirs}-448") for ours, theirs in ROBUSTNESS),
)
# patch side, width, blocks, heads of the backbones; others (iGPT, ViT-L/7) have no counterpart
BACKBONES: Mapping[str, tuple[int, int, int, int]] = {
    "ViT-Ti/16": (16, 192, 12, 3), "ViT-S/16": (16, 384, 12, 6), "ViT-S/16-12h": (16, 384, 12, 12), "ViT-B/16": (16, 768, 12, 12),
    "ViT-B/8": (8, 768, 12, 12), "ViT-L/16": (16, 1024, 24, 16), "ViT-H/14": (14, 1280, 32, 16),
}
# images that a complete set has of what is scored (its official split), by the beginning of `eval`
SCORED: Mapping[str, int] = {
    "IN1K": 50_000, "ADE20K": 2_000, "COCO": 5_000, "iNat2017": 95_986, "iNat2018": 24_426, "iNat2019": 3_030, "Places205": 20_500, "Places365": 36_500,
    "CIFAR100": 10_000, "IN-C": 50_000, "IN-A": 7_500, "IN-R": 30_000, "IN-Sketch": 50_889,
}
# papers that a number of a method is taken from first, where several print one
OWN: Mapping[str, tuple[str, ...]] = {
    "MAE": ("MAE", "MAE-repo"), "BEiT": ("BEiT", "BEiT-repo"), "MoCo-v3": ("MoCo3", "MoCo3-repo"), "DINO": ("DINO", "DINO-repo"),
    "scratch": ("MAE", "DeiT-repo"),
}


def counterpart(lines: tuple[Counterpart, ...], row: Published) -> Counterpart | None:
    """The first line that is about a row."""
    return next((line for line in lines if line.fits(row)), None)
