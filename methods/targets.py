"""What masked patches are predicted as: their pixels, their principal components, or the tokens of a discrete VAE.

A target has `outputs` (numbers predicted for a patch), is called with (batch, normalised images, patch indices (B, K)), and computes the loss over
the valid places together with their number as `weight`, by which `harness.train` weighs the parts of a batch. Its `sheet` draws what was predicted from
(batch, normalised images (B, 3, H, W), predictions for all patches (B, N, outputs), mask (B, N), 1 or True where hidden, the Normalize that was applied):
rows of images, uint8 (R*H, B*W, 3), or in words why it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.augment import Normalize
from harness.spec import Asset, ViTConfig
from methods.dalle import STRIDE, Tokenizer, decode, load_decoder, load_tokenizer
from methods.dvae import contact_sheet, for_grid
from methods.masking import images_of, normalise_patches, patch_pixels, pick

if TYPE_CHECKING:
    import numpy as np

    from harness.spec import Protocol


class Tokens:
    """Targets of token prediction. Holds the tokenizer outside the objective's modules: it is neither trained nor saved with it. On a GPU it is halved.

    `file` is where it came from, and its decoder, which only `sheet` reads.
    """

    def __init__(self, tokenizer: Tokenizer, file: Path | None = None) -> None:
        self.tokenizer, self.file, self.outputs = tokenizer, file, tokenizer.codes

    @classmethod
    def read(cls, file: Path) -> Tokens:
        """Targets by the tokenizer in an asset's file. Raises JobFailed when that is damaged."""
        return cls(load_tokenizer(file), file)

    def __call__(self, batch: Mapping[str, Tensor], images: Tensor, index: Tensor) -> Tensor:
        """Tokens (B, K) of the patches `index` (B, K)."""
        view = batch["tokenizer_image"]
        if next(self.tokenizer.parameters()).device != view.device:
            self.tokenizer.to(view.device)
            self.tokenizer = self.tokenizer.halve() if view.is_cuda else self.tokenizer
        return self.tokenizer(view, index)

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy over the valid places of the whole batch, and the accuracy there."""
        target = target.masked_fill(~valid, -100)
        logits = prediction.to(torch.promote_types(prediction.dtype, torch.float32))  # never in half precision
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        count = valid.sum()
        return {"loss": loss, "weight": count, "accuracy": (prediction.detach().argmax(-1) == target).sum() / count}

    def sheet(self, batch: Mapping[str, Tensor], images: Tensor, prediction: Tensor, mask: Tensor, normalize: nn.Module) -> np.ndarray | str:
        """The tokenizer's views above what is seen of them, above their own tokens decoded, above the same with the hidden patches' tokens as predicted.

        The third row is the best that predictions could give: what the fourth lacks against it the method has not guessed, the rest the tokenizer lost.
        """
        if isinstance(decoder := load_decoder(self.file) if self.file else "the tokenizer came from no file", str):
            return decoder
        if decoder.blocks.input.in_channels != self.outputs:
            return f"the decoder is of {decoder.blocks.input.in_channels} tokens, the tokenizer of {self.outputs}"
        view, hidden = batch["tokenizer_image"], mask.bool()
        own = self(batch, images, torch.arange(mask.shape[1], device=view.device).expand_as(mask))
        (height, width), decoder = (side // STRIDE for side in view.shape[2:]), decoder.to(view.device)
        decoded = [decode(decoder, t.reshape(-1, height, width)) for t in (own, torch.where(hidden, prediction.argmax(-1), own))]
        grey = hidden.reshape(-1, 1, height, width).repeat_interleave(STRIDE, 2).repeat_interleave(STRIDE, 3)
        return contact_sheet([view.float() / 255, (view.float() / 255).masked_fill(grey, 0.5), *decoded])


class Pixels:
    """Targets of pixel regression: the normalised image's pixels, patch by patch; with `normalise` each patch by its own mean and deviation."""

    def __init__(self, patch: int, normalise: bool) -> None:
        self.patch, self.normalise, self.outputs = patch, normalise, patch**2 * 3

    def __call__(self, batch: Mapping[str, Tensor], images: Tensor, index: Tensor) -> Tensor:
        """Pixels (B, K, P*P*3) of the patches `index` (B, K) of normalised images."""
        pixels = pick(patch_pixels(images, self.patch), index)
        return normalise_patches(pixels) if self.normalise else pixels

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Mean squared error over the valid places."""
        return mean_squared(prediction, target, valid)

    def sheet(self, batch: Mapping[str, Tensor], images: Tensor, prediction: Tensor, mask: Tensor, normalize: nn.Module) -> np.ndarray | str:
        """Images above what the encoder sees of them, above their hidden patches as predicted. A normalised patch gets back its own mean and deviation,
        which only the image knows."""
        pixels, grid, hidden = patch_pixels(images, self.patch), (images.shape[2] // self.patch, images.shape[3] // self.patch), mask[:, :, None].bool()
        if self.normalise:
            prediction = prediction * (pixels.var(dim=-1, keepdim=True) + 1e-6).sqrt() + pixels.mean(dim=-1, keepdim=True)
        assert isinstance(normalize, Normalize)
        rows = (pixels, pixels.masked_fill(hidden, 0.0), torch.where(hidden, prediction, pixels))
        return contact_sheet([(images_of(row, grid) / normalize.scale + normalize.shift) / 255 for row in rows])


class Components(nn.Module):
    """Targets of PCA (MAE-paper 4.1 and Table 1d): the coefficients of each patch in the directions of largest variance over patches.

    The basis is learned once, from the first images that are given to `learn` or else to the first call, and is saved with the objective. The paper
    does not say how its basis was computed, nor that coefficients are scaled: here they are not (ours).

    Args:
        patch: side of a patch in pixels.
        count: number of coefficients (96 in the paper, of 768).
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, patch: int, count: int) -> None:
        super().__init__()
        self.patch, self.outputs, self.learned = patch, min(count, patch**2 * 3), False
        self.register_buffer("mean", torch.zeros(patch**2 * 3))
        self.register_buffer("basis", torch.zeros(patch**2 * 3, self.outputs))
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "learned", True))

    @torch.no_grad()
    def learn(self, images: Tensor) -> None:
        """The principal directions of the patches of normalised images (B, 3, H, W), each with its largest entry positive."""
        pixels = patch_pixels(images, self.patch).flatten(0, 1).double().cpu()
        self.mean.copy_(pixels.mean(dim=0))
        centred = pixels - pixels.mean(dim=0)
        directions = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, : self.outputs]  # (P*P*3, K), largest variance first
        largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
        self.basis.copy_(directions * largest.sign())
        self.learned = True

    def forward(self, batch: Mapping[str, Tensor], images: Tensor, index: Tensor) -> Tensor:
        """Coefficients (B, K, outputs) of the patches `index` (B, K) of normalised images."""
        if not self.learned:
            self.learn(images)
        with torch.autocast(images.device.type, enabled=False):
            return (pick(patch_pixels(images, self.patch), index) - self.mean) @ self.basis

    def sheet(self, batch: Mapping[str, Tensor], images: Tensor, prediction: Tensor, mask: Tensor, normalize: nn.Module) -> np.ndarray | str:
        """As `Pixels`: patches from their components, the rest of a patch at the mean."""
        return Pixels(self.patch, False).sheet(batch, images, prediction @ self.basis.T + self.mean, mask, normalize)

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Mean squared error over the valid places."""
        return mean_squared(prediction, target, valid)


def tokenizer(protocol: Protocol, vit: ViTConfig) -> Asset:
    """The tokenizer of token targets: DALL-E's released encoder under the paper protocols (BEiT-paper 2.1, MAE-paper 4.1), else one that is made."""
    if protocol.family == "paper":
        return Asset(file="dall-e/encoder.pkl", origin="download it from https://cdn.openai.com/dall-e/encoder.pkl", check=load_tokenizer)
    return Asset(maker=for_grid(protocol, vit))


Target = Tokens | Pixels | Components


def mean_squared(prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Squared error of (B, K, V), averaged over V and over the valid places (B, K), and their number."""
    error, count = (prediction.to(target.dtype) - target).pow(2).mean(dim=-1), valid.sum()
    return {"loss": (error * valid).sum() / count, "weight": count}
