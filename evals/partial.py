"""Partial fine-tuning: the last blocks and the head are trained, the rest of the ViT stays as pre-trained (MAE-paper 4.3, Figure 9; recipes A4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from evals.finetune import FineTuning
from harness.spec import Protocol, Recipe, UserError, ViTConfig


@dataclass(frozen=True)
class Partial(FineTuning):
    """MAE's partial fine-tuning on ImageNet in the setting of Table 9.

    The final norm before a class token is trained with the blocks (not stated in the paper: ours). With 0 blocks the head alone is trained,
    by this recipe; the figure's own point for 0 is the linear probe (`linear`).

    Attributes:
        blocks: how many of the last blocks are trained; 0.5 is the MLP of the last block with its norm; None: 4, where the paper compares with MoCo v3.
    """

    blocks: float | None = None

    data: ClassVar[str] = "imagenet"
    usual: ClassVar[str] = "mae-table9"
    summary: ClassVar[str] = "fine-tuning of the last blocks on ImageNet, top-1"
    source: ClassVar[str] = "MAE-paper Figure 9, 4.3 and A.1 with Table 9 (recipes A4)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"{k:g}": {"blocks": k} for k in (0.0, 0.5, 1.0, 2.0, 4.0, 6.0, 12.0, 18.0, 24.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and (self.blocks < 0 or (self.blocks != 0.5 and self.blocks != int(self.blocks))):
            raise UserError(f"blocks must be a whole number from 0, or 0.5 for the MLP of the last block, not {self.blocks:g}")

    @property
    def trained(self) -> float:
        """Number of blocks that are trained."""
        return 4.0 if self.blocks is None else self.blocks

    def skip(self, vit: ViTConfig) -> str | None:
        """More blocks than the ViT has."""
        if self.trained > vit.depth:
            return f"{self.trained:g} blocks of a ViT of {vit.depth} cannot be trained"
        return super().skip(vit)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Table 9 (demo, smoke: theirs) with the first blocks frozen. Of the paper's 50, 100 or 200 epochs, best for each point, Table 9's own are taken."""
        recipe = super().recipe(protocol, vit)
        if recipe is None:
            return None
        sources = (
            *recipe.sources, ("frozen", "MAE-paper 4.3"), ("epochs, layer_decay", "ours: Table 9's; the paper took the best of 50, 100 and 200 epochs (A.1)"),
        )
        return dataclasses.replace(recipe, frozen=self.frozen(vit), sources=sources)

    def frozen(self, vit: ViTConfig) -> tuple[str, ...]:
        """Patterns of the parameters that stay as they are."""
        first = vit.depth - math.ceil(self.trained)  # the first block of which something is trained
        patterns = ["vit.cls_token", "vit.patch_embed.*", *(f"vit.blocks.{i}.*" for i in range(first))]
        if vit.positions != "none":
            patterns.append("vit.pos_embed")
        biased = first + (self.trained == 0.5)  # of half a block the attention stays
        if vit.relative_bias != "none":
            patterns += [f"vit.relative_bias.{i}.*" for i in range(biased)]
        if self.trained == 0.5:
            parts = ("norm1", "attn", *(("ls1",) if vit.layer_scale is not None else ()))
            patterns += [f"vit.blocks.{first}.{part}.*" for part in parts]
        if self.trained == 0:
            patterns.append("vit.norm.*")
        return tuple(patterns)
