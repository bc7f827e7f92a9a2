"""MAE: masked autoencoder (He et al., arXiv 2111.06377). The ViT sees a quarter of the patches, a light decoder paints the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from harness.augment import Normalize, crop_resize, random_resized_crop_box, to_tensor
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Overrides, Recipe, UserError, ViTConfig
from harness.vit import ViT, init_mae, sincos_positions
from methods.masking import normalise_patches, patch_pixels, pick, shuffle_by

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class MAE:
    """Masked autoencoder.

    Attributes:
        mask_ratio: fraction of patches hidden; int(N * (1 - ratio)) are kept (recipes A1).
        decoder_width, decoder_depth, decoder_heads: the decoder; None: 512, 8, 16 for ViTs of the papers' size (recipes A1),
            half the ViT's width, 2 blocks and heads of 32 for narrower ones (ours).
        normalise_pixels: targets are normalised per patch (the published 1600-epoch weights; recipes A1).
    """

    mask_ratio: float = 0.75
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    normalise_pixels: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio must be between 0 and 1, not {self.mask_ratio}")

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "masked autoencoder: the ViT sees 25 % of the patches, a light decoder predicts the pixels of the others"
    source: ClassVar[str] = "arXiv 2111.06377; facebookresearch/mae @ efb2a80 (recipes A1)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"pixels": {"normalise_pixels": False}}

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        return {}

    def transfer(self, evaluator: str, protocol: Protocol) -> Overrides:
        return Overrides()

    def skip(self, vit: ViTConfig) -> str | None:
        if int(vit.patches * (1 - self.mask_ratio)) < 1:
            return f"a grid of {vit.grid[0]}x{vit.grid[1]} patches leaves none visible at mask ratio {self.mask_ratio}"
        width, _, heads = self.decoder(vit)
        if width % heads or width % 4:
            return f"a decoder of width {width} cannot have {heads} heads: the width must be a multiple of the heads and of 4"
        return None

    def decoder(self, vit: ViTConfig) -> tuple[int, int, int]:
        """Width, depth and heads of the decoder for a backbone."""
        narrow = max(64, vit.width // 2 // 32 * 32)
        width, depth, heads = (512, 8, 16) if vit.width >= 384 else (narrow, 2, narrow // 32)
        return self.decoder_width or width, self.decoder_depth or depth, self.decoder_heads or heads

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Pre-training values. paper: recipes A1 (MAE-paper Table 8), 800 epochs as its ablations; demo, smoke: ours, scaled down."""
        frozen = ("vit.pos_embed",) if vit.positions.startswith("sincos") else ()
        augment = Augment(crop_scale=(0.2, 1.0))
        if protocol.family == "paper" and vit.size == (224, 224):
            table = "MAE-paper Table 8 (recipes A1)"
            return Recipe(
                batch=4096, lr=1.5e-4, lr_batch=256, epochs=800, warmup=40, betas=(0.9, 0.95), weight_decay=0.05, frozen=frozen, augment=augment,
                sources=(("batch, lr, warmup, betas, weight_decay, augment", table), ("epochs", "MAE-paper 4.1, ablations (recipes A1)")),
            )
        scaled_down = ("batch, lr, length, warmup", "ours, scaled down")
        taken = ("betas, weight_decay, augment", "MAE-paper Table 8 (recipes A1)")
        if protocol.family == "demo":
            return Recipe(
                batch=64, lr=2e-3, iterations=1200, warmup=80, betas=(0.9, 0.95), frozen=frozen, augment=augment, sources=(scaled_down, taken)
            )
        if protocol.family == "smoke":
            return Recipe(
                batch=32, lr=1e-3, iterations=60, warmup=6, betas=(0.9, 0.95), frozen=frozen, augment=augment, sources=(scaled_down, taken)
            )
        return None

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        """Crop and flip -> {"image": uint8 (3, H, W), "noise": float32 (N,) whose order is the random masking}."""
        augment = recipe.augment

        def sample(image: Image, rng: np.random.Generator) -> dict[str, Tensor]:
            box = random_resized_crop_box(rng, image.height, image.width, augment.crop_scale, augment.crop_ratio)
            pixels = to_tensor(crop_resize(image, box, vit.size))
            if rng.random() < augment.flip:
                pixels = pixels.flip(2)
            return {"image": pixels, "noise": torch.from_numpy(rng.random(vit.patches, dtype="float32"))}

        return sample

    def objective(self, vit: ViT | None, context: TrainContext) -> MAEObjective:
        assert vit is not None
        width, depth, heads = self.decoder(vit.config)
        return MAEObjective(vit, self.mask_ratio, (width, depth, heads), self.normalise_pixels, Normalize(self.mean, self.std))


