"""dVAE: the node that trains a discrete image tokenizer of DALL-E's architecture (Ramesh et al., arXiv 2102.12092)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.augment import TrainTransform
from harness.spec import Augment, JobFailed, Recipe, UserError, ViTConfig, within
from methods.codebook import start_from_images
from methods.dalle import STRIDE, Decoder, Encoder, decode, logit_laplace, map_pixels, save_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from harness.plugins import TrainContext
    from harness.spec import Protocol
    from harness.vit import ViT

VALUES = STRIDE**2 * 3  # pixel values per token: divergences per token are divided by it, as the likelihood is per value


@dataclass(frozen=True)
class DVAE:
    """Maker of a tokenizer. The defaults are DALL-E's; those for a grid of patches and a protocol come from `for_grid`.

    Attributes:
        size: (height, width) of its input in pixels, 8 per token.
        codes, width, blocks, initial: codebook, first width, blocks per group, width after the decoder's first layer.
        kl_weight, kl_span: weight of the KL divergence from the uniform prior, and the fraction of training over which it rises from 0.
        temperature_start, temperature, temperature_span: of the Gumbel-softmax at the start and at the end, and the fraction of training between.
        usage_weight: weight of the divergence of the codes' *average* distribution over a batch from the uniform (ours; 0 in DALL-E). It
            keeps codes alive without asking each position to be undecided, which the KL term does.
        spread: deviation of each code's logit over the first batch (see `methods.codebook`); 0 keeps DALL-E's initialisation.
        holdout: fraction of the images kept from training, for `check`.
    """

    size: tuple[int, int] = (112, 112)
    codes: int = 8192
    width: int = 256
    blocks: int = 2
    initial: int = 128
    kl_weight: float = 6.6
    kl_span: float = 0.2
    temperature_start: float = 1.0
    temperature: float = 1 / 16
    temperature_span: float = 1.0
    usage_weight: float = 0.0
    spread: float = 0.0
    holdout: float = 0.05

    def __post_init__(self) -> None:
        if any(side < STRIDE or side % STRIDE for side in self.size):
            raise UserError(f"dvae's size must be multiples of {STRIDE} pixels, not {self.size[0]}x{self.size[1]}")
        within("dvae's", self, codes=(2, None), width=(8, None), blocks=(1, None), initial=(1, None), kl_weight=(0, None), kl_span=(0, 1),
               usage_weight=(0, None), temperature_start=(1e-3, None), temperature=(1e-3, None), temperature_span=(0, 1), spread=(0, None), holdout=(0, 0.9))

    name: ClassVar[str] = "dvae"
    version: ClassVar[int] = 1
    distributed: ClassVar[bool] = False  # see `DVAEObjective.batch_coupled`
    summary: ClassVar[str] = "discrete VAE of the DALL-E architecture: images to tokens"
    source: ClassVar[str] = "arXiv 2102.12092; openai/DALL-E @ 5be4b23 (recipes A16)"

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """demo, smoke: ours, with DALL-E's optimiser. None for others: at the papers' scale the tokenizer is DALL-E's own."""
        shared: dict[str, Any] = {
            "weight_decay": 1e-4, "clip": 1.0, "precision": "fp32", "augment": Augment(crop_scale=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4)),
            "sources": (("batch, lr, length, warmup, clip, augment", "ours"), ("betas, eps, weight_decay", "DALLE-paper A.2 (recipes A16)")),
        }
        if protocol.family == "demo":
            return Recipe(batch=8, lr=3e-3, iterations=800, warmup=20, **shared)
        if protocol.family == "smoke":
            return Recipe(batch=8, lr=1.5e-3, iterations=110, warmup=5, **shared)
        return None

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        """Crop, flip and BEiT's colour jitter, so that the codes cover what BEiT shows to the tokenizer."""
        return TrainTransform(self.size, recipe.augment)

    def objective(self, vit: ViT | None, context: TrainContext) -> DVAEObjective:
        return DVAEObjective(self)


def for_grid(protocol: Protocol, vit: ViTConfig) -> DVAE:
    """The tokenizer for a backbone: 8 pixels per patch of its grid; under demo and smoke one that a core trains in a minute or in seconds (ours)."""
    size = (STRIDE * vit.grid[0], STRIDE * vit.grid[1])
    if protocol.family == "demo":
        return DVAE(size, codes=256, width=16, blocks=1, initial=64, kl_weight=0.0, usage_weight=30.0, spread=8.0)
    if protocol.family == "smoke":
        return DVAE(size, codes=128, width=8, blocks=1, initial=64, kl_weight=0.0, usage_weight=40.0, spread=15.0, temperature_start=0.5, holdout=0.1)
    return DVAE(size)


