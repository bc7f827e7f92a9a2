"""MoCo v3: contrastive learning of two views with a momentum encoder (Chen et al., arXiv 2104.02057). Keys are the global batch's own, there is no queue."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image as PIL
from torch import Tensor, nn

from harness.augment import Normalize
from harness.batches import BatchNorm
from harness.classifier import single
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Overrides, Recipe, ViTConfig, within
from harness.vit import ViT
from methods import published
from methods.teacher import follow, gathered, rising
from methods.views import View, make

if TYPE_CHECKING:
    import numpy as np

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class MoCoV3:
    """MoCo v3 on a ViT, as its code has it.

    Attributes:
        temperature: of the contrastive loss.
        momentum: of the encoder of the keys at the start; it rises to 1 in half a cosine (`--moco-m-cos`; recipes A13).
        freeze_patches: the patch projection stays as it is drawn (`--stop-grad-conv1`).
        hidden, output: widths of projector and predictor; None: 4096 and 256 for ViTs of the papers' size (recipes A13), 4 x the ViT's and 64 for
            narrower ones (ours).
        epochs: length under the paper protocols; the other protocols set their own.
    """

    temperature: float = 0.2
    momentum: float = 0.99
    freeze_patches: bool = True
    hidden: int | None = None
    output: int | None = None
    epochs: int = 300
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        within("moco-v3's", self, temperature=(1e-3, None), momentum=(0, 1), hidden=(1, None), output=(1, None), epochs=(1, None), std=(1e-6, None))

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "contrastive: a view's class token finds the other view of its image in the batch, encoded by a momentum encoder"
    source: ClassVar[str] = "arXiv 2104.02057; facebookresearch/moco-v3 @ c349e6e (recipes A13)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"600": {"epochs": 600}, "train-patches": {"freeze_patches": False}}
    variant_sources: ClassVar[Mapping[str, str]] = {
        "600": "MoCo3-paper 6.2, 600 epochs", "train-patches": "MoCo3-paper 4, a learned patch projection (less stable)",
    }

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        return {}

    def architecture(self, vit: ViTConfig, published: bool) -> ViTConfig:
        """As published: fixed sine-cosine positions, rows first; ViT-S has 12 heads (recipes A13)."""
        return replace(vit, positions="sincos-moco", heads=12 if vit.width == 384 else vit.heads) if published else vit

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        """Under paper its own: MoCo3-paper Table 5 with DeiT's code, MoCo3-repo transfer/README.md (recipes A11, A13), main_lincls.py."""
        return Overrides(variant="mocov3" if protocol.family == "paper" and evaluator in ("imagenet", "cifar100", "linear") else "")

    def skip(self, vit: ViTConfig) -> str | None:
        return None

    def widths(self, vit: ViTConfig) -> tuple[int, int]:
        """Hidden and output width of the heads for a backbone."""
        hidden, output = (4096, 256) if vit.width >= 384 else (4 * vit.width, 64)
        return self.hidden or hidden, self.output or output

    def facts(self, vit: ViT, context: TrainContext) -> Mapping[str, Any]:
        """Two crops of each image are seen: told by the fairness audit."""
        return {"crops_seen": 2 * context.total_steps * context.recipe.batch}

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Pre-training values. paper: MoCo3-repo CONFIG.md (see `methods.published`); demo, smoke: ours, scaled down."""
        frozen = published.fixed(vit) + (("vit.patch_embed.*",) if self.freeze_patches else ())
        if protocol.family == "paper":
            return published.mocov3_pretraining(vit, self.epochs, frozen)
        augment = Augment(crop_scale=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.2))
        sources = (("batch, lr, length, warmup, crop_scale", "ours, scaled down, not tuned: as long as mae and beit together"),
                   ("weight_decay, betas, jitter", "MoCo3-repo CONFIG.md (recipes A13)"))
        shared: dict[str, Any] = {"weight_decay": 0.1, "decay_vectors": True, "frozen": frozen, "augment": augment, "sources": sources}
        if protocol.family == "demo":
            return Recipe(batch=64, lr=1.5e-3, iterations=700, warmup=70, **shared)
        if protocol.family == "smoke":
            return Recipe(batch=32, lr=1e-3, iterations=20, warmup=3, **shared)
        return None

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[PIL.Image, np.random.Generator], dict[str, Tensor]]:
        """Two views, the first always blurred, the second solarised at times -> {"views": uint8 (2, 3, H, W)} (BYOL's asymmetry; recipes A13)."""
        pixel = max(vit.size) / 224
        first, second = (View(vit.size, recipe.augment.crop_scale, blur, solarize, pixel) for blur, solarize in ((1.0, 0.0), (0.1, 0.2)))

        def sample(image: PIL.Image, rng: np.random.Generator) -> dict[str, Tensor]:
            return {"views": torch.stack([make(image, rng, view, recipe.augment, PIL.Resampling.BILINEAR) for view in (first, second)])}

        return sample

    def objective(self, vit: ViT | None, context: TrainContext) -> MoCoV3Objective:
        assert vit is not None
        return MoCoV3Objective(vit, *self.widths(vit.config), self.temperature, self.momentum, Normalize(self.mean, self.std))


class MoCoV3Objective(nn.Module):
    """MoCo v3's loss around a lent ViT; initialises it, and starts the encoder of the keys as its copy.

    The encoder of the keys is stepped after the optimiser, which is where the original has it before the next keys: step 0 finds both equal.

    Args:
        vit: encoder of the queries.
        hidden, output: widths of the projector (3 layers) and of the predictor (2).
        temperature: tau of the loss.
        momentum: of the encoder of the keys at the start.
        normalize: uint8 or float images -> network input.
    """

    batch_coupled = gathers = True

    def __init__(self, vit: ViT, hidden: int, output: int, temperature: float, momentum: float, normalize: nn.Module) -> None:
        super().__init__()
        init_mocov3(vit)
        self.vit, self.temperature, self.momentum, self.normalize = vit, temperature, momentum, normalize
        self.projector, self.predictor = head(vit.config.width, hidden, hidden, output), head(output, hidden, output)
        self.teacher = nn.ModuleDict({"vit": copy.deepcopy(vit), "projector": copy.deepcopy(self.projector)}).requires_grad_(False)

    def after_step(self, progress: float) -> None:
        """The encoder of the keys follows that of the queries."""
        for name, part in self.teacher.items():
            follow(part, getattr(self, name), rising(self.momentum, progress))

    def vectors(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Queries and keys (B, C), two of each, of normalised views (2, B, 3, H, W). Batch norms see one view at a time."""
        images = x.flatten(0, 1)
        queries = [self.predictor(self.projector(f)) for f in self.vit(images).chunk(2)]
        with torch.no_grad():
            keys = [self.teacher["projector"](f) for f in self.teacher["vit"](images).chunk(2)]
        return queries, keys

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"views": (B, 2, 3, H, W) uint8 or float} -> {"loss": of both directions, "accuracy": queries that find their key}."""
        views = batch["views"].transpose(0, 1)
        (q1, q2), (k1, k2) = self.vectors(self.normalize(views.flatten(0, 1)).unflatten(0, views.shape[:2]))
        losses, found = zip(*(contrast(q, k, self.temperature) for q, k in ((q1, k2), (q2, k1))), strict=True)
        return {"loss": losses[0] + losses[1], "accuracy": (found[0] + found[1]) / 2}


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(2 tau x cross entropy, accuracy) of queries (B, C) among the keys of all processes, each with its own image's as the right one."""
    with torch.autocast(queries.device.type, enabled=False):
        every, first = gathered(F.normalize(single(keys), dim=1))
        scores = F.normalize(single(queries), dim=1) @ every.T / temperature
        right = torch.arange(first, first + len(queries), device=scores.device)
        return 2 * temperature * F.cross_entropy(scores, right), (scores.argmax(dim=1) == right).to(scores.dtype).mean()


def head(*widths: int) -> nn.Sequential:
    """Linear layers without bias, each with a batch norm, ReLU between; the last norm has no affine parameters."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        layers += [nn.Linear(a, b, bias=False), BatchNorm(b, affine=not last), *(() if last else (nn.ReLU(),))]
    return nn.Sequential(*layers)


def init_mocov3(vit: ViT) -> None:
    """MoCo v3's initialisation (MoCo3-repo vits.py): Xavier-uniform, q, k and v each for itself, patch projection as a matrix; class token normal 1e-6."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            outputs = module.weight.shape[0] // (3 if name.endswith("qkv") else 1)
            bound = math.sqrt(6 / (outputs + module.weight.shape[1]))
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    weight = vit.patch_embed.proj.weight
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
    nn.init.zeros_(vit.patch_embed.proj.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
