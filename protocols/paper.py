"""The protocols `paper` and `paper-shared`: ViT-S/16, B/16, L/16 and H/14 on data that the user brings."""

from harness.spec import Protocol, ViTConfig

# ViT-B and ViT-L of Dosovitskiy et al. (arXiv 2010.11929, Table 1), ViT-H with the patch of 14 that MAE uses (MAE-paper 4.2; recipes A1); timm's layers.
# ViT-S of DeiT and DINO has 6 heads, MoCo v3's has 12 (recipes A13): vit-s16 gives each method its own, vit-s16-12h gives any method MoCo's
BACKBONES = {
    "vit-s16": ViTConfig(size=(224, 224), patch=16, width=384, depth=12, heads=6),
    "vit-s16-12h": ViTConfig(size=(224, 224), patch=16, width=384, depth=12, heads=12),
    "vit-b16": ViTConfig(size=(224, 224), patch=16, width=768, depth=12, heads=12),
    "vit-l16": ViTConfig(size=(224, 224), patch=16, width=1024, depth=24, heads=16),
    "vit-h14": ViTConfig(size=(224, 224), patch=14, width=1280, depth=32, heads=16),
}

paper = Protocol(
    name="paper", family="paper", summary="real data (--data), full length: each method's own ViT, pre-training and fine-tuning as published",
    backbones=BACKBONES, backbone="vit-b16", architecture="published", tuning="published",
)

paper_shared = Protocol(
    name="paper-shared", family="paper", summary="real data (--data), full length: one ViT (timm's, learned positions) and one fine-tuning recipe for all",
    backbones=BACKBONES, backbone="vit-b16", architecture="shared", tuning="shared",
)
