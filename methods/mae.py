"""MAE: masked autoencoder (He et al., arXiv 2111.06377). The ViT sees a quarter of the patches, a light decoder paints the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from PIL import Image as PIL
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from harness.augment import Normalize, crop_resize, random_resized_crop_box
from harness.pictures import values_of
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Augment, Overrides, Recipe, UserError, ViTConfig, within
from harness.vit import ViT, init_mae, sincos_positions
from methods import ablations, published
from methods.dalle import STRIDE
from methods.masking import BlockMask, block_mask, fixed_size_box, grid_mask, noise_for, pick, scaled, shuffle_by
from methods.targets import Components, Pixels, Target, Tokens, tokenizer
from methods.views import drawn, jittered, recoloured, sample_of

if TYPE_CHECKING:
    import numpy as np

    from harness.plugins import TrainContext
    from harness.spec import Protocol


@dataclass(frozen=True)
class MAE:
    """Masked autoencoder. The defaults are those of the paper's best rows; `methods.ablations` has the others.

    Attributes:
        epochs: length under the paper protocols; the other protocols set their own.
        target: what hidden patches are predicted as: pixels, the largest `components` PCA coefficients of a patch, or the dVAE's tokens.
        masking: which patches are hidden: random ones, BEiT's blocks topped up with random ones to the ratio (ours: the paper does not
            say how it meets the ratio; measured: 0.6 of 147 patches are topped up on average), or all but one of each 2 x 2,
            the same one all over an image and drawn for each (ours).
        mask_tokens: where mask tokens enter: "decoder", so that the encoder sees visible patches only, or "encoder" (Table 1c).
        augmentation: "crop" of random size; "crop-fixed": 7/8 of the short side (the paper gives no size: ours); both with flips; "none":
            the central such crop; "crop-jitter": "crop" and colour jitter.
        mask_ratio: fraction of patches hidden; int(N * (1 - ratio)) are kept (recipes A1).
        decoder_width, decoder_depth, decoder_heads: the decoder; None: 512, 8, 16 for ViTs of the papers' size (recipes A1),
            half the ViT's width, 2 blocks and heads of 32 for narrower ones (ours).
        normalise_pixels: pixel targets are normalised per patch (the published 1600-epoch weights; recipes A1).
    """

    mask_ratio: float = 0.75
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    normalise_pixels: bool = True
    epochs: int = 800
    target: Literal["pixels", "pca", "tokens"] = "pixels"
    components: int = 96
    masking: Literal["random", "block", "grid"] = "random"
    mask_tokens: Literal["decoder", "encoder"] = "decoder"
    augmentation: Literal["crop", "crop-fixed", "none", "crop-jitter"] = "crop"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio must be between 0 and 1, not {self.mask_ratio}")
        within("mae's", self, decoder_width=(4, None), decoder_depth=(1, None), decoder_heads=(1, None), epochs=(1, None))
        within("mae's", self, components=(1, None), std=(1e-6, None))
        if self.masking == "grid" and self.mask_ratio != 0.75:
            raise UserError(f"grid masking hides 0.75 of the patches, mask_ratio cannot be {self.mask_ratio}")

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "masked autoencoder: the ViT sees 25 % of the patches, a light decoder predicts the pixels of the others"
    source: ClassVar[str] = "arXiv 2111.06377; facebookresearch/mae @ efb2a80 (recipes A1)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = ablations.variants(ablations.MAE)
    variant_sources: ClassVar[Mapping[str, str]] = ablations.sources(ablations.MAE)

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        """The tokenizer, for token targets."""
        return {"tokenizer": tokenizer(protocol, vit)} if self.target == "tokens" else {}

    def architecture(self, vit: ViTConfig, published: bool) -> ViTConfig:
        """As published: fixed sine-cosine positions (MAE-paper A.1; recipes A1)."""
        return replace(vit, positions="sincos-mae") if published else vit

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        """imagenet under paper: Table 9 for plain pixels and PCA; the evaluator's own recipe, FINETUNE.md's, is that of models with normalised pixels."""
        if evaluator != "imagenet" or protocol.family != "paper" or (self.target == "pixels" and self.normalise_pixels):
            return Overrides()
        tokens = Overrides(source="ours: FINETUNE.md's, made for normalised pixels; which recipe tokens had is not said (recipes A2)")
        return tokens if self.target == "tokens" else Overrides(variant="mae-table9")

    def skip(self, vit: ViTConfig) -> str | None:
        if int(vit.patches * (1 - self.mask_ratio)) < 1:
            return f"a grid of {vit.grid[0]}x{vit.grid[1]} patches leaves none visible at mask ratio {self.mask_ratio}"
        width, _, heads = self.decoder(vit)
        wrong = f"a decoder of width {width} cannot have {heads} heads: the width must be a multiple of the heads and of 4"
        return wrong if width % heads or width % 4 else None

    def decoder(self, vit: ViTConfig) -> tuple[int, int, int]:
        """Width, depth and heads of the decoder for a backbone."""
        width, depth, heads = (512, 8, 16) if vit.width >= 384 else (narrow := max(64, vit.width // 2 // 32 * 32), 2, narrow // 32)
        return self.decoder_width or width, self.decoder_depth or depth, self.decoder_heads or heads

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Pre-training values. paper: MAE-paper Table 8 (see `methods.published`); demo, smoke: ours, scaled down."""
        jitter = self.augmentation == "crop-jitter"
        if protocol.family == "paper":
            return published.mae_pretraining(vit, self.epochs, jitter)
        frozen, augment = published.fixed(vit), Augment(crop_scale=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4) if jitter else None)
        sources = (("batch, lr, length, warmup", "ours, scaled down"), ("betas, weight_decay, augment", "MAE-paper Table 8 (recipes A1)"))
        shared: dict[str, Any] = {"betas": (0.9, 0.95), "frozen": frozen, "augment": augment, "sources": sources}
        if protocol.family == "demo":
            return Recipe(batch=64, lr=2e-3, iterations=1200, warmup=80, **shared)
        return Recipe(batch=32, lr=1e-3, iterations=60, warmup=6, **shared) if protocol.family == "smoke" else None

    def drawn(self, vit: ViTConfig, recipe: Recipe) -> str:
        return drawn((vit.size, *(((STRIDE * vit.grid[0], STRIDE * vit.grid[1]),) if self.target == "tokens" else ())), recipe.augment)

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[PIL.Image, np.random.Generator], dict[str, Tensor]]:
        """Crop and flip -> {"image": uint8 (3, H, W), "noise": float32 (N,), whose order is the masking}, for tokens "tokenizer_image": (3, 8h, 8w).
        Of large views the objective does the jitter: they come as (H, W, 3) and with more (`methods.views.sample_of`)."""
        augment, view, later = recipe.augment, (STRIDE * vit.grid[0], STRIDE * vit.grid[1]), bool(self.drawn(vit, recipe))
        blocks = BlockMask(*vit.grid, vit.patches - int(vit.patches * (1 - self.mask_ratio)), scaled(16, vit.patches))

        def sample(image: PIL.Image, rng: np.random.Generator) -> dict[str, Tensor]:
            if self.augmentation in ("crop", "crop-jitter"):
                box = random_resized_crop_box(rng, image.height, image.width, augment.crop_scale, augment.crop_ratio)
            else:
                box = fixed_size_box(image.height, image.width, vit.size, 7 / 8, None if self.augmentation == "none" else rng)
            image, left_over = jittered(image, rng, augment.color_jitter, later)
            views = {"image": values_of(crop_resize(image, box, vit.size))}
            if self.target == "tokens":
                views["tokenizer_image"] = values_of(crop_resize(image, box, view, PIL.Resampling.LANCZOS))
            made = sample_of(views, self.augmentation != "none" and rng.random() < augment.flip, left_over)
            mask = None if self.masking == "random" else block_mask(rng, blocks) if self.masking == "block" else grid_mask(rng, *vit.grid)
            return {**made, "noise": torch.from_numpy(rng.random(vit.patches, dtype="float32") if mask is None else noise_for(mask, rng))}

        return sample

    def objective(self, vit: ViT | None, context: TrainContext) -> MAEObjective:
        assert vit is not None
        target: Target = Pixels(vit.config.patch, self.normalise_pixels)
        if self.target != "pixels":
            target = Tokens.read(context.assets["tokenizer"]) if self.target == "tokens" else Components(vit.config.patch, self.components)
        normalize = Normalize(self.mean, self.std)
        return MAEObjective(vit, self.mask_ratio, self.decoder(vit.config), target, normalize, self.mask_tokens == "encoder")


