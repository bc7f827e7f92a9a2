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


METHODS: tuple[Counterpart, ...] = (
    Counterpart(("mae@pixels-mask-tokens",), method="MAE", variant="encoder-with-mask-token"),
    Counterpart(("mae@pixels-depth1",), method="MAE", variant="dec-depth-1"),
    Counterpart(("mae@pixels-depth2",), method="MAE", variant="dec-depth-2"),
    Counterpart(("mae@pixels-depth4",), method="MAE", variant="dec-depth-4"),
    Counterpart(("mae@pixels-depth12",), method="MAE", variant="dec-depth-12"),
    Counterpart(("mae@pixels-width128",), method="MAE", variant="dec-width-128"),
    Counterpart(("mae@pixels-width256",), method="MAE", variant="dec-width-256"),
    Counterpart(("mae@pixels-width768",), method="MAE", variant="dec-width-768"),
    Counterpart(("mae@pixels-width1024",), method="MAE", variant="dec-width-1024"),
    Counterpart(("mae@pca",), method="MAE", variant="target-PCA96"),
    Counterpart(("mae@tokens",), method="MAE", variant="*dVAE-token"),
    Counterpart(("mae@pixels-no-aug",), method="MAE", variant="aug-none"),
    Counterpart(("mae@pixels-fixed-crop",), method="MAE", variant="aug-crop-fixed-size"),
    Counterpart(("mae@pixels-jitter",), method="MAE", variant="aug-crop+colorjit"),
    Counterpart(("mae@pixels-block50",), method="MAE", variant="mask-block-50"),
    Counterpart(("mae@pixels-block75",), method="MAE", variant="mask-block-75"),
    Counterpart(("mae@pixels-grid75",), method="MAE", variant="mask-grid-75"),
    Counterpart(("mae@pixels-depth1",), method="MAE", variant="dec1"),
    # what Table 1 prints in each of its parts: the default of the ablations
    *(Counterpart(("mae@pixels",), method="MAE", variant=v) for v in (
        "dec-depth-8", "dec-width-512", "encoder-without-mask-token", "target-pixel-no-norm", "aug-crop-rand-size", "mask-random-75", "mask-ratio-75",
        "schedule", "baseline", "dec8", "pixel-no-norm")),
    Counterpart(("mae",), method="MAE", variant="norm-pix*"),
    Counterpart(("mae",), method="MAE", variant="*pixel-norm"),
    *(Counterpart(("beit",), method="BEiT", variant=v) for v in ("plain-ViT", "plain-ViT-layer*", "default-*", "as-published", "retrained-dVAE-IN1K")),
    Counterpart(("beit@random",), method="BEiT", variant="random-mask"),
    Counterpart(("beit-pixel",), method="BEiT", variant="pixel-target"),
    Counterpart(("beit-pixel@random",), method="BEiT", variant="pixel-target+random-mask"),
    Counterpart(("beit@all",), method="BEiT", variant="recover-100pct"),
    Counterpart(("beit@unmasked",), method="BEiT", variant="no-mask+recover-100pct"),
    Counterpart(("beit@intermediate",), method="BEiT", variant="plain-ViT+interm-IN1K-ft"),
    Counterpart(("beit@layerscale",), method="BEiT", variant="LayerScale"),
    Counterpart(("beit@plus",), method="BEiT", variant="LayerScale+relpos"),
    Counterpart(("beit@plus",), method="BEiT", variant="official-code-rerun"),
    Counterpart(("scratch", "supervised"), method="scratch", variant="MAE-recipe*"),
    Counterpart(("supervised",), method="supervised", variant="MAE-recipe"),
    Counterpart(("supervised@deit",), method="s*", variant="DeiT*"),
    Counterpart(("mocov3",), method="MoCo-v3", variant="default"),
    Counterpart(("dino",), method="DINO", variant="default"),
)
PROBED_OTHERWISE = "probed by MAE's protocol, the published value by another"
EVALUATORS: tuple[Counterpart, ...] = (
    Counterpart(("imagenet",), eval="IN1K-224"),
    Counterpart(("imagenet",), eval="IN1K-ft-224", method="MAE", variant="*norm-pix*"),
    Counterpart(("imagenet",), eval="IN1K-ft-224", method="MAE", variant="*pixel-norm"),
    Counterpart(("imagenet@table9",), eval="IN1K-ft-224", method="MAE",
                near={"imagenet": "fine-tuned by MAE's released recipe (FINETUNE.md), the published value by the paper's Table 9"}),
    Counterpart(("imagenet",), eval="IN1K-ft-224"),
    Counterpart(("imagenet@384",), eval="IN1K*-384"),
    Counterpart(("imagenet@448",), eval="IN1K-ft-448"),
    Counterpart(("linear@beit",), eval="IN1K-linear", paper="BEiT", method="BEiT", near={"linear": PROBED_OTHERWISE}),
    Counterpart(("linear@dino",), eval="IN1K-linear", method="DINO", near={"linear": PROBED_OTHERWISE}),
    Counterpart(("linear@mocov3",), eval="IN1K-linear", method="MoCo-v3", near={"linear": PROBED_OTHERWISE}),
    Counterpart(("linear",), eval="IN1K-linear"),
    Counterpart(("ade20k@setr",), eval="ADE20K-SETRPUP-ss", near={"ade20k": "head UperNet, published with SETR-PUP", "ade20k@beit": "head UperNet, "
                "published with SETR-PUP"}),
    Counterpart(("ade20k@beit",), eval="ADE20K-UperNet-ss", near={"ade20k": "UperNet set up as by MAE, published as by BEiT"}),
    Counterpart(("ade20k",), eval="ADE20K-UperNet-MAEproto"),
    Counterpart(("coco",), eval="COCO-Li21", near={"coco@vitdet": "set up as ViTDet, published as by Li et al. 2021"}),
    Counterpart(("coco@vitdet",), eval="COCO-ViTDet-MRCNN", near={"coco": "set up as by Li et al. 2021, published as ViTDet"}),
    Counterpart(("imagenet-c",), eval="IN-C"), Counterpart(("imagenet-a",), eval="IN-A"), Counterpart(("imagenet-r",), eval="IN-R"),
    Counterpart(("imagenet-sketch",), eval="IN-Sketch"),
    Counterpart(("imagenet-c@448",), eval="IN-C-448"), Counterpart(("imagenet-a@448",), eval="IN-A-448"),
    Counterpart(("imagenet-r@448",), eval="IN-R-448"), Counterpart(("imagenet-sketch@448",), eval="IN-Sketch-448"),
    *(Counterpart((name.lower(),), eval=f"{name}-ft") for name in ("iNat2017", "iNat2018", "iNat2019", "Places205", "Places365")),
    *(Counterpart((f"{name.lower()}@448",), eval=f"{name}-ft-448") for name in ("iNat2017", "iNat2018", "iNat2019", "Places205", "Places365")),
    Counterpart(("cifar100",), eval="CIFAR100-ft-224"), Counterpart(("cifar100@384",), eval="CIFAR100*-384"),
    Counterpart(("knn",), eval="IN1K-knn"),
    *(Counterpart((f"partial@{n}",), eval=f"IN1K-partial-{n}") for n in ("0.5", "1", "2", "4", "6", "12", "18", "24")),
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
