"""Supervised: classification of labelled images from scratch, the classic pre-training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from harness import plugins
from harness.augment import TrainTransform
from harness.classifier import Classifier
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Overrides, Recipe, UserError, ViTConfig
from harness.vit import ViT, init_mae
from methods import published

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class Supervised:
    """Supervised training from scratch.

    Attributes:
        by: whose recipe and initial weights: "mae" (Table 11: EMA, whose weights are the result); `methods.deit` has "deit" (erasing, repeated
            augmentation, the raw weights; timm's initialisation with the class token from the same law, as DeiT's code has it).
        pooling: "cls" reads the class token after the final norm, as DeiT does: every parameter of the ViT is trained, the linear
            probe's input included. "mean" averages the patch tokens, as MAE's fine-tuning code does, and leaves the final norm untouched.
    """

    by: Literal["mae"] = "mae"
    pooling: Literal["cls", "mean"] = "cls"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    version: ClassVar[int] = 1
    needs_labels: ClassVar[bool] = True
    summary: ClassVar[str] = "classification with labels from scratch, EMA weights; its imagenet cell is its own accuracy"
    source: ClassVar[str] = "MAE-paper A.2 and Table 11 (recipes A5); MAE issue #28"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mean": {"pooling": "mean"}}
    variant_sources: ClassVar[Mapping[str, str]] = {"mean": "MAE-repo main_finetune.py, --global_pool (recipes A2, A5)"}

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        return {}

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """paper: MAE-paper Table 11 (`evals.recipes`), or DeiT-paper Table 9 (`methods.published`). demo, smoke: the same kind of recipe scaled down (ours)."""
        frozen = published.fixed(vit) + (("vit.norm.*",) if self.pooling == "mean" else ())
        if protocol.family == "paper":
            recipe = published.as_evaluated("imagenet@scratch", protocol, vit) if self.by == "mae" else published.deit(vit)
            mean = (("pooling", Supervised.variant_sources["mean"]),) if self.pooling == "mean" else ()
            return None if recipe is None else replace(recipe, frozen=frozen, sources=(*mean, *recipe.sources))
        sources = (
            ("batch, lr, length, warmup, ema, weight_decay, mixup, cutmix", "ours, scaled down"),
            ("betas, smoothing, erasing, repeats", "MAE-paper Table 11; DeiT-paper Table 9 (recipes A5)"),
            ("rand_augment", "ours: none, too strong for so short a run"),
        )
        deit = self.by == "deit"
        shared: dict[str, Any] = {
            "betas": (0.9, 0.999) if deit else (0.9, 0.95), "weight_decay": 0.05, "frozen": frozen, "sources": sources,
            "augment": Augment(crop_scale=(0.2, 1.0), smoothing=0.1, erasing=0.25 if deit else 0.0, repeats=3 if deit else 1),
        }
        if protocol.family == "demo":
            return Recipe(batch=32, lr=2e-3, iterations=900, warmup=60, ema=None if deit else 0.99, **shared)
        if protocol.family == "smoke":
            return Recipe(batch=32, lr=1e-3, iterations=40, warmup=5, ema=None if deit else 0.9, **shared)
        return None

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        return TrainTransform(vit.size, recipe.augment)

    def objective(self, vit: ViT | None, context: TrainContext) -> Classifier:
        """The classifier over the classes of the training images.

        Raises:
            UserError: the images have no labels.
        """
        assert vit is not None
        if not context.classes:
            raise UserError(f"--methods {plugins.name_of('methods', self)}: its training images have no labels: drop it, or give --data with class folders")
        if self.by == "mae":
            init_mae(vit)
        else:
            nn.init.trunc_normal_(vit.cls_token, std=0.02)  # the rest is as the ViT was built: timm's
        return self.read_out(vit, context)

    def read_out(self, vit: ViT, context: TrainContext) -> Classifier:
        """The initialised ViT with what is trained on it."""
        return Classifier(vit, context.classes, pooling=self.pooling, augment=context.recipe.augment, mean=self.mean, std=self.std)

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        """imagenet: the pre-training's own classifier is scored, nothing is trained again."""
        if evaluator != "imagenet":
            return Overrides()
        return Overrides(use_head=True, source="MAE-paper A.2, DeiT-paper Table 9: the row is the from-scratch model itself (recipes A5)")

    def skip(self, vit: ViTConfig) -> str | None:
        return None
