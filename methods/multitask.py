"""BEiT and DINO at once on one ViT: the sum of both losses (BEiT-paper Table 10, multi-task)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from harness.spec import Asset, Overrides, Recipe, UserError, ViTConfig, within
from methods.beit import BEiT, BEiTObjective
from methods.dino import DINO, DINOObjective

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from harness.plugins import TrainContext
    from harness.spec import Protocol
    from harness.vit import ViT


@dataclass(frozen=True)
class BEiTDINO:
    """BEiT on a masked crop of an image, DINO on its crops.

    The paper gives the length and the scores. Ours is the rest: both losses count alike, the recipe and the ViT are BEiT's, and the student is the result.

    Attributes:
        beit, dino: the two methods; what they say of length and recipe is not used.
        global_scale: area of DINO's large crops; the recipe's crop_scale is that of BEiT's crop.
        epochs: length under the paper protocols; the other protocols set their own.
    """

    beit: BEiT = BEiT()
    dino: DINO = DINO()
    global_scale: tuple[float, float] = (0.25, 1.0)
    epochs: int = 300

    def __post_init__(self) -> None:
        within("beit-dino's", self, global_scale=(1e-6, 1), epochs=(1, None))
        if (self.beit.mean, self.beit.std) != (self.dino.mean, self.dino.std) or self.beit.intermediate:
            raise UserError("beit-dino's two methods must share mean and std, and neither trains on labels")

    version: ClassVar[int] = 1
    summary: ClassVar[str] = "BEiT and DINO at once: the class token is taught as by DINO, the patches as by BEiT"
    source: ClassVar[str] = "BEiT-paper Table 10, multi-task, 300 epochs; how the losses are weighed and tuned is ours (recipes A6, A14)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.beit.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.beit.std

    @property
    def parent(self) -> None:
        return None

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        return self.beit.datasets(protocol)

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        return self.beit.assets(protocol, vit)

    def architecture(self, vit: ViTConfig, published: bool) -> ViTConfig:
        return self.beit.architecture(vit, published)

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        return self.beit.transfer(evaluator, protocol, vit)

    def skip(self, vit: ViTConfig) -> str | None:
        return self.beit.skip(vit) or self.dino.skip(vit)

    def facts(self, vit: ViT, context: TrainContext) -> Mapping[str, Any]:
        """One crop for BEiT, and DINO's: told by the fairness audit."""
        return {"crops_seen": (3 + self.dino.local_crops) * context.total_steps * context.recipe.batch}

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """BEiT's (Table 12) for `epochs`; demo, smoke: shorter, as a step has many more crops: no longer than mae and beit together (ours)."""
        recipe = replace(self.beit, epochs=self.epochs).recipe(protocol, vit)
        if recipe is None:
            return None
        sources = (("epochs", "BEiT-paper Table 10"), ("all", "ours, not tuned: BEiT's own; the paper has none for both (recipes A6)"))
        length = {"demo": {"iterations": 560, "warmup": 56}, "smoke": {"iterations": 12, "warmup": 2}}.get(protocol.family, {})
        return replace(recipe, sources=(*sources, *recipe.sources), **length)

    def drawn(self, vit: ViTConfig, recipe: Recipe) -> str:
        return self.beit.drawn(vit, recipe)

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        """Both methods' samples of one image, one after the other from one generator."""
        crops = replace(recipe, augment=replace(recipe.augment, crop_scale=self.global_scale, color_jitter=(0.4, 0.4, 0.2)))
        first, second = self.beit.transform(vit, recipe), self.dino.transform(vit, crops)
        return lambda image, rng: {**first(image, rng), **second(image, rng)}

    def objective(self, vit: ViT | None, context: TrainContext) -> BEiTDINOObjective:
        """BEiT's comes first: its initial weights of the ViT are those that DINO's teacher starts from."""
        beit = self.beit.objective(vit, context)
        assert isinstance(beit, BEiTObjective)
        return BEiTDINOObjective(beit, self.dino.objective(vit, context))


class BEiTDINOObjective(nn.Module):
    """The sum of BEiT's and DINO's loss, means over images both, so that a batch may be split: BEiT's is summed over the hidden patches and divided by as many
    as may be hidden, of which an image may lack a few. The one ViT stands in a state under three names.
    """

    def __init__(self, beit: BEiTObjective, dino: DINOObjective) -> None:
        super().__init__()
        self.vit, self.beit, self.dino = beit.vit, beit, dino

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image", "mask", ... of BEiT, "global", "local" of DINO} -> {"loss", "beit", "dino": its parts, and what both log}."""
        masked, crops = self.beit(batch, progress), self.dino(batch, progress)
        places = len(batch["mask"]) * (batch["mask"].shape[1] if self.beit.limit is None else self.beit.limit)
        parts = {"beit": masked.pop("loss") * (masked.pop("weight") / places), "dino": crops.pop("loss")}
        return {"loss": parts["beit"] + parts["dino"], **{k: v.detach() for k, v in parts.items()}, **masked, **crops}

    def after_step(self, progress: float) -> None:
        """DINO's centre and teacher."""
        self.dino.after_step(progress)