class MAEObjective(nn.Module):
    """MAE's loss around a lent ViT; initialises both.

    Tokens stay in the order of the noise, visible ones first: the decoder adds each position's own embedding, so that nothing has to be
    un-shuffled. Its last MLP and its head run for hidden patches only, which no visible patch's prediction would change.

    Args:
        vit: encoder.
        ratio: fraction of patches hidden.
        decoder: width, depth, heads.
        normalise_pixels: see MAE.
        normalize: uint8 or float images -> network input.
    """

    def __init__(self, vit: ViT, ratio: float, decoder: tuple[int, int, int], normalise_pixels: bool, normalize: nn.Module) -> None:
        super().__init__()
        config = vit.config
        width, depth, heads = decoder
        self.vit, self.normalize, self.normalise_pixels = vit, normalize, normalise_pixels
        self.kept = int(config.patches * (1 - ratio))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = nn.ModuleList(Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, config.patch**2 * 3)
        self.register_buffer("decoder_positions", sincos_positions(width, config.grid), persistent=False)
        init_mae(vit)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            init_mae(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), indices of visible patches (B, K) -> tokens (B, 1 + K, D) after the final norm, in the order of `keep`."""
        return self.vit.encode(self.vit.place(self.vit.patches(images, keep), keep), keep)

    def decode(self, latent: Tensor, order: Tensor, first: int) -> Tensor:
        """Predicted pixels of the patches order[:, first:], (B, N - first, P*P*3).

        Args:
            latent: encoder output (B, 1 + K, D), class token first.
            order: all N patches, the K visible ones first (B, N).
        """
        x = self.decoder_embed(latent)
        hidden = self.mask_token.to(x.dtype).expand(x.shape[0], order.shape[1] + 1 - x.shape[1], -1)
        table: Tensor = self.decoder_positions  # type: ignore[assignment]
        positions = torch.cat([table[:, :1].expand(x.shape[0], -1, -1), table[0, 1:][order]], dim=1)
        x = torch.cat([x, hidden], dim=1) + positions
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        last: Any = self.decoder_blocks[-1]
        x = (x + last.attn(last.norm1(x)))[:, 1 + first :]
        x = x + last.mlp(last.norm2(x))
        return self.decoder_pred(self.decoder_norm(x))

    def targets(self, images: Tensor, index: Tensor) -> Tensor:
        """What is to be predicted for the patches `index` (B, K) of normalised images: (B, K, P*P*3)."""
        pixels = pick(patch_pixels(images, self.vit.config.patch), index)
        return normalise_patches(pixels) if self.normalise_pixels else pixels

    def predict(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions for all patches row by row (B, N, P*P*3), and the mask (B, N), 1 where hidden. For pictures and tests."""
        order = shuffle_by(noise)
        restore = torch.argsort(order, dim=1)
        prediction = self.decode(self.encode(images, order[:, : self.kept]), order, first=0)
        return pick(prediction, restore), (restore >= self.kept).to(images.dtype)

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image": (B, 3, H, W) uint8 or float, "noise": (B, N)} -> {"loss": mean squared error over the hidden patches}."""
        images = self.normalize(batch["image"])
        order = shuffle_by(batch["noise"])
        prediction = self.decode(self.encode(images, order[:, : self.kept]), order, first=self.kept)
        target = self.targets(images, order[:, self.kept :])
        return {"loss": F.mse_loss(prediction.to(target.dtype), target)}
