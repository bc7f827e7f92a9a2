"""iGPT: the palette codes of each patch predicted from the patches before it, or of hidden ones from the rest (Chen et al., ICML 2020), on our ViT."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.augment import Normalize, TrainTransform
from harness.classifier import single
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, Overrides, Recipe, ViTConfig, within
from methods import published
from methods.dvae import contact_sheet
from methods.masking import masked_indices, pick, random_mask
from methods.palette import CROPS, closest, for_grid, load_colours, reduce

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from harness.plugins import TrainContext
    from harness.spec import Protocol
    from harness.vit import ViT

SMALLEST = 512  # width of iGPT-S, the narrowest that its initial values are made for


@dataclass(frozen=True)
class IGPT:
    """iGPT's objectives on patches.

    iGPT's: the codes of a 512-colour palette as targets, raster order, causal attention behind a start token, negative log-likelihood; in its BERT variant
    each place hidden with probability 0.15 and zero instead (iGPT-paper 2, 3; iGPT-repo src/model.py; recipes A15). Ours, since this ViT has one token for
    a patch where iGPT has one for a pixel of a 32- to 64-pixel image:
    - a step predicts the `codes` x `codes` codes of the next patch, each from the mean colour of its part of the patch: 32 x 32 codes at 64 pixels with
      patches of 8, 56 x 56 at 224 with patches of 16, iGPT's range. They are predicted independently of one another given the patches before, by one
      linear layer: to go on code by code inside a patch would need a decoder of its own, and the ViT is what is compared.
    - the ViT reads the pixels of a patch, not its codes, as it does in every evaluation; positions are those of the patch that is read, not of the next.
    - the class token is the start token. The attention of other evaluators than the linear probe is over all patches.

    Attributes:
        prediction: "next" patch, or "masked" ones.
        codes: side of the square of codes of a patch.
        mask_ratio: probability that a patch is hidden, for "masked". At least one is, and at most five standard deviations above the mean (static shapes).
        epochs: length under the paper protocols; the other protocols set their own.
    """

    prediction: Literal["next", "masked"] = "next"
    codes: int = 4
    mask_ratio: float = 0.15
    epochs: int = 100
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        within("igpt's", self, codes=(1, None), mask_ratio=(1e-6, 1), epochs=(1, None), std=(1e-6, None))

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "generative: the palette codes of each patch predicted from the patches before it, row by row"
    source: ClassVar[str] = "iGPT (Chen et al., ICML 2020); openai/image-gpt (recipes A15); patches instead of pixels are ours"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"masked": {"prediction": "masked"}}
    variant_sources: ClassVar[Mapping[str, str]] = {"masked": "iGPT-paper 4.6, the BERT objective: the objective of BEiT-paper Table 1's iGPT, on our ViT"}

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        """The palette, made from the training images under every protocol."""
        return {"palette": Asset(maker=for_grid(protocol, vit, self.codes))}

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        """Its own linear probe under every protocol: its class token sees no image, and its best features are in the middle (iGPT-paper 4)."""
        if evaluator == "linear":
            return Overrides(variant="igpt" if self.prediction == "next" else "igpt-masked")
        if protocol.family == "paper" and evaluator in ("imagenet", "cifar100"):
            return Overrides(source="ours: the evaluator's own; iGPT reads the last layer and goes on with its own loss beside the classifier's (recipes A15)")
        return Overrides()

    def notes(self, vit: ViTConfig) -> tuple[str, ...]:
        """What is not iGPT's."""
        causal = ", and attention is causal in pre-training and its own linear probe alone" if self.prediction == "next" else ""
        return (f"iGPT's objective on our ViT: {self.codes} x {self.codes} codes a patch, where iGPT has a code a pixel at 32 to 64 pixels{causal}",)

    def skip(self, vit: ViTConfig) -> str | None:
        return f"{self.codes} codes a side do not fit into a patch of {vit.patch} pixels: set codes" if self.codes > vit.patch else None

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """paper: recipes A15, for every backbone; demo, smoke: ours, scaled down."""
        a15 = "iGPT-paper 3 (recipes A15)"
        shared: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0, "frozen": published.fixed(vit), "augment": CROPS}
        crops = ("augment", "iGPT-paper (recipes A15), its crops as areas of a square image")
        if protocol.family == "paper":
            if not vit.paper_size:
                return None
            sources = (("lr", "ours: A15 has none"), ("epochs", "iGPT-paper 3, 1M iterations (recipes A15)"), crops, ("all", a15))
            return Recipe(batch=128, lr=3e-4, epochs=self.epochs, warmup=1, sources=sources, **shared)
        sources = (("batch, lr, length, warmup", "ours, scaled down"), crops, ("betas, weight_decay, schedule", a15))
        if protocol.family == "demo":
            return Recipe(batch=32, lr=1e-3, iterations=1800, warmup=120, sources=sources, **shared)
        if protocol.family == "smoke":
            return Recipe(batch=32, lr=1e-3, iterations=30, warmup=4, sources=sources, **shared)
        return None

    def limit(self, patches: int) -> int:
        """Most patches that are hidden."""
        mean = self.mask_ratio * patches
        return min(patches, max(1, math.ceil(mean + 5 * math.sqrt(mean * (1 - self.mask_ratio)))))

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        """-> {"image": uint8 (3, H, W)} and, for masked prediction, "mask": bool (N,), True where hidden."""
        crop, most = TrainTransform(vit.size, recipe.augment), self.limit(vit.patches)

        def sample(image: Image, rng: np.random.Generator) -> dict[str, Tensor]:
            made = crop(image, rng)
            if self.prediction == "masked":  # of independent places, the number is binomial and each set of that number as likely
                hidden = min(most, max(1, int(rng.binomial(vit.patches, self.mask_ratio))))
                made["mask"] = torch.from_numpy(random_mask(rng, vit.patches, hidden))
            return made

        return sample

    def objective(self, vit: ViT | None, context: TrainContext) -> IGPTObjective:
        assert vit is not None
        most = self.limit(vit.config.patches) if self.prediction == "masked" else None
        return IGPTObjective(vit, load_colours(context.assets["palette"]), self.codes, most, Normalize(self.mean, self.std))


