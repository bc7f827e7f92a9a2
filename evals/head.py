"""Head: the classifier that a checkpoint brings with it, scored on ImageNet as it is. Nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from evals.robustness import Robustness
from harness.spec import UserError

if TYPE_CHECKING:
    from harness.augment import EvalTransform


@dataclass(frozen=True)
class Head(Robustness):
    """Top-1 on ImageNet's validation images, as an author reports it of a file that was fine-tuned.

    Attributes:
        crop: side of the central crop over the side of the resized image; None: 0.875 up to 224 pixels and 1 above, as MAE, BEiT and DeiT have it
            (recipes A2, A5, A7). timm's configurations say 0.9 of many.
    """

    after: str = ""
    crop: float | None = None

    data: ClassVar[str] = "imagenet"
    groups: ClassVar[tuple[str, ...]] = ()
    needs_classifier: ClassVar[bool] = True
    summary: ClassVar[str] = "the classifier that a checkpoint brings with it (weights:FILE), scored on ImageNet as it is, top-1"
    source: ClassVar[str] = "MAE-repo FINETUNE.md, --eval (recipes A2)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < self.crop <= 1:
            raise UserError(f"crop must be above 0 and at most 1, not {self.crop:g}")

    def preparation(self, size: tuple[int, int]) -> EvalTransform:
        """As for the robustness sets, or with the crop that was asked for."""
        from harness.augment import EvalTransform

        return super().preparation(size) if self.crop is None else EvalTransform(size, self.crop)
