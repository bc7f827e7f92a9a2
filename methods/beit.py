"""BEiT: masked image modelling on discrete tokens (Bao et al., arXiv 2106.08254), and the same with pixels instead of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from PIL import Image as PIL
from torch import Tensor, nn

from harness.augment import Normalize, TrainTransform
from harness.classifier import FINE_TUNE_STD, Classifier
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Overrides, Recipe, UserError, ViTConfig, within
from harness.vit import ViT, init_beit
from methods import ablations, published
from methods.dalle import STRIDE
from methods.masking import Algorithm1, BlockMask, block_mask, masked_indices, pick, random_mask, scaled
from methods.targets import Pixels, Target, Tokens, tokenizer
from methods.views import drawn, recoloured, same_box

if TYPE_CHECKING:
    import numpy as np

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class BEiT:
    """BEiT pre-training. Numbers of patches are those of the papers' 14 x 14 grid and scale with the grid.

    Attributes:
        target: what is predicted, the dVAE's tokens or the pixels of the patch.
        masking: rectangles as in BEiT's code, as in its paper's Algorithm 1 (40 % or more hidden), random patches, or nothing hidden (recipes A6, A8).
        recover: where the loss is computed: masked patches, or all (recipes A8).
        mask_patches, mask_minimum: most patches hidden, and the smallest rectangle (recipes A6: 75 and 16 of 196).
        normalise_pixels: pixel targets normalised per patch, as MAE's; the paper does not say (ours: not).
        epochs: length under the paper protocols; the other protocols set their own.
        layer_scale, relative_bias: BEiT+ (recipes A6): LayerScale, 0.1 for Base and 1e-5 for Large; one relative position bias for all blocks in
            place of positions that are added. They change the ViT under any protocol.
        intermediate: trains on from this BEiT on the labels of its images, with BEiT's fine-tuning recipe (BEiT-paper Tables 3 and 11).
        init_std: standard deviation of the ViT's initial weights before truncation. None: the paper's 0.02, and 0.2 for a ViT under 384 wide
            (ours; see `deviation`).
    """

    target: Literal["tokens", "pixels"] = "tokens"
    masking: Literal["block", "algorithm-1", "random", "none"] = "block"
    recover: Literal["masked", "all"] = "masked"
    mask_patches: int = 75
    mask_minimum: int = 16
    normalise_pixels: bool = False
    epochs: int = 800
    layer_scale: bool = False
    relative_bias: bool = False
    intermediate: bool = False
    init_std: float | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        within("beit's", self, mask_patches=(1, None), mask_minimum=(1, None), epochs=(1, None), init_std=(1e-6, None), std=(1e-6, None))

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "masked image modelling: tokens of a discrete VAE predicted for block-wise masked patches (40 %)"
    source: ClassVar[str] = "arXiv 2106.08254; microsoft/unilm @ 768a3c8, beit/ (recipes A6)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = ablations.variants(ablations.BEIT)
    variant_sources: ClassVar[Mapping[str, str]] = ablations.sources(ablations.BEIT)

    @property
    def parent(self) -> BEiT | None:
        """The BEiT without labels that intermediate fine-tuning starts from."""
        return replace(self, intermediate=False) if self.intermediate else None

    @property
    def needs_labels(self) -> bool:
        return self.intermediate

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        """The tokenizer, for token targets."""
        return {"tokenizer": tokenizer(protocol, vit)} if self.target == "tokens" and not self.intermediate else {}

    def architecture(self, vit: ViTConfig, published: bool) -> ViTConfig:
        """As published: learned positions, no bias of keys (BEiT-paper 2.2; recipes A6). BEiT+ by its fields; once fine-tuned a bias per block (A7)."""
        if published:
            vit = replace(vit, positions="learned", key_bias=False)
        if self.layer_scale:
            vit = replace(vit, layer_scale=0.1 if vit.depth <= 12 else 1e-5)
        if self.relative_bias:
            vit = replace(vit, positions="none", relative_bias="block" if self.intermediate else "shared")
        return vit

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        """imagenet under paper: BEiT-paper Table 13 (recipes A7); cifar100's own recipe is BEiT's. What was fine-tuned on ImageNet is scored as it is."""
        if evaluator == "imagenet" and self.intermediate:
            return Overrides(use_head=True, source="BEiT-paper Table 13: the intermediate fine-tuning is that on ImageNet-1K")
        return Overrides(variant="beit" if protocol.family == "paper" and evaluator == "imagenet" else "")

    def skip(self, vit: ViTConfig) -> str | None:
        if self.masking == "none" and self.recover == "masked":
            return "nothing is masked, so there is nothing to predict: set recover=all"
        if self.masking in ("block", "algorithm-1") and min(vit.grid) < 3:
            return f"a grid of {vit.grid[0]}x{vit.grid[1]} patches is too small for block-wise masking"
        return None

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Pre-training values. paper: BEiT-paper Tables 12 and 13 (see `methods.published`); demo, smoke: ours, scaled down."""
        if protocol.family == "paper":
            return published.as_evaluated("imagenet@beit", protocol, vit) if self.intermediate else published.beit_pretraining(vit, self.epochs)
        shared: dict[str, Any] = {"no_decay": published.NO_DECAY, "frozen": published.fixed(vit), "clip": 3.0}
        table = "BEiT-paper Table 12, BEiT-repo run_beit_pretraining.py (recipes A6)"
        sources: tuple[tuple[str, str], ...]
        if self.intermediate and protocol.family in ("demo", "smoke"):
            demo, sources = protocol.family == "demo", (("all", "ours: as the demo's fine-tuning, longer"),)
            shared |= {"clip": None, "layer_decay": 0.9, "augment": Augment(crop_scale=(0.2, 1.0), smoothing=0.1)}
            return Recipe(batch=32, lr=3e-3 if demo else 1e-3, iterations=400 if demo else 30, warmup=30 if demo else 3, sources=sources, **shared)
        sources = (("batch, lr, length, warmup, drop_path, crop_scale", "ours, scaled down"), ("betas, weight_decay, no_decay, clip, jitter", table))
        shared["augment"] = Augment(crop_scale=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4))
        if protocol.family == "demo":
            return Recipe(batch=32, lr=3e-3, iterations=1800, warmup=120, sources=sources, **shared)
        if protocol.family == "smoke":
            return Recipe(batch=32, lr=1e-3, iterations=40, warmup=5, sources=sources, **shared)
        return None

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[PIL.Image, np.random.Generator], dict[str, Tensor]]:
        """Jitter, flip, one crop box -> {"image": uint8 (3, H, W), "mask": bool (N,)}, and for tokens "tokenizer_image": uint8 (3, 8h, 8w).
        Of large views the objective does the jitter: they come as (H, W, 3), with "jitter", "whole" and "mirrored" (`methods.views.sample_of`)."""
        if self.intermediate:
            return TrainTransform(vit.size, recipe.augment)
        blocks = self.blocks(vit)
        wanted = self.wanted(vit)

        def sample(image: PIL.Image, rng: np.random.Generator) -> dict[str, Tensor]:
            made = same_box(image, rng, recipe.augment, wanted)
            if self.masking in ("block", "algorithm-1"):
                made["mask"] = torch.from_numpy(block_mask(rng, blocks if self.masking == "block" else Algorithm1(*vit.grid, blocks.minimum)))
            else:
                made["mask"] = torch.from_numpy(random_mask(rng, vit.patches, blocks.target if self.masking == "random" else 0))
            return made

        return sample

    def wanted(self, vit: ViTConfig) -> dict[str, tuple[tuple[int, int], PIL.Resampling]]:
        """Size and filter of the views."""
        wanted = {"image": (vit.size, PIL.Resampling.BICUBIC)}
        if self.target == "tokens":
            wanted["tokenizer_image"] = ((STRIDE * vit.grid[0], STRIDE * vit.grid[1]), PIL.Resampling.LANCZOS)
        return wanted

    def drawn(self, vit: ViTConfig, recipe: Recipe) -> str:
        return "" if self.intermediate else drawn((size for size, _ in self.wanted(vit).values()), recipe.augment)

    def blocks(self, vit: ViTConfig) -> BlockMask:
        """The mask generator for a backbone."""
        return BlockMask(*vit.grid, scaled(self.mask_patches, vit.patches), scaled(self.mask_minimum, vit.patches))

    def deviation(self, vit: ViTConfig) -> float:
        """Standard deviation of the initial weights.

        With 0.02 a narrow ViT starts, and after a short pre-training ends, with weights a third of the other methods', and the learning
        rate that suits those in fine-tuning wipes out what it has learned. Demo, held-out ADE20K, seed 11: scratch 38.3 mIoU, BEiT from
        0.02 39.5, from 0.1 41.4, from 0.2 41.0.
        """
        if self.init_std is not None:
            return self.init_std
        return 0.02 if vit.width >= 384 else 0.2

    def objective(self, vit: ViT | None, context: TrainContext) -> nn.Module:
        """The loss around the ViT, or for intermediate fine-tuning a classifier on the parent's weights.

        Raises:
            UserError: intermediate fine-tuning on images without labels.
        """
        assert vit is not None
        config = vit.config
        if self.intermediate:
            if not context.classes:
                raise UserError("--methods beit@intermediate: its training images have no labels: drop it, or give --data with class folders")
            return Classifier(vit, context.classes, mean=self.mean, std=self.std, augment=context.recipe.augment, head_std=FINE_TUNE_STD)
        limit = None if self.recover == "all" else config.patches if self.masking == "algorithm-1" else self.blocks(config).target
        targets: Target = Tokens.read(context.assets["tokenizer"]) if self.target == "tokens" else Pixels(config.patch, self.normalise_pixels)
        return BEiTObjective(vit, targets, limit, Normalize(self.mean, self.std), self.deviation(config))


