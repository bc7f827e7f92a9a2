"""DeiT: supervised training by its recipe, and its distillation token, which learns a convolutional network's labels (Touvron et al., arXiv 2012.12877)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.augment import Normalize
from harness.classifier import Classifier, single
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Recipe, UserError, ViTConfig, within
from methods.convnet import ConvNet, known, load_teacher
from methods.supervised import Supervised

if TYPE_CHECKING:
    from harness.plugins import TrainContext
    from harness.spec import Protocol
    from harness.vit import ViT

PUBLISHED_FILE = "deit/regnety_160-a5fe301d.pth"  # DeiT-repo README_deit.md


@dataclass(frozen=True)
class DeiT(Supervised):
    """DeiT's supervised recipe, with repeated augmentation; as a variant with its distillation token and hard labels of a teacher.

    Only the method's own classifier has the second token: other evaluators get the lent ViT, which has a class token and patches.

    Attributes:
        distilled: whether the second token learns a teacher's labels. The fields below belong to that.
        teacher: timm's name of the teacher's architecture; None: RegNetY-16GF under the paper protocols, elsewhere a small one made first (`ConvNet`).
        teacher_file: its weights, a .pth or .safetensors file; None: DeiT's, below --data. Where it lies is no part of the identity, its sha256 is.
        share: weight of the teacher's labels in the loss, the rest is the true ones'.
    """

    by: Literal["deit"] = "deit"
    distilled: bool = False
    teacher: str | None = None
    teacher_file: str | None = field(default=None, compare=False, metadata={"identity": False})
    share: float = 0.5

    def __post_init__(self) -> None:
        within("deit's", self, share=(0, 1))
        if self.distilled and self.pooling != "cls":
            raise UserError(f"deit@distilled's pooling must be cls, not {self.pooling}: it reads its two tokens")
        if self.teacher_file == "":
            raise UserError("deit@distilled.teacher_file is empty: name a file")

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "classification with labels by DeiT's recipe, repeated augmentation; its imagenet cell is its own accuracy"
    source: ClassVar[str] = "DeiT-paper Table 9; DeiT-repo main.py, samplers.py (recipes A5)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"distilled": {"distilled": True}}
    variant_sources: ClassVar[Mapping[str, str]] = {"distilled": "DeiT-paper section 4; DeiT-repo models.py, losses.py, README_deit.md (recipes A5)"}

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        """The teacher, of the variant: a file, or where there is none, outside the paper protocols, a node that trains one."""
        if not self.distilled:
            if (self.teacher, self.teacher_file, self.share) != (None, None, 0.5):
                raise UserError("deit has no teacher: give these settings to deit@distilled, as in --set deit@distilled.teacher_file=FILE")
            return {}
        if self.teacher is not None:
            known(self.teacher)
        if self.teacher_file is None and self.teacher is not None:
            raise UserError(f"--set deit@distilled.teacher={self.teacher}: name its weights too, with --set deit@distilled.teacher_file=FILE")
        if self.teacher_file is None and protocol.family != "paper":
            return {"teacher": Asset(maker=ConvNet(vit.size))}
        own = {} if self.teacher_file is None else {"file": str(Path(self.teacher_file).resolve()), "origin": "name another with teacher_file"}
        published = {"file": PUBLISHED_FILE, "origin": f"download it from https://dl.fbaipublicfiles.com/{PUBLISHED_FILE}"}
        return {"teacher": Asset(**{**published, **own}, check=partial(load_teacher, name=self.teacher))}

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Of the second token DeiT's code decays the token, whose name timm's list of exceptions did not have, not its position."""
        recipe = super().recipe(protocol, vit)
        return recipe if recipe is None or not recipe.no_decay or not self.distilled else replace(recipe, no_decay=(*recipe.no_decay, "token_position"))

    def read_out(self, vit: ViT, context: TrainContext) -> Classifier:
        """The classifier; of the variant with both heads and the teacher. Raises UserError when that knows other classes."""
        if not self.distilled:
            return super().read_out(vit, context)
        model = DistilledClassifier(vit, context.classes, augment=context.recipe.augment, mean=self.mean, std=self.std)
        model.learn_from(load_teacher(context.assets["teacher"], self.teacher), self.share)
        return model

    def notes(self, vit: ViTConfig) -> tuple[str, ...]:
        """What evaluators get of the variant."""
        return ("without its distillation token, but where its own classifier is scored",) if self.distilled else ()

    def skip(self, vit: ViTConfig) -> str | None:
        """A bias between positions knows one class token and patches."""
        return "a relative position bias has no place for a second token" if self.distilled and vit.relative_bias != "none" else None


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
        taught = int(teacher.num_classes)  # type: ignore[arg-type]
        if taught != len(self.classes):
            raise UserError(f"deit@distilled.teacher_file: the teacher knows {taught} classes, the training images have {len(self.classes)}: name one of them")
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