class LastBlock(Block):
    """The decoder's last block: its MLP runs for the tokens from `first` on only, no other's output is read. (B, 1 + N, D) -> (B, 1 + N - first, D)."""

    def forward(self, x: Tensor, first: int) -> Tensor:  # type: ignore[override]
        x = (x + self.attn(self.norm1(x)))[:, first:]
        return x + self.mlp(self.norm2(x))


class MAEObjective(nn.Module):
    """MAE's loss around a lent ViT; initialises both.

    Tokens stay in the order of the noise, visible ones first: the decoder adds each position's own embedding, and nothing is un-shuffled.

    Args:
        vit: encoder.
        ratio: fraction of patches hidden.
        decoder: width, depth, heads.
        target: what is predicted; True and False stand for pixels, normalised per patch or not.
        normalize: uint8 or float images -> network input.
        see_masks: the encoder gets all patches, a learned mask token in place of those hidden, and the decoder adds none.
    """

    def __init__(
        self, vit: ViT, ratio: float, decoder: tuple[int, int, int], target: Target | bool, normalize: nn.Module, see_masks: bool = False
    ) -> None:
        super().__init__()
        config = vit.config
        width, depth, heads = decoder
        self.vit, self.normalize, self.see_masks = vit, normalize, see_masks
        self.target = Pixels(config.patch, target) if isinstance(target, bool) else target
        self.kept = int(config.patches * (1 - ratio))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width if see_masks else width))
        kinds = (*[Block] * (depth - 1), LastBlock)
        self.decoder_blocks = nn.ModuleList(kind(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for kind in kinds)
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, self.target.outputs)
        self.register_buffer("decoder_positions", sincos_positions(width, config.grid), persistent=False)
        init_mae(vit)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            init_mae(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), indices of visible patches (B, K) -> tokens (B, 1 + K, D) after the final norm, in the order of `keep`."""
        return self.vit.encode(self.vit.place(self.vit.patches(images, keep), keep), keep)

    def latent(self, images: Tensor, order: Tensor) -> Tensor:
        """`encode` of the visible patches, the first of an order (B, N); of all, with mask tokens for those hidden, when the encoder sees masks."""
        if not self.see_masks:
            return self.encode(images, order[:, : self.kept])
        x = self.vit.patches(images)
        shown = torch.zeros_like(x[:, :, :1], dtype=torch.bool).scatter(1, order[:, : self.kept, None], True)  # (B, N, 1)
        x = self.vit.encode(self.vit.place(torch.where(shown, x, self.mask_token.to(x.dtype))))
        return torch.cat([x[:, :1], pick(x[:, 1:], order)], dim=1)

    def decode(self, latent: Tensor, order: Tensor, first: int) -> Tensor:
        """Encoder output (B, 1 + K, D), K may be N; all patches, visible ones first (B, N) -> pixels of the patches order[:, first:], (B, N - first, P*P*3)."""
        x = self.decoder_embed(latent)
        if not self.see_masks:
            x = torch.cat([x, self.mask_token.to(x.dtype).expand(x.shape[0], order.shape[1] + 1 - x.shape[1], -1)], dim=1)
        table: Tensor = self.decoder_positions  # type: ignore[assignment]
        x = x + torch.cat([table[:, :1].expand(x.shape[0], -1, -1), table[0, 1:][order]], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks[-1](x, 1 + first)))

    def prepare(self, batch: Mapping[str, Tensor]) -> None:
        """What is learned from images before the first step: the basis of PCA targets."""
        if isinstance(self.target, Components):
            self.target.learn(self.normalize(recoloured(batch)["image"]))

    def predict(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions for all patches row by row (B, N, P*P*3), and the mask (B, N), 1 where hidden. For pictures and tests."""
        order = shuffle_by(noise)
        restore = torch.argsort(order, dim=1)
        return pick(self.decode(self.latent(images, order), order, first=0), restore), (restore >= self.kept).to(images.dtype)

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Tensor]) -> np.ndarray | str:
        """The target's `sheet` of a batch."""
        images = self.normalize((batch := recoloured(batch))["image"])
        return self.target.sheet(batch, images, *self.predict(images, batch["noise"]), self.normalize)

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image": (B, 3, H, W) or see `sample_of`, "noise": (B, N)} -> {"loss": mean over the hidden patches, "weight": their number, ...}."""
        images = self.normalize((batch := recoloured(batch))["image"])
        order = shuffle_by(batch["noise"])
        prediction = self.decode(self.latent(images, order), order, first=self.kept)
        hidden = order[:, self.kept :]
        return self.target.loss(prediction, self.target(batch, images, hidden), torch.ones_like(hidden, dtype=torch.bool))
