"""Which of our plugins means what a published row means: the one place to adjust when a plugin is added or renamed.

Patterns are fnmatch over the fields of a published row; of several lines that fit, the first counts. A row without a line has no counterpart here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePath

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
MEAN = {"supervised@mean": "reads the mean of the patch tokens; the published model presumably its class token, as MAE-paper Table 9 does"}
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
    Counterpart(("beit-dino",), method="BEiT", variant="BEiT+DINO-multitask"),
    Counterpart((), paper="MAE", method="BEiT", variant="MAE-authors-protocol", near={"beit": WHICH.format("BEiT"), "beit@plus": WHICH.format("BEiT")}),
    Counterpart(("mae", "mae@1600"), method="ViTDet", variant="MAE-1600"),
    # labels
    Counterpart(("scratch",), method="scratch", variant="random-init"),
    *(Counterpart(("scratch", "supervised"), method="scratch", variant=v, near=MEAN) for v in ("MAE-recipe-EMA", "MAE-recipe")),
    Counterpart(("supervised",), method="supervised", variant="MAE-recipe", near=MEAN),
    Counterpart(("deit",), method="scratch", variant="DeiT*"),
    Counterpart(("deit",), method="supervised", variant="DeiT*"),
    *(Counterpart((), paper=paper, method="supervised", variant=v, near=dict.fromkeys(("supervised", "deit"), WHICH.format("supervised weights")))
      for paper, v in (("MAE", ""), ("BEiT", "IN1K"))),
    *(Counterpart(("moco-v3", "moco-v3@600"), method="MoCo-v3", variant=v) for v in ("default", "repo-PT", "paper-TF", "1[05]0ep-ft*")),
    Counterpart(("dino",), method="DINO", variant="default"),
    Counterpart((), method="DINO", variant="vanilla-100ep", near={"dino@repo": "batches of 1024; the README's command gives 512, 64 on each of eight GPUs"}),
    Counterpart(("dino@boosted",), method="DINO", variant="boosted-300ep"),
)
PROBED_OTHERWISE = "probed by MAE's protocol, the published value by another"
EVALUATORS: tuple[Counterpart, ...] = (
    # fine-tuning: `imagenet` takes each method's own recipe; a variant fixes one
    Counterpart(("imagenet", "imagenet@scratch"), eval="IN1K-224", variant="MAE-recipe*"),
    Counterpart(("imagenet",), eval="IN1K-224"),
    *(Counterpart(("imagenet", "imagenet@mae"), eval="IN1K-ft-224", method="MAE", variant=v, near={
        "imagenet@mae-table9": "fine-tuned by Table 9, the published value by the released recipe"}) for v in ("norm-pix*", "*pixel-norm", "*dVAE-token")),
    Counterpart(("imagenet", "imagenet@mae-table9"), eval="IN1K-ft-224", method="MAE",
                near={"imagenet@mae": "fine-tuned by the released recipe, the published value by Table 9"}),
    Counterpart(("imagenet", "imagenet@beit"), eval="IN1K-ft-224", method="BEiT", near={
        "imagenet@beit-repo": "fine-tuned by the released commands, the published value by the paper's Table 13"}),
    Counterpart(("imagenet@mocov3",), eval="IN1K-ft-224", method="MoCo-v3", near={"imagenet": "fine-tuned as by MAE, published as by MoCo v3"}),
    Counterpart(("imagenet@dino",), eval="IN1K-ft-224", method="DINO", near={"imagenet": "fine-tuned as by MAE, published as by DINO"}),
    Counterpart(("imagenet",), eval="IN1K-ft-224"),
    Counterpart(("imagenet@deit-384",), eval="IN1K*-384", variant="DeiT*", near={"imagenet@384": "10 epochs at 384, as BEiT's; published with DeiT's 30"}),
    Counterpart(("imagenet@384",), eval="IN1K*-384"),
    Counterpart(("imagenet@448",), eval="IN1K-ft-448"),
    *(Counterpart((f"{name.lower()}@{whose}",), paper="DINO", method=method, eval=f"{name}-ft", near={
        name.lower(): f"fine-tuned as by MAE, published as by {by}", f"{name.lower()}@{other}": f"fine-tuned as by {than}, published as by {by}"})
      for name in ("iNat2018", "iNat2019")
      for whose, method, by, other, than in (("dino", "DINO", "DINO", "deit", "DeiT"), ("deit", "supervised", "DeiT", "dino", "DINO"))),
    *(Counterpart((name.lower(),), eval=f"{name}-ft") for name in TRANSFER_SETS),
    *(Counterpart((f"{name.lower()}@448",), eval=f"{name}-ft-448") for name in TRANSFER_SETS),
    Counterpart(("cifar100@dino",), eval="CIFAR100-ft-224", method="DINO"), Counterpart(("cifar100@dino",), eval="CIFAR100-ft-224", method="supervised"),
    Counterpart(("cifar100@mocov3",), eval="CIFAR100-ft-224", method="MoCo-v3"),
    Counterpart(("cifar100",), eval="CIFAR100-ft-224"),
    *(Counterpart((f"partial@{n}",), eval=f"IN1K-partial-{n}") for n in ("0", "0.5", "1", "2", "4", "6", "12", "18", "24")),
    # probes
    Counterpart(("linear@beit",), eval="IN1K-linear", paper="BEiT", method="BEiT", near={
        "linear": PROBED_OTHERWISE, "linear@beit-repo": "probed as BEiT's code does, at the best block; the published value by the paper's App. D"}),
    Counterpart(("linear@dino",), eval="IN1K-linear", method="DINO", near={"linear": PROBED_OTHERWISE}),
    Counterpart(("linear@mocov3",), eval="IN1K-linear", method="MoCo-v3", near={"linear": PROBED_OTHERWISE}),
    Counterpart(("linear",), eval="IN1K-linear"),
    Counterpart(("knn",), eval="IN1K-knn"),
    # dense
    Counterpart(("ade20k@setr",), eval="ADE20K-SETRPUP-ss"), Counterpart(("ade20k@beit",), eval="ADE20K-UperNet-ss"),
    Counterpart(("ade20k@beit-640",), eval="ADE20K-UperNet640-ss"),
    Counterpart(("ade20k", "ade20k@mae"), eval="ADE20K-UperNet-MAEproto", near={
        "ade20k@mae-160k": "160,000 iterations and LayerScale as in the public reproductions, published with 100 epochs"}),
    Counterpart((), eval="COCO-Li21", method="scratch", near=dict.fromkeys(
        ("coco", "coco@li21", "coco@li21-200", "coco@li21-400"), "the published value is the best of 100, 200 and 400 epochs")),
    Counterpart(("coco", "coco@li21"), eval="COCO-Li21"),
    *(Counterpart((f"coco@li21-{n}",), eval=f"COCO-Li21-{n}ep") for n in (25, 50)),
    Counterpart(("coco@vitdet",), eval="COCO-ViTDet-MRCNN"),
    # robustness
    *(Counterpart((ours,), eval=theirs) for ours, theirs in ROBUSTNESS), *(Counterpart((f"{ours}@448",), eval=f"{theirs}-448") for ours, theirs in ROBUSTNESS),
)
# evaluators that score the classifier which a checkpoint brings with it, and the one whose fine-tuned model that classifier stands for
AS_IT_IS: Mapping[str, str] = {"head": "imagenet", **{f"{ours}@head": ours for ours, _ in ROBUSTNESS}}
AS_READ = "as read: "  # how `weights:` begins a note on what a file does not say itself; of a file that is known by name it is no difference


@dataclass(frozen=True)
class Released:
    """A checkpoint that its authors released, known by name alone, and the published rows that it stands for.

    Attributes:
        names: what the file or folder is called, without its suffix: as its authors have it, timm's model, the repository at Hugging Face (fnmatch).
        method, variants, backbone: of the rows (variants by fnmatch).
        data, epochs: of its pre-training; None: not known here. What a row has otherwise is a difference.
        tuned: the rows are about its own classifier (evaluators of AS_IT_IS); otherwise about what is trained on it here.
    """

    names: tuple[str, ...]
    method: str
    variants: tuple[str, ...]
    backbone: str
    data: str
    epochs: int | None
    tuned: bool = False

    def stands_for(self, name: str, row: Published) -> bool:
        """Whether a checkpoint of this name is what a row was measured with, or the same but for length and data."""
        same = (row.method, row.backbone) == (self.method, self.backbone) and any(fnmatchcase(row.variant, v) for v in self.variants)
        return same and any(fnmatchcase(name, n) for n in self.names)

    def differences(self, row: Published, evaluator: str) -> list[str]:
        """What differs from a row that it stands for, by what is known of the release."""
        found = []
        if row.pretrain_data != self.data:
            found.append(f"the released weights are pre-trained on {self.data}, published on {row.pretrain_data}")
        if self.epochs is not None and row.epochs not in (None, self.epochs):
            found.append(f"the released weights are pre-trained for {self.epochs} epochs, published with {row.epochs} epochs")
        if evaluator == "imagenet" and not self.tuned and self.method not in ("MAE", "DINO", "MoCo-v3"):  # the latters' lines of EVALUATORS say it
            found.append("fine-tuned by MAE's recipe, as any checkpoint of unknown origin is, not by that of its method")
        return found


NORMALISED = ("norm-pix*", "*pixel-norm")
SIZES = (("base", "ViT-B/16"), ("large", "ViT-L/16"), ("huge", "ViT-H/14"))
DEIT = ("deit_base_patch16_224-b5f2ef4d", "deit_base_patch16_224.fb_in1k")
DEIT_S = ("deit_small_patch16_224-cd65a155", "deit_small_patch16_224.fb_in1k")
RELEASED: tuple[Released, ...] = (
    # MAE-repo README: the checkpoints of the paper, brought over from TensorFlow; FINETUNE.md: those fine-tuned from them
    *(Released((f"mae_pretrain_vit_{size}", f"vit_{size}_patch1[46]_224.mae", f"vit-mae-{size}"), "MAE", NORMALISED, backbone, "IN1K", 1600)
      for size, backbone in SIZES),
    *(Released((f"mae_finetuned_vit_{size}",), "MAE", NORMALISED, backbone, "IN1K", 1600, tuned=True) for size, backbone in SIZES),
    # BEiT-repo README: with LayerScale and relative bias, on ImageNet-22K alone (recipes A6)
    *(Released((f"beit_{size}_patch16_224_pt22k", f"beit-{size}-patch16-224-pt22k"), "BEiT", ("LayerScale+relpos", "official-code-rerun"), backbone,
               "IN22K+DALLE", 150) for size, backbone in SIZES[:2]),
    # MoCo3-repo README
    Released(("vit-b-300ep*",), "MoCo-v3", ("default", "repo-PT"), "ViT-B/16", "IN1K", 300),
    Released(("vit-s-300ep*",), "MoCo-v3", ("repo-PT",), "ViT-S/16-12h", "IN1K", 300),
    # DINO-repo README
    Released(("dino_vitbase16_pretrain*", "vit_base_patch16_224.dino", "dino-vitb16"), "DINO", ("default",), "ViT-B/16", "IN1K", 400),
    Released(("dino_deitsmall16_pretrain*", "vit_small_patch16_224.dino", "dino-vits16"), "DINO", ("default",), "ViT-S/16", "IN1K", None),
    # DeiT-repo README: its own accuracy, and what was trained on from it
    Released(DEIT, "scratch", ("DeiT",), "ViT-B/16", "none", 300, tuned=True), Released(DEIT_S, "scratch", ("DeiT",), "ViT-S/16", "none", 300, tuned=True),
    Released(DEIT, "supervised", ("DeiT", "DeiT-weights"), "ViT-B/16", "IN1K-labels", 300),
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


def checkpoint_name(method: str) -> str:
    """What the checkpoint of a method `weights:...` is called: its file without the suffix, its folder, or timm's name; "" for other methods."""
    if not method.startswith("weights:"):
        return ""
    path = PurePath(method.removeprefix("weights:"))
    stem = path.stem if path.suffix in (".pth", ".pt", ".bin", ".safetensors") else path.name
    inside = path.parent if stem in ("model", "pytorch_model") else path  # the file in a folder of transformers or timm
    cached = [part for part in inside.parts if part.startswith("models--")]  # Hugging Face's cache: models--ORGANISATION--NAME/snapshots/COMMIT
    return cached[-1].rpartition("--")[2] if cached else inside.name if inside is not path else stem


def released(method: str, evaluator: str, row: Published) -> Released | None:
    """The release that a method is by its name, when a row is about it and about what the evaluator does with it."""
    name, tuned = checkpoint_name(method), evaluator in AS_IT_IS
    return next((r for r in RELEASED if r.tuned == tuned and r.stands_for(name, row)), None)


def counterpart(lines: tuple[Counterpart, ...], row: Published) -> Counterpart | None:
    """The first line that is about a row."""
    return next((line for line in lines if line.fits(row)), None)
