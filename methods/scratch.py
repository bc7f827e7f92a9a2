"""Scratch: no pre-training. The row that shows what pre-training is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from harness.augment import TrainTransform
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Overrides, Recipe, ViTConfig
from harness.vit import ViT, init_mae

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class Scratch:
    """A ViT as initialised (MAE's initialisation, recipes A1). Its `imagenet` cell under paper is a from-scratch recipe, not a fine-tune."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    version: ClassVar[int] = 1
    trains: ClassVar[bool] = False
    summary: ClassVar[str] = "no pre-training: every evaluator starts from random weights"
    source: ClassVar[str] = "MAE-paper A.2 and Table 11 (recipes A5)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """None: the weights do not depend on any data."""
        return ()

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """None under any protocol: nothing is trained (see `trains`)."""
        return None

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        return {}

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        return TrainTransform(vit.size, recipe.augment)

    def objective(self, vit: ViT | None, context: TrainContext) -> None:
        """Initialises the lent ViT in place; there is no loss."""
        assert vit is not None
        init_mae(vit)

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        """Under paper: on imagenet MAE's Table 11, from scratch, in place of the fine-tuning recipe; on coco in Li21's setting its lr and weight decay."""
        if protocol.family == "paper" and evaluator.partition("@")[0] == "coco" and evaluator != "coco@vitdet":
            return Overrides({"lr": 1.6e-4, "weight_decay": 0.2}, source="Li21 (arXiv 2111.11429), random initialisation (recipes A10)")
        return Overrides(variant="scratch" if evaluator == "imagenet" and protocol.family == "paper" else "")

    def skip(self, vit: ViTConfig) -> str | None:
        return None
