"""DeiT's distillation token: a second token learns a convolutional network's labels beside the true ones (Touvron et al., arXiv 2012.12877, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.augment import Normalize, TrainTransform
from harness.checkpoint import write_atomically
from harness.classifier import Classifier, single
from harness.pickles import read_weights
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Recipe, UserError, ViTConfig, within
from methods.supervised import Supervised

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from harness.plugins import TrainContext
    from harness.spec import Protocol
    from harness.vit import ViT

PUBLISHED_TEACHER, PUBLISHED_FILE = "regnety_160", "deit/regnety_160-a5fe301d.pth"  # RegNetY-16GF (DeiT-paper 5.2; DeiT-repo README_deit.md)


@dataclass(frozen=True)
class DeiTDistilled(Supervised):
    """DeiT's recipe (`supervised@deit`) with its distillation token and hard labels of a teacher.

    Only the method's own classifier has the second token: other evaluators get the lent ViT, which has a class token and patches.

    Attributes:
        teacher: timm's name of the teacher's architecture; None: RegNetY-16GF under the paper protocols, elsewhere a small one made first (`ConvNet`).
        teacher_file: its weights, a .pth or .safetensors file; None: DeiT's, below --data. Where it lies is no part of the identity, its sha256 is.
        share: weight of the teacher's labels in the loss, the rest is the true ones'.
    """

    by: Literal["mae", "deit"] = "deit"
    teacher: str | None = None
    teacher_file: str | None = field(default=None, compare=False, metadata={"identity": False})
    share: float = 0.5

    def __post_init__(self) -> None:
        within("deit-distilled's", self, share=(0, 1))
        if self.pooling != "cls":
            raise UserError(f"deit-distilled's pooling must be cls, not {self.pooling}: it reads its two tokens")

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "DeiT with a distillation token: labels, and those that a convolutional network gives the same crops"
    source: ClassVar[str] = "DeiT-paper section 4 and Table 9; DeiT-repo models.py, losses.py, README_deit.md (recipes A5)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    variant_sources: ClassVar[Mapping[str, str]] = {}

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        """The teacher: a file, or where there is none, outside the paper protocols, a node that trains one."""
        if self.teacher_file is None and self.teacher is not None:
            raise UserError(f"--set deit-distilled.teacher={self.teacher}: name its weights too, with --set deit-distilled.teacher_file=FILE")
        if self.teacher_file is None and protocol.family != "paper":
            return {"teacher": Asset(maker=ConvNet(vit.size))}
        own = {} if self.teacher_file is None else {"file": str(Path(self.teacher_file).resolve()), "origin": "name another with teacher_file"}
        published = {"file": PUBLISHED_FILE, "origin": f"download it from https://dl.fbaipublicfiles.com/{PUBLISHED_FILE}"}
        return {"teacher": Asset(**{**published, **own}, check=partial(load_teacher, name=self.teacher))}

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """That of `supervised@deit`. Of the second token DeiT's code decays the token, whose name timm's list of exceptions did not have, not its position."""
        recipe = super().recipe(protocol, vit)
        return recipe if recipe is None or not recipe.no_decay else replace(recipe, no_decay=(*recipe.no_decay, "token_position"))

    def read_out(self, vit: ViT, context: TrainContext) -> DistilledClassifier:
        """Both heads and the teacher. Raises UserError when that knows other classes."""
        model = DistilledClassifier(vit, context.classes, augment=context.recipe.augment, mean=self.mean, std=self.std)
        model.learn_from(load_teacher(context.assets["teacher"], self.teacher), self.share)
        return model

    def notes(self, vit: ViTConfig) -> tuple[str, ...]:
        """What evaluators get of it."""
        return ("without its distillation token, but where its own classifier is scored",)

    def skip(self, vit: ViTConfig) -> str | None:
        """A bias between positions knows one class token and patches."""
        return None if vit.relative_bias == "none" else "a relative position bias has no place for a second token"


class DistilledClassifier(Classifier):
    """A ViT whose blocks see one token more, behind the class token: its read-out is trained on the labels of a teacher, the class token's on the true ones.

    The token is put in between `place` and `run_blocks`, and belongs to this read-out. Scores are logarithms of the mean of both heads' probabilities
    (DeiT-paper 4, "joint classifiers"; DeiT-repo averages logits). Without a teacher, as where it is fine-tuned, both heads learn the true labels.
    """

    def __init__(self, vit: ViT, classes: Any, **read_out: Any) -> None:
        super().__init__(vit, classes, **{**read_out, "pooling": "cls"})
        # drawn and trained as two, as in the original: AdamW moves their sum twice as fast as one
        self.token, self.token_position = (nn.Parameter(torch.empty(1, 1, vit.config.width)) for _ in range(2))
        self.teacher_head = nn.Linear(vit.config.width, len(self.classes))
        for weight in (self.token, self.token_position, self.teacher_head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.teacher_head.bias)
        self._teacher: tuple[nn.Module, ...] = ()  # in a tuple it is no part of the module: neither trained nor saved with it
        self.share = 0.5

    def learn_from(self, teacher: nn.Module, share: float) -> None:
        """Train on a teacher's labels with a weight of `share`; it sees images by its own mean and std. Raises UserError if it knows other classes."""
        known = int(teacher.num_classes)  # type: ignore[arg-type]
        if known != len(self.classes):
            raise UserError(f"deit-distilled.teacher_file: the teacher knows {known} classes, the training images have {len(self.classes)}: name one of them")
        cfg, ours = getattr(teacher, "default_cfg", {}), self.normalize
        own = Normalize(cfg.get("mean", IMAGENET_MEAN), cfg.get("std", IMAGENET_STD))
        own.shift, own.scale = (own.shift - ours.shift) * ours.scale, own.scale / ours.scale  # what it gets is normalised for the student
        self._teacher, self.share = (nn.Sequential(own, teacher).eval().requires_grad_(False),), share

    def _pooled(self, images: Tensor) -> Tensor:
        """Class and distillation token after the final norm, (B, 2, D), of normalised images."""
        grid = (images.shape[-2] // self.vit.config.patch, images.shape[-1] // self.vit.config.patch)
        x = self.vit.place(self.vit.patches(images), grid=grid)
        x = torch.cat([x[:, :1], (self.token + self.token_position).expand(len(x), -1, -1).to(x.dtype), x[:, 1:]], dim=1)
        return single(self.vit.norm(self.vit.run_blocks(x, grid=grid)[-1][:, :2]))

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of either head, (B, classes) each, of both tokens (B, 2, D)."""
        return single(self.head(tokens[:, 0])), single(self.teacher_head(tokens[:, 1]))

    def read(self, features: Tensor) -> Tensor:
        """Logarithms of the mean probabilities."""
        first, second = self.heads(features)
        return torch.logaddexp(first.log_softmax(1), second.log_softmax(1)) - math.log(2)

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image": (B, 3, H, W), "label": int64 (B,)} -> loss; top1 of the class token against the unmixed labels; agreement of the other with the teacher."""
        images, target, smoothing = self.normalize(batch["image"]), batch["label"], self.augment.smoothing
        if self._mixup is not None:
            (images, target), smoothing = self._mix(images, target), 0.0
        first, second = self.heads(self._pooled(images))
        told = target
        for teacher in self._teacher:
            with torch.no_grad():
                told = teacher.to(images.device)(images).argmax(1)
        right = F.cross_entropy(first, target, label_smoothing=smoothing)
        taught = F.cross_entropy(second, told, label_smoothing=0.0 if self._teacher else smoothing)
        found = told if told.ndim == 1 else told.argmax(1)
        return {
            "loss": (1 - self.share) * right + self.share * taught, "top1": (first.argmax(1) == batch["label"]).float().mean(),
            "agreement": (second.argmax(1) == found).float().mean(),
        }

    def classifier(self) -> dict[str, Any]:
        """With its class, by which `Classifier.restore` finds it."""
        return {**super().classifier(), "class": f"{__name__}:{type(self).__name__}"}


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
    name = name or content.get("timm") or PUBLISHED_TEACHER
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"deit-distilled.teacher: timm has no model {name!r}: give the name of one")
    model: Any = timm.create_model(name)
    bias = state.get(f"{model.default_cfg['classifier']}.bias")
    if isinstance(bias, Tensor) and bias.ndim == 1 and len(bias) != model.num_classes:
        model.reset_classifier(len(bias))
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise UserError(f"{path}: not the weights of timm's {name} ({' '.join(str(error).split())[:120]}): set deit-distilled.teacher to theirs") from error
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
