"""The protocols `demo` and `smoke`: a small ViT and generated data, on a laptop's CPU."""

from harness.spec import Protocol, ViTConfig

GENERATOR = "protocols.layouts:generate"
GENERATES = ("imagenet", "ade20k", "coco", "inat2018", "places365")
CAVEAT = ": not comparable with published numbers"

demo = Protocol(
    name="demo", family="demo", summary="small ViT, generated scenes, minutes on two CPU cores (the default)",
    backbones={"vit-demo": ViTConfig(size=(64, 64), patch=8, width=128, depth=6, heads=4)}, backbone="vit-demo",
    generator=GENERATOR, generates=GENERATES, data_version="v2", caption="demo protocol, generated data" + CAVEAT, caveat=CAVEAT,
)

smoke = Protocol(
    name="smoke", family="smoke", summary="the same line in about a minute, for tests; scores mean nothing",
    backbones={"vit-smoke": ViTConfig(size=(64, 64), patch=8, width=96, depth=4, heads=3)}, backbone="vit-smoke",
    generator=GENERATOR, generates=GENERATES, data_version="v2", caption="smoke protocol, generated data" + CAVEAT, caveat=CAVEAT,
)
