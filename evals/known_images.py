"""Images in a few colours with known answers, as an ImageNet of their own: what k-NN must score on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness.plugins import EvalContext, Golden, Session
from harness.spec import Protocol, ViTConfig

COLOURS = {"blue": (70, 90, 150), "gray": (110, 110, 110), "green": (90, 140, 80), "red": (150, 90, 80)}
EACH = 40
VIT = ViTConfig(size=(32, 32), patch=8, width=32, depth=2, heads=2)
SETTING = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")
FIXED = (70.0, 1.3)  # measured in fp32 on an AMD EPYC with torch 2.14.1; an image is 0.6, two of them may stand where rounding decides


def write(root: Path, what: str, noise: int, shuffled: bool = False, same: bool = False) -> Path:
    """train/ and val/ with a folder for each colour: its images, or shuffled ones; `same`: val has train's images."""
    import numpy as np
    from PIL import Image

    from harness.randomness import generator

    for split in ("train", "val"):
        rng = generator("golden", what, "train" if same else split)
        for i in range(EACH * len(COLOURS)):
            name = list(COLOURS)[int(rng.integers(len(COLOURS))) if shuffled else i % len(COLOURS)]
            shown = COLOURS[list(COLOURS)[i % len(COLOURS)]]
            place = root / what / split / name
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.array(shown) + rng.normal(0, noise, 3) + rng.normal(0, 10, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i:03}.png")
    return root / what


def neighbours(evaluator: Any, folder: Path) -> tuple[Golden, ...]:
    """Known answers of `knn`: images that are their own neighbours, shuffled labels, and a fixed ViT on colours that overlap."""
    import numpy as np
    import torch

    from harness.checkpoint import Backbone
    from harness.randomness import generator
    from harness.vit import ViT

    vit = ViT(VIT)
    for name, parameter in vit.named_parameters():
        drawn = generator("golden", name).standard_normal(parameter.shape, dtype=np.float32)
        if parameter.ndim > 1:
            parameter.data.copy_(torch.from_numpy(drawn * (2.0 / (parameter.numel() / parameter.shape[0])) ** 0.5))
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    checkpoint = Backbone(VIT, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), vit.state_dict())

    def score(data: Path, plugin: Any) -> float:
        place = folder / f"job-{data.name}"
        place.mkdir()
        session = Session(place, 0, torch.device("cpu"), torch.float32, {"imagenet": data})
        return float(plugin.run(checkpoint, EvalContext(session, SETTING, None)).metrics["top-1"])

    nearest = dataclasses.replace(evaluator, k=1)
    return (
        Golden("images that are their own neighbours, top-1", score(write(folder, "same", 30, same=True), nearest), 100.0, 1e-9),
        # 160 images at chance 1/4: a standard deviation of 3.4
        Golden("labels shuffled, top-1", score(write(folder, "shuffled", 30, shuffled=True), nearest), 100 / len(COLOURS), 12.0),
        Golden("a fixed tiny checkpoint, top-1", score(write(folder, "overlapping", 30), evaluator), *FIXED),
    )
