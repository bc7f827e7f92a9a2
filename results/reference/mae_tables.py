"""Tables of the MAE paper (arXiv 2111.06377) as it arranges them."""

from __future__ import annotations

from results.reference.paper_table import Column, PaperTable, Pick, Row

B, L, H = {"backbone": "ViT-B/16"}, {"backbone": "ViT-L/16"}, {"backbone": "ViT-H/14"}
TUNED, PROBED = Column("ft", {"eval": "IN1K-ft-224"}), Column("lin", {"eval": "IN1K-linear"})


def ablation(table: str, title: str, stub: tuple[str, ...], rows: tuple[tuple[str, ...], ...], *more: Column) -> PaperTable:
    """A part of Table 1: variant, label and texts of each row; top-1 by fine-tuning and by linear probing."""
    made = tuple(Row(label, {"variant": variant}, tuple(texts)) for variant, label, *texts in rows)
    return PaperTable("MAE", table, f"{title}; ViT-L/16, 800 epochs; top-1 on ImageNet-1K", (TUNED, PROBED, *more), made, stub)


TABLE_1A = ablation("1a", "decoder depth", ("blocks",), tuple((f"dec-depth-{n}", n) for n in ("1", "2", "4", "8", "12")))
TABLE_1B = ablation("1b", "decoder width", ("dim",), tuple((f"dec-width-{n}", n) for n in ("128", "256", "512", "768", "1024")))
TABLE_1C = ablation(
    "1c", "mask token in the encoder", ("case",),
    (("encoder-with-mask-token", "encoder with [M]"), ("encoder-without-mask-token", "encoder without [M]")), Column("FLOPs", {"metric": "FLOPs-x"}),
)
TABLE_1D = ablation("1d", "reconstruction target", ("case",), (
    ("target-pixel-no-norm", "pixel (without norm)"), ("target-pixel-norm", "pixel (with norm)"), ("target-PCA96", "PCA"),
    ("target-dVAE-token", "dVAE token"),
))
TABLE_1E = ablation("1e", "data augmentation", ("case",), (
    ("aug-none", "none (centre crop, no flip)"), ("aug-crop-fixed-size", "crop, fixed size"), ("aug-crop-rand-size", "crop, random size"),
    ("aug-crop+colorjit", "crop + colour jitter"),
))
TABLE_1F = ablation("1f", "mask sampling", ("case", "ratio"), (
    ("mask-random-75", "random", "75"), ("mask-block-50", "block", "50"), ("mask-block-75", "block", "75"), ("mask-grid-75", "grid", "75"),
))
TABLE_2 = PaperTable(
    "MAE", "2", "wall-clock time of 800 epochs on 128 TPU-v3 cores, and top-1 on ImageNet-1K",
    (TUNED, Column("hours", {"metric": "hours"}), Column("speed-up", {"metric": "speedup-x"})), (
        Row("ViT-L, with [M]", {"variant": "with-M-dec8", **L}, ("8",), cells={"ft": {"table": "1c", "variant": "encoder-with-mask-token"}}),
        Row("ViT-L", {"variant": "dec8", **L}, ("8",), cells={"ft": {"table": "1a", "variant": "dec-depth-8"}}),
        Row("ViT-L", {"variant": "dec1", **L}, ("1",), cells={"ft": {"table": "1a", "variant": "dec-depth-1"}}),
        Row("ViT-H, with [M]", {"variant": "with-M-dec8-estimated", **H}, ("8",)),
        Row("ViT-H", {"variant": "dec8", **H}, ("8",)),
        Row("ViT-H", {"variant": "dec1", **H}, ("1",)),
    ), ("encoder", "decoder depth"),
)
SIZES = (Column("ViT-B", B), Column("ViT-L", L), Column("ViT-H", H))


def at(evaluation: str, size: Pick) -> Pick:
    """Numbers of an evaluation with a backbone."""
    return {"eval": evaluation, **size}


