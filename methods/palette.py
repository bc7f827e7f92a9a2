"""A palette of colours: the node that finds it in the training images by k-means, and what turns images into its codes (iGPT's 9 bits a pixel)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from harness.augment import TrainTransform
from harness.checkpoint import write_atomically
from harness.spec import Augment, JobFailed, Recipe, ViTConfig, within

if TYPE_CHECKING:
    from PIL.Image import Image

    from harness.plugins import TrainContext
    from harness.spec import Protocol
    from harness.vit import ViT

FORMAT = "palette 1"
ITERATIONS = 20  # of Lloyd's algorithm on the first batch
# iGPT resizes the short side to 256..384 pixels, evenly drawn, and crops 224 (recipes A15): as areas of a square image. It does not say that it flips.
CROPS = Augment(crop_scale=((224 / 384) ** 2, (224 / 256) ** 2), crop_ratio=(1.0, 1.0), flip=0.0)


@dataclass(frozen=True)
class Palette:
    """Maker of a palette. iGPT clusters the (R, G, B) values of its training images into 512 colours (recipes A15); how many pixels it takes is not said.

    Ours: k-means (scipy) on `pixels` pixels of each image of the first batch, then Adam on the same error, a step for each batch of further images.
    Pixels are those of the reduced crops that are coded, not of the whole images.

    Attributes:
        colours: how many.
        size: (height, width) of the crops in pixels; `reduced`: of their codes.
        pixels: taken at random from each reduced crop.
        holdout: fraction of the images kept from this, for `check`.
    """

    colours: int = 512
    size: tuple[int, int] = (224, 224)
    reduced: tuple[int, int] = (56, 56)
    pixels: int = 256
    holdout: float = 0.05

    def __post_init__(self) -> None:
        within("palette's", self, colours=(2, None), size=(1, None), reduced=(1, None), pixels=(1, None), holdout=(0, 0.9))

    name: ClassVar[str] = "palette"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "colours of the training images by k-means: images to codes"
    source: ClassVar[str] = "iGPT-paper 3 (recipes A15); sample and algorithm ours"

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return ("imagenet",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Ours throughout but for the crops: 51,200 images under paper, 5,120 in the demo, drawn with their crops anew. `lr` is in values of 0..255 a step."""
        lengths = {"paper": (256, 200), "demo": (256, 20), "smoke": (64, 5)}
        if protocol.family not in lengths:
            return None
        batch, steps = lengths[protocol.family]
        sources = (("all", "ours: k-means of 65,536 pixels, refined on more"), ("augment", "iGPT-paper (recipes A15), as areas of a square image"))
        return Recipe(batch=batch, lr=1.0, iterations=steps, weight_decay=0.0, precision="fp32", augment=CROPS, sources=sources)

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        """-> {"pixels": float32 (P, 3), values 0..255} of a reduced crop."""
        crop, count = TrainTransform(self.size, recipe.augment), min(self.pixels, self.reduced[0] * self.reduced[1])

        def sample(image: Image, rng: np.random.Generator) -> dict[str, Tensor]:
            every = reduce(crop(image, rng)["image"][None], self.reduced)[0].flatten(1).T  # (h * w, 3)
            return {"pixels": every[torch.from_numpy(rng.permutation(len(every))[:count])]}

        return sample

    def objective(self, vit: ViT | None, context: TrainContext) -> PaletteObjective:
        return PaletteObjective(self)


def for_grid(protocol: Protocol, vit: ViTConfig, side: int) -> Palette:
    """The palette for a backbone whose patches have side x side codes each: iGPT's 512 colours; 128 in the demo, 64 in smoke (ours, for speed)."""
    return Palette({"demo": 128, "smoke": 64}.get(protocol.family, 512), vit.size, (side * vit.grid[0], side * vit.grid[1]))


class PaletteObjective(nn.Module):
    """The error that k-means lowers, as something that `harness.train.fit` goes on lowering. Until `prepare` the colours are random."""

    def __init__(self, maker: Palette) -> None:
        super().__init__()
        self.maker = maker
        self.colours = nn.Parameter(255 * torch.rand(maker.colours, 3))
        self.seed = int(torch.randint(2**31, ()))

    @torch.no_grad()
    def prepare(self, batch: Mapping[str, Tensor]) -> None:
        """Lloyd's algorithm on the pixels of a batch, from as many of its distinct colours; where there are no more of these than wanted, they are it."""
        pixels = batch["pixels"].flatten(0, 1).double().cpu().numpy()
        distinct = np.unique(pixels, axis=0)
        if (few := len(distinct)) > self.maker.colours:
            start = np.random.default_rng(self.seed).permutation(few)[: self.maker.colours]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "One of the clusters is empty")  # it keeps its colour
                distinct = kmeans2(pixels, distinct[start], iter=ITERATIONS, minit="matrix")[0]
        self.colours[: len(distinct)] = torch.from_numpy(distinct).to(self.colours)

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"pixels": (B, P, 3)} -> {"loss": mean squared error of the nearest colours, of values 0..255}."""
        pixels = batch["pixels"]
        return {"loss": (pixels - self.colours[closest(pixels, self.colours.detach())]).pow(2).mean()}

    @torch.no_grad()
    def check(self, loader: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """On pixels of held-out images: mean squared error of the nearest colours (values 0..255), that of one mean colour, and how many colours are used.

        Raises:
            JobFailed: no images, or fewer than two colours are used: there is nothing to predict.
        """
        pixels = torch.cat([batch["pixels"].flatten(0, 1) for batch in loader] or [torch.zeros(0, 3)])
        if len(pixels) == 0:
            raise JobFailed("palette: no images were held out to check it on: make it from more")
        nearest = closest(pixels, self.colours)
        used = float(len(nearest.unique()))
        if used < 2:
            raise JobFailed("palette: the held-out images have one colour only: nothing can be learned from predicting it")
        return {
            "mse": (pixels - self.colours[nearest]).pow(2).mean().item(), "mean_colour_mse": (pixels - pixels.mean(dim=0)).pow(2).mean().item(),
            "colours": float(len(self.colours)), "colours_used": used,
        }

    def save_asset(self, path: Path) -> None:
        """Write the colours; `load_colours` reads them."""
        state = {"format": FORMAT, "colours": self.colours.detach().cpu().clone()}
        write_atomically(path, lambda stream: torch.save(state, stream))


def load_colours(path: Path) -> Tensor:
    """The colours (K, 3), float32 with values 0..255, in a file that `PaletteObjective.save_asset` wrote.

    Raises:
        JobFailed: it is missing, damaged, or something else.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        colours: Tensor = content["colours"]
        if content["format"] == FORMAT and colours.ndim == 2 and colours.shape[1] == 3:
            return colours
    except Exception as error:
        raise JobFailed(f"{path} is no readable palette ({type(error).__name__}): remove its folder, then run with --retry") from error
    raise JobFailed(f"{path} has format {content['format']}, this version reads {FORMAT}")


def reduce(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W), uint8 or float, as the means over areas of a coarser grid: float (B, 3, h, w)."""
    return F.interpolate(images.float(), size=size, mode="area")


def closest(pixels: Tensor, colours: Tensor) -> Tensor:
    """Index of the nearest colour, int64 (...), of pixels (..., 3) among colours (K, 3)."""
    with torch.autocast(pixels.device.type, enabled=False):  # a code must not depend on the precision of the training around it
        return torch.addmm(-0.5 * colours.pow(2).sum(dim=1), pixels.reshape(-1, 3), colours.T).argmax(dim=1).reshape(pixels.shape[:-1])