class DVAEObjective(nn.Module):
    """Evidence lower bound with relaxed codes: logit-Laplace likelihood and KL to the uniform prior (DALLE-paper 2.1, A.2).

    The temperature falls and the KL weight rises along half cosines of the progress.
    """

    batch_coupled = True  # the codes of a whole batch are to be used evenly, and a start from images is made from one batch

    def __init__(self, maker: DVAE) -> None:
        super().__init__()
        self.maker = maker
        self.encoder = Encoder(maker.width, maker.codes, maker.blocks)
        self.decoder = Decoder(maker.width, maker.codes, maker.blocks, maker.initial)
        self.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image": uint8 (B, 3, 8h, 8w)} -> loss; recon, kl, unused, perplexity (of the batch's arg-max codes) and temperature to log."""
        maker, pixels = self.maker, map_pixels(batch["image"].float() / 255)
        if progress == 0.0 and maker.spread > 0:
            start_from_images(self.encoder, self.decoder, pixels, maker.spread)
        temperature = anneal(maker.temperature_start, maker.temperature, progress / maker.temperature_span)
        weight = anneal(0.0, maker.kl_weight, progress / maker.kl_span)
        logits = self.encoder(pixels).float()  # (B, V, h, w)
        recon = logit_laplace(pixels, self.decoder(F.gumbel_softmax(logits, tau=temperature, dim=1)))
        log_q = logits.log_softmax(dim=1)
        q = log_q.exp()
        kl = (q * (log_q + math.log(maker.codes))).sum(dim=1).mean() / VALUES
        average = q.mean(dim=(0, 2, 3))  # (V,)
        unused = (average * (average.clamp(min=1e-12).log() + math.log(maker.codes))).sum() / VALUES
        counts = torch.bincount(logits.detach().argmax(dim=1).flatten(), minlength=maker.codes)
        return {
            "loss": recon + weight * kl + maker.usage_weight * unused, "recon": recon.detach(), "kl": kl.detach(), "unused": unused.detach(),
            "perplexity": perplexity(counts), "temperature": torch.tensor(temperature),
        }

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (B, 3, 8h, 8w) -> their arg-max codes (B, h, w) and reconstructions in [0, 1] (B, 3, 8h, 8w)."""
        codes = self.encoder(map_pixels(images.float() / 255)).argmax(dim=1)
        return codes, decode(self.decoder, codes)

    @torch.no_grad()
    def check(self, loader: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Scores on held-out images: perplexity and use of the codebook; squared error, and that of each image's mean colour.

        Raises:
            JobFailed: perplexity under a tenth of the codebook, or reconstruction no better than the mean colour.
        """
        training, counts = self.training, torch.zeros(self.maker.codes)
        self.eval()
        error = mean_error = values = 0.0
        for batch in loader:
            codes, output = self.reconstruct(batch["image"])
            counts += torch.bincount(codes.flatten(), minlength=self.maker.codes).cpu()
            pixels = batch["image"].float() / 255
            error += (output - pixels).pow(2).sum().item()
            mean_error += (pixels.mean(dim=(2, 3), keepdim=True) - pixels).pow(2).sum().item()
            values += pixels.numel()
        self.train(training)
        if values == 0:
            raise JobFailed("tokenizer: no images were held out to check it on: train it on more")
        scores = {
            "perplexity": perplexity(counts).item(), "codes": float(self.maker.codes), "codes_used": float((counts > 0).sum()),
            "mse": error / values, "mean_colour_mse": mean_error / values,
        }
        shown = ", ".join(f"{k} {v:.4g}" for k, v in scores.items())
        if not scores["perplexity"] >= 0.1 * self.maker.codes:
            raise JobFailed(f"tokenizer: held-out perplexity is under 10 % of the codebook ({shown}): train it longer, or with fewer codes")
        if not scores["mse"] < scores["mean_colour_mse"]:
            raise JobFailed(f"tokenizer: reconstruction is no better than each image's mean colour ({shown}): train it longer")
        return scores

    def pictures(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Contact sheet, uint8 (2H, B*W, 3): originals over reconstructions of at most 12 images."""
        images = batch["image"][:12]
        return contact_sheet([images.float() / 255, self.reconstruct(images)[1]])

    def save_asset(self, path: Path) -> None:
        """Write the tokenizer's file; `methods.dalle.load_tokenizer` reads it, and `load_decoder` what pictures of tokens are made with."""
        save_tokenizer(path, self.encoder, self.decoder, {"width": self.maker.width, "codes": self.maker.codes, "blocks": self.maker.blocks})


def contact_sheet(rows: Sequence[Tensor]) -> np.ndarray:
    """R rows of images (B, 3, H, W) with values 0..1 as one picture, uint8 (R*H, B*W, 3)."""
    stacked = torch.stack(list(rows)).detach().float().clamp(0, 1)
    r, b, c, h, w = stacked.shape
    return (stacked.permute(0, 3, 1, 4, 2).reshape(r * h, b * w, c) * 255).round().to(torch.uint8).cpu().numpy()


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of a histogram (V,)."""
    p = counts / counts.sum().clamp(min=1)
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())


def anneal(start: float, end: float, fraction: float) -> float:
    """Half cosine from `start` to `end`, which it keeps from fraction 1 on."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
