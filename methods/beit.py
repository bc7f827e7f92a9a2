"""BEiT: masked image modelling on discrete tokens (Bao et al., arXiv 2106.08254), and the same with pixels instead of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image as PIL
from torch import Tensor, nn

from harness.augment import Normalize, color_jitter, crop_resize, random_resized_crop_box, to_tensor
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Overrides, Recipe, ViTConfig
from harness.vit import ViT, init_beit
from methods.dalle import STRIDE, Tokenizer, load_tokenizer
from methods.dvae import for_grid
from methods.masking import BlockMask, block_mask, masked_indices, normalise_patches, patch_pixels, pick, random_mask, scaled

if TYPE_CHECKING:
    import numpy as np

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class BEiT:
    """BEiT pre-training. Numbers of patches are those of the papers' 14 x 14 grid and scale with the grid.

    Attributes:
        target: what is predicted, the dVAE's tokens or the pixels of the patch.
        masking: rectangles as in BEiT's code, the same number of random patches, or nothing hidden (recipes A8, Table 4).
        recover: where the loss is computed: masked patches, or all (recipes A8).
        mask_patches, mask_minimum: most patches hidden, and the smallest rectangle (recipes A6: 75 and 16 of 196).
        normalise_pixels: pixel targets normalised per patch, as MAE's; the paper does not say (ours: not).
        init_std: standard deviation of the ViT's initial weights before truncation. None: the paper's 0.02, and 0.2 for a ViT under 384 wide
            (ours; see `deviation`).
    """

    target: Literal["tokens", "pixels"] = "tokens"
    masking: Literal["block", "random", "none"] = "block"
    recover: Literal["masked", "all"] = "masked"
    mask_patches: int = 75
    mask_minimum: int = 16
    normalise_pixels: bool = False
    init_std: float | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "masked image modelling: tokens of a discrete VAE predicted for block-wise masked patches (40 %)"
    source: ClassVar[str] = "arXiv 2106.08254; microsoft/unilm @ 768a3c8, beit/ (recipes A6)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "random": {"masking": "random"}, "all": {"recover": "all"}, "unmasked": {"masking": "none", "recover": "all"},
    }

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        """The tokenizer, for token targets."""
        return {"tokenizer": Asset(maker=for_grid(protocol, vit))} if self.target == "tokens" else {}

    def transfer(self, evaluator: str, protocol: Protocol) -> Overrides:
        return Overrides()

    def skip(self, vit: ViTConfig) -> str | None:
        if self.masking == "none" and self.recover == "masked":
            return "nothing is masked, so there is nothing to predict: set recover=all"
        if self.masking == "block" and min(vit.grid) < 3:
            return f"a grid of {vit.grid[0]}x{vit.grid[1]} patches is too small for block-wise masking"
        return None

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Pre-training values. paper: recipes A6 (BEiT-paper Table 12, IN-1K, ViT-B or ViT-L); demo, smoke: ours, scaled down."""
        frozen = ("vit.pos_embed",) if vit.positions.startswith("sincos") else ()
        shared: dict[str, Any] = {
            "no_decay": ("vit.pos_embed", "vit.cls_token"), "frozen": frozen, "clip": 3.0 if vit.width <= 768 else 1.0,
            "augment": Augment(crop_scale=(0.08, 1.0), color_jitter=(0.4, 0.4, 0.4)),
        }
        table = "BEiT-paper Table 12, BEiT-repo run_beit_pretraining.py (recipes A6)"
        if protocol.family == "paper" and vit.size == (224, 224):
            return Recipe(batch=2048, lr=1.5e-3, epochs=800, warmup=10, min_lr=1e-5, drop_path=0.1, sources=(("all", table),), **shared)
        sources = (("batch, lr, length, warmup, drop_path, crop_scale", "ours, scaled down"), ("betas, weight_decay, no_decay, clip, jitter", table))
        shared["augment"] = Augment(crop_scale=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4))
        if protocol.family == "demo":
            return Recipe(batch=32, lr=3e-3, iterations=1800, warmup=120, sources=sources, **shared)
        if protocol.family == "smoke":
            return Recipe(batch=32, lr=1e-3, iterations=40, warmup=5, sources=sources, **shared)
        return None

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[PIL.Image, np.random.Generator], dict[str, Tensor]]:
        """Jitter, flip, one crop box -> {"image": uint8 (3, H, W), "mask": bool (N,)}, and for tokens "tokenizer_image": uint8 (3, 8h, 8w)."""
        blocks = self.blocks(vit)
        view = (STRIDE * vit.grid[0], STRIDE * vit.grid[1])

        def sample(image: PIL.Image, rng: np.random.Generator) -> dict[str, Tensor]:
            if recipe.augment.color_jitter is not None:
                image = color_jitter(image, rng, recipe.augment.color_jitter)
            if rng.random() < recipe.augment.flip:
                image = image.transpose(PIL.Transpose.FLIP_LEFT_RIGHT)
            box = random_resized_crop_box(rng, image.height, image.width, recipe.augment.crop_scale, recipe.augment.crop_ratio)
            made = {"image": to_tensor(crop_resize(image, box, vit.size))}
            if self.target == "tokens":
                made["tokenizer_image"] = to_tensor(crop_resize(image, box, view, PIL.Resampling.LANCZOS))
            if self.masking == "block":
                made["mask"] = torch.from_numpy(block_mask(rng, blocks))
            else:
                made["mask"] = torch.from_numpy(random_mask(rng, vit.patches, blocks.target if self.masking == "random" else 0))
            return made

        return sample

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

    def objective(self, vit: ViT | None, context: TrainContext) -> BEiTObjective:
        assert vit is not None
        config = vit.config
        limit = self.blocks(config).target if self.recover == "masked" else None
        targets = Tokens(load_tokenizer(context.assets["tokenizer"])) if self.target == "tokens" else Pixels(config.patch, self.normalise_pixels)
        return BEiTObjective(vit, targets, limit, Normalize(self.mean, self.std), self.deviation(config))