TABLE_3 = PaperTable(
    "MAE", "3", "top-1 on ImageNet-1K by fine-tuning, ours and previous methods", (*SIZES, Column("ViT-H448", {"eval": "IN1K-ft-448"})), (
        Row("scratch", {"method": "scratch", "eval": "IN1K-224"}, ("-",)),
        Row("DINO", {"method": "DINO"}, ("IN1K",)),
        Row("MoCo v3", {"method": "MoCo-v3"}, ("IN1K",)),
        Row("BEiT", {"method": "BEiT"}, ("IN1K + DALL-E",)),
        Row("MAE", {"method": "MAE", "eval": "IN1K-ft-224"}, ("IN1K",)),
    ), ("method", "pre-train data"),
)
TRANSFERRED = (
    Row("supervised", {"method": "supervised"}, ("IN1K with labels",)),
    Row("MoCo v3", {"method": "MoCo-v3"}, ("IN1K",)),
    Row("BEiT", {"method": "BEiT"}, ("IN1K + DALL-E",)),
    Row("MAE", {"method": "MAE"}, ("IN1K",)),
)
TABLE_4 = PaperTable(
    "MAE", "4", "detection and instance segmentation on COCO, Mask R-CNN", (
        Column("AP box ViT-B", {"metric": "APbox", **B}), Column("AP box ViT-L", {"metric": "APbox", **L}),
        Column("AP mask ViT-B", {"metric": "APmask", **B}), Column("AP mask ViT-L", {"metric": "APmask", **L}),
    ), TRANSFERRED, ("method", "pre-train data"),
)
TABLE_5 = PaperTable("MAE", "5", "semantic segmentation on ADE20K, UperNet, mIoU", SIZES[:2], TRANSFERRED, ("method", "pre-train data"))


def transfer_set(label: str, evaluation: str, best_before: str) -> Row:
    """A data set of Table 6; the 448-pixel column has an evaluation of its own."""
    return Row(label, {"eval": evaluation}, cells={"ViT-H448": {"eval": f"{evaluation}-448"}}, aside=(best_before,))


TABLE_6 = PaperTable(
    "MAE", "6", "top-1 by fine-tuning on other classification sets", (*SIZES, Column("ViT-H448", H)), (
        transfer_set("iNat 2017", "iNat2017-ft", "75.4"), transfer_set("iNat 2018", "iNat2018-ft", "81.2"), transfer_set("iNat 2019", "iNat2019-ft", "84.1"),
        transfer_set("Places205", "Places205-ft", "66.0"), transfer_set("Places365", "Places365-ft", "58.0"),
    ), ("data set",), ("previous best",),
)
TABLE_7 = PaperTable(
    "MAE", "7", "pixels against tokens as target: top-1 on ImageNet-1K, box AP on COCO, mIoU on ADE20K", (
        *(Column(f"IN1K {c.heading}", at("IN1K-ft-224", c.pick)) for c in SIZES), *(Column(f"COCO {c.heading}", at("COCO-Li21", c.pick)) for c in SIZES[:2]),
        *(Column(f"ADE20K {c.heading}", at("ADE20K-UperNet-MAEproto", c.pick)) for c in SIZES[:2]),
    ), (
        Row("pixel (without norm)", {"variant": "pixel-no-norm"}), Row("pixel (with norm)", {"variant": "pixel-norm"}),
        Row("dVAE token", {"variant": "dVAE-token"}),
    ), ("target",),
)
TABLE_12 = PaperTable(
    "MAE", "12", "linear probing on ImageNet-1K", (Column("acc", {"metric": "top1"}),), (
        Row("iGPT", {"method": "iGPT", "backbone": "iGPT-L"}, ("iGPT-L",)), Row("iGPT", {"method": "iGPT", "backbone": "iGPT-XL"}, ("iGPT-XL",)),
        Row("BEiT", {"method": "BEiT"}, ("ViT-L",)),
        Row("MAE", {"method": "MAE", **B}, ("ViT-B",)), Row("MAE", {"method": "MAE", **L}, ("ViT-L",)), Row("MAE", {"method": "MAE", **H}, ("ViT-H",)),
    ), ("method", "model"),
)


def robustness(label: str, evaluation: str, method: str, best_before: str = "", section: str = "") -> Row:
    """A data set of Table 13, for MAE or for the supervised training of its authors (which has no 448-pixel column)."""
    larger: dict[str, Pick] = {"ViT-H448": {"eval": f"{evaluation}-448"}} if method == "MAE" else {}
    return Row(label, {"eval": evaluation, "method": method}, (), section, larger, (best_before,))


ROBUSTNESS = (("IN-Corruption (mCE, lower is better)", "IN-C", "42.5"), ("IN-Adversarial", "IN-A", "35.8"), ("IN-Rendition", "IN-R", "48.7"),
              ("IN-Sketch", "IN-Sketch", "36.0"))
TABLE_13 = PaperTable(
    "MAE", "13", "robustness: fine-tuned on ImageNet-1K, scored on its variants without training", (*SIZES, Column("ViT-H448", {"eval": "none", **H})), (
        *(robustness(label, name, "MAE", before, "MAE" if name == "IN-C" else "") for label, name, before in ROBUSTNESS),
        *(robustness(label, name, "scratch", "", "supervised training of the authors" if name == "IN-C" else "") for label, name, _ in ROBUSTNESS),
    ), ("data set",), ("previous best",),
)
TABLES = (TABLE_1A, TABLE_1B, TABLE_1C, TABLE_1D, TABLE_1E, TABLE_1F, TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLE_6, TABLE_7, TABLE_12, TABLE_13)
