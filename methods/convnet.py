"""Convolutional networks whose labels DeiT's distillation token learns: one of timm's from a file, or a small one that a demo trains first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.augment import Normalize, TrainTransform
from harness.checkpoint import write_atomically
from harness.classifier import single
from harness.pickles import read_weights
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Augment, Recipe, UserError, ViTConfig

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from harness.plugins import TrainContext
    from harness.spec import Protocol
    from harness.vit import ViT

PUBLISHED_TEACHER = "regnety_160"  # RegNetY-16GF (DeiT-paper 5.2)


def known(name: Any) -> str:
    """A name that timm has. Raises UserError when it has none such."""
    import timm

    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"deit@distilled.teacher: timm has no model {name!r}: give the name of one")
    return name


def load_teacher(path: Path, name: str | None = None) -> nn.Module:
    """A model of timm with the weights of a file, in the form in which DeiT released its teacher ({"model": tensors}) or as plain tensors.

    Args:
        name: timm's name of the architecture; None: as the file itself says (`ConvNet`), or DeiT's.

    Raises:
        UserError: the file is damaged, or holds other weights than that architecture has.
    """
    import timm

    content = found if isinstance(found := read_weights(path), Mapping) else {}
    state = inner if isinstance(inner := content.get("model", content), Mapping) else {}
    name = known(name or content.get("timm") or PUBLISHED_TEACHER)
    model: Any = timm.create_model(name)
    bias = state.get(f"{model.default_cfg['classifier']}.bias")
    if isinstance(bias, Tensor) and bias.ndim == 1 and len(bias) != model.num_classes:
        model.reset_classifier(len(bias))
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise UserError(f"{path}: not the weights of timm's {name} ({' '.join(str(error).split())[:120]}): set deit@distilled.teacher to theirs") from error
    return model  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ConvNet:
    """Maker of a teacher where none is given (ours): a small network of the family of DeiT's, trained on the same images and labels.

    Attributes:
        size: (height, width) of its input in pixels.
        model: timm's name of its architecture.
        holdout: fraction of the images kept from training, for `check`.
    """

    size: tuple[int, int] = (224, 224)
    model: str = "regnety_002"
    holdout: float = 0.05

    name: ClassVar[str] = "convnet"
    version: ClassVar[int] = 1
    needs_labels: ClassVar[bool] = True
    distributed: ClassVar[bool] = False  # its batch norms are timm's

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """demo, smoke: ours. None for others: at the papers' scale the teacher is a file."""
        length = {"demo": 400, "smoke": 20}.get(protocol.family)
        return None if length is None else Recipe(
            batch=32, lr=2e-3, iterations=length, warmup=length // 20, augment=Augment(crop_scale=(0.35, 1.0), smoothing=0.1),
            sources=(("all", "ours, not tuned"),),
        )

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        return TrainTransform(self.size, recipe.augment)

    def objective(self, vit: ViT | None, context: TrainContext) -> ConvNetObjective:
        return ConvNetObjective(self.model, len(context.classes), context.recipe.augment.smoothing)


class ConvNetObjective(nn.Module):
    """Classification by a model of timm, of images normalised as DeiT's are."""

    def __init__(self, name: str, classes: int, smoothing: float) -> None:
        super().__init__()
        import timm

        self.name, self.smoothing, self.normalize = name, smoothing, Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.model = timm.create_model(name, num_classes=classes).to(memory_format=torch.channels_last)

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image": (B, 3, H, W), "label": int64 (B,)} -> loss, top1."""
        scores = single(self.model(self.normalize(batch["image"])))
        loss = F.cross_entropy(scores, batch["label"], label_smoothing=self.smoothing)
        return {"loss": loss, "top1": (scores.argmax(1) == batch["label"]).float().mean()}

    @torch.no_grad()
    def check(self, loader: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Accuracy on held-out images under the training's crops, 0..100."""
        self.eval()
        right = torch.cat([self.model(self.normalize(b["image"])).argmax(1) == b["label"] for b in loader])
        return {"top1": 100 * right.float().mean().item()}

    def save_asset(self, path: Path) -> None:
        """The file that `load_teacher` reads."""
        content = {"timm": self.name, "model": {k: v.contiguous() for k, v in self.model.state_dict().items()}}
        write_atomically(path, lambda stream: torch.save(content, stream))
