"""A third party's plugins, whole: a pre-training method and an evaluator, found by entry points alone.

`rotation` predicts by how many quarter turns an image was turned (Gidaris et al., arXiv 1803.07728). `nearest-mean` gives each validation
image the class whose mean training feature is nearest: nothing is trained.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.augment import EvalTransform, Normalize, TrainTransform
from harness.checkpoint import Backbone, write_atomically
from harness.data import ImageList, load_rgb, read_images
from harness.plugins import EvalContext, Progress, TrainContext
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Interrupted, Metric, Outcome, Overrides, Protocol, Recipe, ViTConfig
from harness.vit import ViT, init_mae


@dataclass(frozen=True)
class Rotation:
    """Rotation prediction. `turns` is the number of quarter turns told apart."""

    turns: int = 4
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "predicts by how many quarter turns an image was turned"
    source: ClassVar[str] = "arXiv 1803.07728"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"two": {"turns": 2}}

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        return {}

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        if protocol.family not in ("demo", "smoke"):
            return None
        return Recipe(batch=16, lr=5e-4, iterations=24, warmup=2, sources=(("all", "ours"),))

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Any, np.random.Generator], dict[str, Tensor]]:
        crop = TrainTransform(vit.size, recipe.augment)

        def sample(image: Any, rng: np.random.Generator) -> dict[str, Tensor]:
            turn = int(rng.integers(self.turns))
            return {"image": torch.rot90(crop(image, rng)["image"], turn, (1, 2)), "turn": torch.tensor(turn)}

        return sample

    def objective(self, vit: ViT | None, context: TrainContext) -> nn.Module:
        assert vit is not None
        return TurnLoss(vit, self.turns, Normalize(self.mean, self.std))

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        return Overrides()

    def skip(self, vit: ViTConfig) -> str | None:
        return None if vit.size[0] == vit.size[1] else "a picture that is not square cannot be turned by a quarter"


class TurnLoss(nn.Module):
    """Cross-entropy over the turns, read from the class token."""

    def __init__(self, vit: ViT, turns: int, normalize: nn.Module) -> None:
        super().__init__()
        init_mae(vit)
        self.vit, self.normalize, self.head = vit, normalize, nn.Linear(vit.config.width, turns)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        """{"image": (B, 3, H, W), "turn": (B,)} -> {"loss", "accuracy"}."""
        logits = self.head(self.vit(self.normalize(batch["image"]))).float()
        return {"loss": F.cross_entropy(logits, batch["turn"]), "accuracy": (logits.argmax(1) == batch["turn"]).float().mean()}


@dataclass(frozen=True)
class NearestMean:
    """Nearest class mean on frozen features. `images` training images are used at most."""

    images: int = 200

    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Metric, ...]] = (Metric("top-1"),)
    summary: ClassVar[str] = "nearest class mean on the frozen class token, top-1"
    source: ClassVar[str] = "textbook"

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        return Recipe(batch=16, lr=0.0, iterations=1, sources=(("batch", "ours"),))

    def skip(self, vit: ViTConfig) -> str | None:
        return None

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        assert context.recipe is not None
        session, folder = context.session, context.session.folders["imagenet"]
        vit = checkpoint.build().to(session.device).eval()
        normalize, crop = Normalize(checkpoint.mean, checkpoint.std).to(session.device), EvalTransform(checkpoint.config.size)

        def features(images: ImageList, stage: str) -> Tensor:
            found, size = [], context.recipe.batch
            for first in range(0, len(images), size):
                batch = [crop(load_rgb(images.path(i)))["image"] for i in range(first, min(first + size, len(images)))]
                with torch.no_grad():
                    found.append(F.normalize(vit(normalize(torch.stack(batch).to(session.device))).float(), dim=1).cpu())
                session.report(Progress(stage, first // size + 1, -(-len(images) // size), 0.0))
                if session.should_stop():
                    raise Interrupted("features are computed again at the next start")
            return torch.cat(found)

        train, val = read_images("imagenet", "train", folder), read_images("imagenet", "val", folder)
        train = train.subset(np.linspace(0, len(train) - 1, min(self.images, len(train))).astype(int))
        labels, x = torch.from_numpy(train.labels), features(train, "train features")
        means = torch.stack([x[labels == c].mean(0) if (labels == c).any() else torch.full_like(x[0], -9.0) for c in range(len(train.classes))])
        correct = (features(val, "val features") @ means.T).argmax(1).numpy() == val.labels
        buffer = io.BytesIO()
        np.savez_compressed(buffer, correct=correct)
        write_atomically(session.dir / "outcomes.npz", lambda stream: stream.write(buffer.getvalue()))
        return Outcome({"top-1": 100.0 * float(correct.mean())}, session.dir / "outcomes.npz", {"images_seen": 0, "flops": None})
