"""Supervised: classification of labelled images from scratch, the classic pre-training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from harness.augment import TrainTransform
from harness.classifier import Classifier
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Overrides, Recipe, UserError, ViTConfig
from harness.vit import ViT, init_mae

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class Supervised:
    """Supervised training with the from-scratch recipe of the MAE paper; the EMA weights are the result.

    Attributes:
        pooling: "cls" reads the class token after the final norm, as DeiT does: every parameter of the ViT is trained, the linear
            probe's input included. "mean" averages the patch tokens, as MAE's fine-tuning code does, and leaves the final norm untouched.
    """

    pooling: Literal["cls", "mean"] = "cls"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    version: ClassVar[int] = 1
    needs_labels: ClassVar[bool] = True
    summary: ClassVar[str] = "classification with labels from scratch, EMA weights; its imagenet cell is its own accuracy"
    source: ClassVar[str] = "MAE-paper A.2 and Table 11 (recipes A5); MAE issue #28"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mean": {"pooling": "mean"}}

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        return {}

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """paper: recipes A5 (MAE-paper Table 11, ViT-B). demo, smoke: the same kind of recipe scaled down (ours)."""
        frozen = (("vit.pos_embed",) if vit.positions.startswith("sincos") else ()) + (("vit.norm.*",) if self.pooling == "mean" else ())
        if protocol.family == "paper" and vit.size == (224, 224):
            augment = Augment(crop_scale=(0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, smoothing=0.1)
            return Recipe(
                batch=4096, lr=1e-4, lr_batch=256, epochs=300 if vit.width <= 768 else 200, warmup=20, betas=(0.9, 0.95), weight_decay=0.3,
                drop_path=0.1 if vit.width <= 768 else 0.2, ema=0.9999, frozen=frozen, augment=augment,
                sources=(("all", "MAE-paper Table 11 (recipes A5)"), ("augment.crop_scale", "torchvision's and timm's default")),
            )
        sources = (
            ("batch, lr, length, warmup, ema, weight_decay, mixup, cutmix", "ours, scaled down"),
            ("betas, smoothing", "MAE-paper Table 11 (recipes A5)"), ("rand_augment", "ours: none, too strong for so short a run"),
        )
        augment = Augment(crop_scale=(0.2, 1.0), smoothing=0.1)
        if protocol.family == "demo":
            return Recipe(
                batch=32, lr=2e-3, iterations=900, warmup=60, betas=(0.9, 0.95), weight_decay=0.05, ema=0.99, frozen=frozen, augment=augment,
                sources=sources,
            )
        if protocol.family == "smoke":
            return Recipe(
                batch=32, lr=1e-3, iterations=40, warmup=5, betas=(0.9, 0.95), weight_decay=0.05, ema=0.9, frozen=frozen, augment=augment,
                sources=sources,
            )
        return None

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        return TrainTransform(vit.size, recipe.augment)

    def objective(self, vit: ViT | None, context: TrainContext) -> nn.Module:
        """The classifier over the classes of the training images.

        Raises:
            UserError: the images have no labels.
        """
        assert vit is not None
        if not context.classes:
            raise UserError("--methods supervised: its training images have no labels: drop it, or give --data with class folders")
        init_mae(vit)
        return Classifier(vit, context.classes, pooling=self.pooling, augment=context.recipe.augment, mean=self.mean, std=self.std)

    def transfer(self, evaluator: str, protocol: Protocol) -> Overrides:
        """imagenet: the pre-training's own classifier is scored, nothing is trained again."""
        if evaluator != "imagenet":
            return Overrides()
        return Overrides(use_head=True, source="MAE-paper A.2: the supervised row is the from-scratch model itself, with EMA (recipes A5)")

    def skip(self, vit: ViTConfig) -> str | None:
        return None
