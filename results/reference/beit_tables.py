"""Tables of the BEiT paper (arXiv 2106.08254v2) as it arranges them."""

from __future__ import annotations

from results.reference.paper_table import Column, PaperTable, Row

IMAGENET, ADE20K = {"eval": "IN1K-ft-224"}, {"eval": "ADE20K-SETRPUP-ss"}
B, L = "ViT-B/16", "ViT-L/16"


def model(label: str, method: str, variant: str, backbone: str, section: str = "", **more: object) -> Row:
    """A row of one model."""
    return Row(label, {"method": method, "variant": variant, "backbone": backbone, **more}, (backbone,), section)


TABLE_1 = PaperTable(
    "BEiT", "1", "top-1 on ImageNet-1K by fine-tuning", (Column("ImageNet top-1", {"metric": "top1"}),), (
        Row("ViT384-B", {"variant": "ViT384", "backbone": B, "eval": "IN1K-384"}, (B, "384"), "training from scratch (random initialisation)"),
        Row("ViT384-L", {"variant": "ViT384", "backbone": L, "eval": "IN1K-384"}, (L, "384")),
        Row("DeiT-B", {"variant": "DeiT", "backbone": B}, (B, "224")),
        Row("DeiT384-B", {"variant": "DeiT384", "backbone": B}, (B, "384")),
        Row("ViT384-B", {"variant": "ViT384", "backbone": B, "eval": "IN1K-ft-384"}, (B, "384"), "supervised pre-training on ImageNet-22K"),
        Row("ViT384-L", {"variant": "ViT384", "backbone": L, "eval": "IN1K-ft-384"}, (L, "384")),
        Row("iGPT-1.36B", {"method": "iGPT"}, ("iGPT-L", "224"), "self-supervised pre-training on ImageNet-1K (ViT384-B-JFT300M: on JFT-300M)"),
        Row("ViT384-B-JFT300M", {"method": "masked-patch-pred"}, (B, "384")),
        Row("MoCo v3-B", {"method": "MoCo-v3", "backbone": B}, (B, "224")),
        Row("MoCo v3-L", {"method": "MoCo-v3", "backbone": L}, (L, "224")),
        Row("DINO-B", {"method": "DINO"}, (B, "224")),
        Row("BEiT-B", {"method": "BEiT", "backbone": B, "eval": "IN1K-ft-224"}, (B, "224")),
        Row("BEiT384-B", {"method": "BEiT", "backbone": B, "eval": "IN1K-ft-384"}, (B, "384")),
        Row("BEiT-L", {"method": "BEiT", "backbone": L, "eval": "IN1K-ft-224"}, (L, "224")),
        Row("BEiT384-L", {"method": "BEiT", "backbone": L, "eval": "IN1K-ft-384"}, (L, "384")),
    ), ("model", "backbone", "resolution"),
)
TABLE_3 = PaperTable(
    "BEiT", "3", "semantic segmentation on ADE20K", (Column("ADE20K mIoU", {"metric": "mIoU"}),), (
        Row("supervised pre-training on ImageNet", {"method": "supervised"}),
        Row("DINO", {"method": "DINO"}),
        Row("BEiT", {"variant": "plain-ViT"}),
        Row("BEiT + intermediate fine-tuning", {"variant": "plain-ViT+interm-IN1K-ft"}),
    ), ("model",),
)
TABLE_4 = PaperTable(
    "BEiT", "4", "ablations of BEiT, ViT-B/16", (Column("ImageNet top-1", IMAGENET), Column("ADE20K mIoU", ADE20K)), (
        Row("BEiT (300 epochs)", {"variant": "default-300"}),
        Row("- block-wise masking", {"variant": "random-mask"}),
        Row("- visual tokens (masked pixels are recovered)", {"variant": "pixel-target"}),
        Row("- visual tokens - block-wise masking", {"variant": "pixel-target+random-mask"}),
        Row("+ recover 100 % of visual tokens", {"variant": "recover-100pct"}),
        Row("- masking + recover 100 % of visual tokens", {"variant": "no-mask+recover-100pct"}),
        Row("longer pre-training (800 epochs)", {"variant": "default-800"}),
    ), ("model",),
)
TABLE_5 = PaperTable(
    "BEiT", "5", "architecture of the backbone, ViT-B/16, 300 epochs", (Column("ImageNet top-1", IMAGENET), Column("ADE20K mIoU", {"metric": "mIoU"})), (
        Row("ViT (as in the paper's other tables)", {"variant": "plain-ViT"}),
        Row("ViT + LayerScale", {"variant": "LayerScale"}),
        Row("ViT + LayerScale + relative position bias", {"variant": "LayerScale+relpos"}),
    ), ("architecture",),
)
TABLE_9 = PaperTable(
    "BEiT", "9", "linear probing on ImageNet-1K", (Column("ImageNet top-1", {"metric": "top1"}),), (
        model("DINO-B", "DINO", "default", B, "discriminative self-supervised learning"),
        model("MoCo v3-B", "MoCo-v3", "default", B),
        model("MoCo v3-L", "MoCo-v3", "default", L),
        model("iGPT-L", "iGPT", "MR48-best-layer", "iGPT-L", "generative self-supervised learning"),
        model("iGPT-XL", "iGPT", "MR64-best-layer", "iGPT-XL"),
        model("iGPT-XL (five layers)", "iGPT", "MR64-5layers", "iGPT-XL"),
        model("BEiT-B", "BEiT", "plain-ViT-layer9", B),
        model("BEiT-L", "BEiT", "plain-ViT-layer14", L),
    ), ("method", "backbone"),
)
TABLE_10 = PaperTable(
    "BEiT", "10", "pre-training with BEiT's and DINO's losses together, ViT-B/16", (Column("ImageNet top-1", IMAGENET), Column("ADE20K mIoU", ADE20K)), (
        Row("DINO (400 epochs)", {"method": "DINO"}, cells={"ImageNet top-1": {"table": "1"}}),
        Row("BEiT (300 epochs)", {"table": "4", "variant": "default-300"}),
        Row("BEiT + DINO (300 epochs)", {"variant": "BEiT+DINO-multitask"}),
    ), ("model",),
)
TABLE_11 = PaperTable(
    "BEiT", "11", "CIFAR-100 by fine-tuning", (Column("CIFAR-100 top-1", {"metric": "top1"}),), (
        Row("ViT384-B", {"method": "scratch"}, ("384",), "training from scratch (random initialisation)"),
        Row("ViT384-B", {"method": "supervised", "variant": "ViT384"}, ("384",), "supervised pre-training on ImageNet-1K"),
        Row("DeiT-B", {"method": "supervised", "variant": "DeiT"}, ("224",)),
        Row("DINO-B", {"method": "DINO"}, ("224",), "self-supervised pre-training on ImageNet-1K"),
        Row("MoCo v3-B", {"method": "MoCo-v3"}, ("224",)),
        Row("BEiT-B", {"variant": "plain-ViT"}, ("224",)),
        Row("BEiT-B + intermediate fine-tuning", {"variant": "plain-ViT+interm-IN1K-ft"}, ("224",)),
    ), ("model", "resolution"),
)
TABLES = (TABLE_1, TABLE_3, TABLE_4, TABLE_5, TABLE_9, TABLE_10, TABLE_11)
