"""DINO: self-distillation of many crops with a momentum teacher (Caron et al., arXiv 2104.14294)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from PIL import Image as PIL
from torch import Tensor, nn

from harness.augment import Normalize
from harness.classifier import single
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Overrides, Recipe, ViTConfig, within
from harness.vit import ViT
from methods import published
from methods.distillation import Head, distill, stretch
from methods.teacher import follow, rising, summed
from methods.views import View, make

if TYPE_CHECKING:
    import numpy as np

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class DINO:
    """DINO on a ViT. Epochs are the recipe's; where that counts steps, the training has `epochs` of equal length.

    Attributes:
        by: whose values: "vit-b16", the arguments of the released ViT-B/16, or "repo", the defaults of main_dino.py (ViT-S/16 and B/16).
        local_crops: small crops that only the student sees, beside the two global ones.
        local_scale: their area.
        local_patches: their side in patches of a ViT with 14 x 14; other grids in proportion (6: 96 pixels of 224).
        temperature: of the teacher's probabilities once warm, from `temperature_start` over `temperature_warmup` epochs, epoch by epoch.
        student_temperature: of the student's.
        momentum: of the teacher at the start; it rises to 1 in half a cosine.
        centre_momentum: of the mean of the teacher's outputs that is taken from them.
        freeze_last: epochs in which the last layer of the student's head is not trained.
        train_gains: whether the lengths of that layer's directions are trained (`--norm_last_layer false`); they stay at 1 otherwise.
        hidden, bottleneck, prototypes: widths of the head; None: 2048, 256, 65536 for ViTs of the papers' size (recipes A14), 2 x the ViT's, 64 and
            1024 for narrower ones (ours).
        epochs: length under the paper protocols; the other protocols set their own.
    """

    by: Literal["vit-b16", "repo"] = "vit-b16"
    local_crops: int = 10
    local_scale: tuple[float, float] = (0.05, 0.25)
    local_patches: int = 6
    temperature: float = 0.07
    temperature_start: float = 0.04
    temperature_warmup: int = 50
    student_temperature: float = 0.1
    momentum: float = 0.996
    centre_momentum: float = 0.9
    freeze_last: int = 3
    train_gains: bool = False
    hidden: int | None = None
    bottleneck: int | None = None
    prototypes: int | None = None
    epochs: int = 400
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        within("dino's", self, local_crops=(0, None), local_scale=(1e-6, 1), local_patches=(1, 14), temperature=(1e-3, None), momentum=(0, 1),
               temperature_start=(1e-3, None), temperature_warmup=(0, None), student_temperature=(1e-3, None), centre_momentum=(0, 1))
        within("dino's", self, freeze_last=(0, None), hidden=(1, None), bottleneck=(1, None), prototypes=(2, None), epochs=(1, None), std=(1e-6, None))

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "self-distillation: small and large crops of an image are given the prototypes that a momentum teacher gives the large ones"
    source: ClassVar[str] = "arXiv 2104.14294; facebookresearch/dino @ 7c446df; ViT-B/16's arguments recalled, not verified (recipes A14)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repo": {
            "by": "repo", "local_crops": 8, "local_scale": (0.05, 0.4), "temperature": 0.04, "temperature_warmup": 0, "freeze_last": 1, "epochs": 100,
        },
        "boosted": {
            "by": "repo", "local_crops": 8, "local_scale": (0.05, 0.4), "temperature_warmup": 30, "freeze_last": 1, "train_gains": True, "epochs": 300,
        },
        "two-crops": {"local_crops": 0},
    }
    variant_sources: ClassVar[Mapping[str, str]] = {
        "repo": "DINO-repo main_dino.py, its defaults", "boosted": "DINO-repo README, boosting, for ViT-S", "two-crops": "ours: the global crops alone",
    }

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        return {}

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        """Under paper its own: DINO-repo issues #31, #144 and #171 (recipes A11), eval_linear.py (A14)."""
        known = ("imagenet", "cifar100", "inat2018", "inat2019", "linear")
        return Overrides(variant="dino" if protocol.family == "paper" and evaluator in known else "")

    def skip(self, vit: ViTConfig) -> str | None:
        wrong = self.local_crops and vit.relative_bias != "none"
        return "a relative position bias fits one image size, and its small crops have another: set dino.local_crops=0" if wrong else None

    def widths(self, vit: ViTConfig) -> tuple[int, int, int]:
        """Hidden width, bottleneck and prototypes of the head for a backbone."""
        hidden, bottleneck, prototypes = (2048, 256, 65536) if vit.width >= 384 else (2 * vit.width, 64, 1024)
        return self.hidden or hidden, self.bottleneck or bottleneck, self.prototypes or prototypes

    def local_grid(self, vit: ViTConfig) -> tuple[int, int]:
        """Patches of a small crop, by rows and by columns."""
        return max(1, round(vit.grid[0] * self.local_patches / 14)), max(1, round(vit.grid[1] * self.local_patches / 14))

    def facts(self, vit: ViT, context: TrainContext) -> Mapping[str, Any]:
        """Two large and several small crops of each image are seen: told by the fairness audit."""
        return {"crops_seen": (2 + self.local_crops) * context.total_steps * context.recipe.batch}

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Pre-training values. paper: DINO-repo (see `methods.published`); demo, smoke: ours, scaled down."""
        frozen = published.fixed(vit)
        if protocol.family == "paper":
            return published.dino_pretraining(vit, self.by, self.epochs, frozen)
        augment = Augment(crop_scale=(0.4, 1.0), color_jitter=(0.4, 0.4, 0.2))
        sources = (("batch, lr, length, warmup", "ours, scaled down, not tuned: as long as mae and beit together"),
                   ("weight_decay, clip, min_lr, augment", "DINO-repo main_dino.py (recipes A14)"))
        shared: dict[str, Any] = {
            "min_lr": 1e-6, "schedule": "cosine-stepwise", "weight_decay": 0.04, "weight_decay_end": 0.4, "clip": 3.0, "clip_mode": "tensor",
            "frozen": frozen, "augment": augment, "sources": sources,
        }
        if protocol.family == "demo":
            return Recipe(batch=32, lr=1e-3, iterations=800, warmup=80, **shared)
        if protocol.family == "smoke":
            return Recipe(batch=16, lr=1e-3, iterations=16, warmup=2, **shared)
        return None

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[PIL.Image, np.random.Generator], dict[str, Tensor]]:
        """-> {"global": uint8 (2, 3, H, W), "local": uint8 (L, 3, h, w)}; one large crop is always blurred, the other solarised at times (recipes A14)."""
        pixel, scale, (rows, columns) = max(vit.size) / 224, recipe.augment.crop_scale, self.local_grid(vit)
        large = (View(vit.size, scale, 1.0, pixel=pixel), View(vit.size, scale, 0.1, 0.2, pixel))
        small = View((rows * vit.patch, columns * vit.patch), self.local_scale, 0.5, pixel=pixel)

        def sample(image: PIL.Image, rng: np.random.Generator) -> dict[str, Tensor]:
            views = {"global": large, "local": (small,) * self.local_crops}
            return {name: torch.stack([make(image, rng, view, recipe.augment) for view in kind]) for name, kind in views.items() if kind}

        return sample

    def objective(self, vit: ViT | None, context: TrainContext) -> DINOObjective:
        assert vit is not None
        return DINOObjective(vit, self, self.local_grid(vit.config), context.total_steps, context.recipe.epochs or self.epochs, Normalize(self.mean, self.std))


class DINOObjective(nn.Module):
    """DINO's loss around a lent ViT, which starts as timm makes it (DINO-repo vision_transformer.py has the same law).

    The result is the teacher. It and the centre are stepped after the optimiser: what the teacher gives in the parts of a step is summed until then, so
    that a batch may be split.

    Args:
        vit: the student.
        method: temperatures, momentums and widths of the head.
        local: patches of a small crop, by rows and by columns.
        steps, epochs: length of the training.
        normalize: uint8 or float images -> network input.
    """

    def __init__(self, vit: ViT, method: DINO, local: tuple[int, int], steps: int, epochs: float, normalize: nn.Module) -> None:
        super().__init__()
        nn.init.trunc_normal_(vit.cls_token, std=0.02)
        self.vit, self.method, self.steps, self.epochs, self.normalize = vit, method, steps, epochs, normalize
        self.head = Head(vit.config.width, *method.widths(vit.config), gains=method.train_gains)
        teacher = ViT(vit.config)  # without the student's dropped paths
        teacher.load_state_dict(vit.state_dict())
        self.teacher = nn.ModuleDict({"vit": teacher, "head": copy.deepcopy(self.head)}).requires_grad_(False)
        prototypes = self.head.last_layer.shape[0]
        self.register_buffer("centre", torch.zeros(1, prototypes))
        self.register_buffer("given", torch.zeros(1, prototypes), persistent=False)  # the teacher's outputs of this step: sum and number
        self.register_buffer("number", torch.zeros(()), persistent=False)
        self.register_buffer("local", stretch(vit.config.grid, local), persistent=False)

    def export(self) -> ViT:
        """The teacher's ViT, which is what DINO scores."""
        vit: ViT = self.teacher["vit"]  # type: ignore[assignment]
        return vit

    def epoch(self, progress: float) -> int:
        """Epoch, from 0, at a progress of 0..1."""
        return int(progress * self.epochs + 1e-6)

    def temperature(self, epoch: int) -> float:
        """The teacher's temperature in an epoch: evenly from the first value to the last over the warm-up, both included."""
        start, end, warm = self.method.temperature_start, self.method.temperature, self.method.temperature_warmup
        return end if epoch >= warm else start + (end - start) * epoch / max(1, warm - 1)

    def tokens(self, vit: nn.Module, images: Tensor) -> Tensor:
        """Class token (n, D) after the final norm, of crops of either size; positions of small ones are the ViT's own, stretched."""
        backbone: Any = vit
        x, table, grid = backbone.patches(images), backbone.positions(), (images.shape[-2] // backbone.config.patch, images.shape[-1] // backbone.config.patch)
        if table is None:
            return backbone.encode(backbone.place(x))[:, 0]
        if grid != backbone.config.grid:
            with torch.autocast(images.device.type, enabled=False):
                table = torch.cat([table[:, :1], self.local.to(table) @ table[:, 1:]], dim=1)  # type: ignore[operator]
        cls = (backbone.cls_token + table[:, :1]).expand(len(x), -1, -1)
        return backbone.encode(torch.cat([cls.to(x.dtype), x + table[:, 1:]], dim=1))[:, 0]

    def student_outputs(self, large: Tensor, small: Tensor | None, frozen: bool = False) -> Tensor:
        """Scores of all crops, ((2 + L) B, K), crop after crop, of normalised large crops (2 B, ...) and small ones (L B, ...)."""
        features = [self.tokens(self.vit, crops) for crops in (large, small) if crops is not None]
        return self.head(torch.cat(features), frozen)

    def teacher_outputs(self, large: Tensor) -> Tensor:
        """Scores (2 B, K) of normalised large crops."""
        with torch.no_grad():
            scores: Tensor = self.teacher["head"](self.tokens(self.teacher["vit"], large))
            return scores

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"global": (B, 2, 3, H, W), "local": (B, L, 3, h, w)} uint8 or float -> {"loss", "entropy": of the teacher's mean prediction, in nats}."""
        large, small = (self.normalize(batch[k].transpose(0, 1).flatten(0, 1)) if k in batch else None for k in ("global", "local"))
        assert large is not None
        epoch = self.epoch(progress)
        teacher = single(self.teacher_outputs(large))
        student = single(self.student_outputs(large, small, frozen=epoch < self.method.freeze_last))
        if self.head.mlp[0].weight.grad is None:  # the first part of a step, or of its repetition in smaller parts
            self.given.zero_(), self.number.zero_()
        self.given += teacher.sum(dim=0, keepdim=True)
        self.number += len(teacher)
        loss, wanted = distill(student, teacher, self.centre, self.method.student_temperature, self.temperature(epoch), len(batch["global"]))
        return {"loss": loss, "entropy": torch.special.entr(wanted.mean(dim=0)).sum()}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The centre moves to the mean of what the teacher gave, the teacher to the student, with the momentum of the step that was done."""
        mean = summed(self.given) / summed(self.number)
        self.centre.lerp_(mean, 1 - self.method.centre_momentum)
        for name, part in self.teacher.items():
            follow(part, getattr(self, name), rising(self.method.momentum, max(0.0, progress - 1 / self.steps)))