class IGPTObjective(nn.Module):
    """iGPT's losses around a lent ViT; initialises both.

    Args:
        vit: reads patches; the patch before each, or the class token before the first, predicts it.
        colours: the palette, (K, 3) with values 0..255.
        codes: side of the square of codes of a patch.
        most: None to predict the next patch; else most patches that a mask hides: those are predicted, and no attention is masked.
        normalize: uint8 or float images -> network input.
    """

    colours: Tensor

    def __init__(self, vit: ViT, colours: Tensor, codes: int, most: int | None, normalize: nn.Module) -> None:
        super().__init__()
        init_igpt(vit)
        self.vit, self.codes, self.most, self.normalize = vit, codes, most, normalize
        self.register_buffer("colours", colours, persistent=False)
        self.head = nn.Linear(vit.config.width, codes**2 * len(colours), bias=False)
        nn.init.zeros_(self.head.weight)

    def targets(self, images: Tensor) -> Tensor:
        """Codes (B, N, codes^2) of images (B, 3, H, W) with values 0..255: patches row by row, and row by row inside a patch."""
        (h, w), side = self.vit.config.grid, self.codes
        codes = closest(reduce(images, (side * h, side * w)).permute(0, 2, 3, 1), self.colours)  # (B, side h, side w)
        return codes.reshape(-1, h, side, w, side).permute(0, 1, 3, 2, 4).reshape(-1, h * w, side * side)

    def tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """What each patch is predicted from, (B, N, D), of normalised images: the output before it, or its own where it is hidden as zeros."""
        x = self.vit.patches(images)
        if self.most is None:
            return self.vit.encode(self.vit.place(x), causal=True)[:, :-1]
        assert mask is not None
        return self.vit.encode(self.vit.place(x.masked_fill(mask[:, :, None], 0.0)))[:, 1:]

    def scores(self, tokens: Tensor) -> Tensor:
        """Scores of the colours for each code, float (B, n, codes^2, K), of tokens (B, n, D)."""
        return single(self.head(tokens)).unflatten(-1, (self.codes**2, -1))

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image": (B, 3, H, W), "mask": (B, N) bool} -> {"loss": nats a code: of all patches, or the mean over images of that over hidden patches}."""
        images, mask = batch["image"], batch.get("mask")
        tokens, target = self.tokens(self.normalize(images), mask), self.targets(images)
        if self.most is not None:
            assert mask is not None
            index, valid = masked_indices(mask, self.most)
            tokens, target = pick(tokens, index), pick(target, index)
        loss = F.cross_entropy(self.scores(tokens).flatten(0, 2), target.flatten(), reduction="none").unflatten(0, target.shape).mean(dim=2)  # (B, n)
        return {"loss": loss.mean() if self.most is None else ((loss * valid).sum(dim=1) / valid.sum(dim=1)).mean()}

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Contact sheet, uint8 (3H, B*W, 3): images, their codes, and each patch in the likeliest colours, given the true patches that it is predicted from."""
        images, mask = batch["image"], batch.get("mask")
        predicted, target = self.scores(self.tokens(self.normalize(images), mask)).argmax(dim=-1), self.targets(images)
        if mask is not None:
            predicted = torch.where(mask[:, :, None], predicted, target)
        return contact_sheet([images.float() / 255, self.paint(target), self.paint(predicted)])

    def paint(self, codes: Tensor) -> Tensor:
        """Images (B, 3, H, W) with values 0..1 in the colours of codes (B, N, codes^2)."""
        (h, w), side = self.vit.config.grid, self.codes
        colours = (self.colours[codes] / 255).reshape(-1, h, w, side, side, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, h * side, w * side)
        return F.interpolate(colours, size=self.vit.config.size, mode="nearest")


def init_igpt(vit: ViT) -> None:
    """iGPT's initial values (iGPT-repo src/model.py): normal, q, k, v 1 / sqrt(D), attention's output 1 / sqrt(D depth), MLP 0.02, start 0.02, positions 0.01.

    Ours: in ViTs narrower than iGPT-S the MLP's grow as 1 / sqrt(D) from there; the patch projection is Xavier-uniform as a matrix; biases, which iGPT has
    none of, are zero.
    """
    width = vit.config.width
    deviations = {"attn.qkv": width**-0.5, "attn.proj": (width * vit.config.depth) ** -0.5}
    for name, module in vit.blocks.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviations.get(name.partition(".")[2], 0.02 * max(1.0, SMALLEST / width) ** 0.5))
            nn.init.zeros_(module.bias)
    projection = vit.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(width, -1))
    nn.init.zeros_(projection.bias)
    nn.init.normal_(vit.cls_token, std=0.02)
    if vit.config.positions == "learned":
        nn.init.normal_(vit.pos_embed, std=0.01)