@dataclass(frozen=True)
class BEiTPixel(BEiT):
    """BEiT with masked-pixel regression: the row "- Visual tokens" of BEiT's Table 4 (recipes A8). MSE on plain pixels is ours: the paper does not say."""

    target: Literal["tokens", "pixels"] = "pixels"

    summary: ClassVar[str] = "BEiT with the pixels of masked patches as targets instead of tokens"
    source: ClassVar[str] = "BEiT-paper Table 4, row '- Visual tokens' (recipes A8); loss and pixel scale ours"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"random": {"masking": "random"}, "normalised": {"normalise_pixels": True}}


class Tokens:
    """Targets of token prediction. Holds the tokenizer outside the objective's modules: it is neither trained nor saved with it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.outputs = tokenizer, tokenizer.codes

    def __call__(self, batch: Mapping[str, Tensor], images: Tensor, index: Tensor) -> Tensor:
        """Tokens (B, K) of the patches `index` (B, K)."""
        view = batch["tokenizer_image"]
        if next(self.tokenizer.parameters()).device != view.device:
            self.tokenizer.to(view.device)
        return self.tokenizer(view).gather(1, index)

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy over the valid places of the whole batch, and the accuracy there."""
        target = target.masked_fill(~valid, -100)
        logits = prediction.to(torch.promote_types(prediction.dtype, torch.float32))  # never in half precision
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        return {"loss": loss, "accuracy": (prediction.detach().argmax(-1) == target).sum() / valid.sum()}


class Pixels:
    """Targets of pixel regression: the normalised image's pixels, patch by patch."""

    def __init__(self, patch: int, normalise: bool) -> None:
        self.patch, self.normalise, self.outputs = patch, normalise, patch**2 * 3

    def __call__(self, batch: Mapping[str, Tensor], images: Tensor, index: Tensor) -> Tensor:
        """Pixels (B, K, P*P*3) of the patches `index` (B, K) of normalised images."""
        pixels = pick(patch_pixels(images, self.patch), index)
        return normalise_patches(pixels) if self.normalise else pixels

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Mean squared error over the valid places."""
        error = (prediction.to(target.dtype) - target).pow(2).mean(dim=-1)
        return {"loss": (error * valid).sum() / valid.sum()}


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

    def __init__(self, vit: ViT, targets: Tokens | Pixels, limit: int | None, normalize: nn.Module, std: float = 0.02) -> None:
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
        """{"image": (B, 3, H, W), "mask": (B, N) bool, ...} -> {"loss", and "accuracy" for tokens}."""
        images, mask = self.normalize(batch["image"]), batch["mask"]
        index, valid = masked_indices(mask, mask.shape[1] if self.limit is None else self.limit)
        if self.limit is None:
            valid = torch.ones_like(valid)
        prediction = self.head(pick(self.encode(images, mask), index))
        return self.targets.loss(prediction, self.targets(batch, images, index), valid)