@dataclass(frozen=True)
class BEiTPixel(BEiT):
    """BEiT with masked-pixel regression: the row "- Visual tokens" of BEiT's Table 4 (recipes A8). MSE on plain pixels is ours: the paper does not say."""

    target: Literal["tokens", "pixels"] = "pixels"

    summary: ClassVar[str] = "BEiT with the pixels of masked patches as targets instead of tokens"
    source: ClassVar[str] = "BEiT-paper Table 4, row '- Visual tokens' (recipes A8); loss and pixel scale ours"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"random": {"masking": "random"}, "normalised": {"normalise_pixels": True}}
    variant_sources: ClassVar[Mapping[str, str]] = {
        "random": "BEiT-paper Table 4, '- Visual tokens - Blockwise masking', at 800 epochs", "normalised": "ours: MAE's normalised pixels",
    }


class BEiTObjective(nn.Module):
    """BEiT's loss around a lent ViT; initialises both.

    Args:
        vit: encoder; it sees all patches, a learned mask token in place of those hidden.
        targets: Tokens or Pixels.
        limit: most patches that a mask may hide; predictions are made for so many places (static shape), the rest is ignored. None: the
            loss is over all patches, hidden or not.
        normalize: uint8 or float images -> network input.
        std: deviation of the ViT's initial weights before truncation at one deviation; the mask token's and the head's is 0.02.
    """

    def __init__(self, vit: ViT, targets: Target, limit: int | None, normalize: nn.Module, std: float = 0.02) -> None:
        super().__init__()
        self.vit, self.targets, self.limit, self.normalize = vit, targets, limit, normalize
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.config.width))
        self.head = nn.Linear(vit.config.width, targets.outputs)
        init_beit(vit, std)
        for parameter in (self.mask_token, self.head.weight):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.head.bias)

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) and mask (B, N) -> patch tokens after the final norm (B, N, D)."""
        x = self.vit.patches(images)
        x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        return self.vit.encode(self.vit.place(x))[:, 1:]

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image": (B, 3, H, W), or see `sample_of`, "mask": (B, N) bool, ...} -> {"loss", "weight": number of predictions, and "accuracy" for tokens}."""
        batch = recoloured(batch)
        images, mask = self.normalize(batch["image"]), batch["mask"]
        index, valid = masked_indices(mask, mask.shape[1] if self.limit is None else self.limit)
        if self.limit is None:
            valid = torch.ones_like(valid)
        prediction = self.head(pick(self.encode(images, mask), index))
        return self.targets.loss(prediction, self.targets(batch, images, index), valid)

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Tensor]) -> np.ndarray | str:
        """The targets' `sheet` of a batch; words where nothing is hidden."""
        if not batch["mask"].any():
            return "nothing is hidden from it"
        batch = recoloured(batch)
        training, images = self.training, self.normalize(batch["image"])
        prediction = self.eval().head(self.encode(images, batch["mask"]))  # without drop path
        self.train(training)
        return self.targets.sheet(batch, images, prediction, batch["mask"], self.normalize)
