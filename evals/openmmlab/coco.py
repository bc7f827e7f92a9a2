"""`coco`: Mask R-CNN of mmdetection on the ViT, box and mask AP by COCO's protocol, set up as by Li et al. 2021 or as ViTDet (recipes A10).

Sizes of the papers: 1024 px square with large-scale jitter 0.1..2, 256 channels. The demo scales these down. Categories come from
the annotations; images without objects are left out in training and scored in validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from evals.openmmlab import detection_recipes
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Golden
from harness.spec import Metric, Outcome, Protocol, Recipe, UserError, ViTConfig

LENGTHS = (25, 50, 100, 200, 400)  # epochs; Li21 tried the first three, and the last three from scratch


@dataclass(frozen=True)
class COCO:
    """Object detection and instance segmentation. None: the papers' value under the paper family, a scaled-down one otherwise.

    Attributes:
        by: who set it up. "li21" (MAE-paper Table 4): four taps, FPN, attention in windows of the pre-training's grid but for four blocks, relative position
            biases. "vitdet": the last block, simple pyramid, layer norm, windows of 14, decomposed relative positions. "default": li21 under the paper
            family; under demo and smoke four taps and FPN on a ViT whose attention is left as it is.
        epochs: of Li21's recipe, None: 100.
        side: of the square input in pixels; rounded up to what the pyramid divides.
        jitter: range of the resize factor in training.
        taps, scales: four blocks of the ViT (0-based), and the sizes of the pyramid's maps relative to its grid. With vitdet the last block is all.
        holdout: fraction of the training images that is held out and scored in place of the validation images, for tuning.
    """

    by: Literal["default", "li21", "vitdet"] = "default"
    epochs: int | None = None
    side: int | None = None
    jitter: tuple[float, float] | None = None
    taps: tuple[int, int, int, int] | None = None
    scales: tuple[float, float, float, float] | None = None
    holdout: float = 0.0

    version: ClassVar[int] = 2
    groups: ClassVar[tuple[str, ...]] = ("paper",)
    distributed: ClassVar[bool] = True
    columns: ClassVar[tuple[Metric, ...]] = (Metric("AP_box"), Metric("AP_mask"))
    summary: ClassVar[str] = "detection and instance segmentation: Mask R-CNN on the fine-tuned ViT, AP on COCO"
    source: ClassVar[str] = "He et al. 2017 (Mask R-CNN), set up as in Li et al. 2021: MAE-paper Table 4 (recipes A10)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "li21": {"by": "li21"}, **{f"li21-{n}": {"by": "li21", "epochs": n} for n in LENGTHS if n != 100}, "vitdet": {"by": "vitdet"},
    }
    variant_sources: ClassVar[Mapping[str, str]] = {
        "li21": "Li21, MAE-paper Table 4", "li21-25": "Li21; MAE-repo issue #43", "li21-50": "Li21; MAE-repo issue #43",
        "li21-200": "Li21 Table 1, from scratch", "li21-400": "Li21 Table 1, from scratch", "vitdet": "detectron2 projects/ViTDet",
    }

    def __post_init__(self) -> None:
        if self.by not in ("default", "li21", "vitdet"):
            raise UserError(f"by must be default, li21 or vitdet, not {self.by!r}")
        if self.epochs is not None and (self.by == "vitdet" or self.epochs < 1):
            raise UserError("epochs is the length of Li21's recipe, at least 1: use coco@li21, or set coco.recipe.epochs")

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """COCO 2017."""
        return ("coco",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Li21's for ViT-B and L, ViTDet's for ViT-B, L and H; ours for demo and smoke."""
        if protocol.family != "paper":
            return detection_recipes.scaled_down(protocol.family, self.by) if self.epochs is None else None
        if self.by == "vitdet":
            return detection_recipes.vitdet(vit.paper_size)
        return detection_recipes.li21(vit.paper_size, self.epochs or 100)

    def skip(self, vit: ViTConfig) -> str | None:
        """Reason why Mask R-CNN cannot sit on this ViT, or None."""
        if vit.relative_bias != "none" and min(vit.grid) < 2:
            return f"the relative bias of a grid of {vit.grid[0]}x{vit.grid[1]} patches cannot be brought to that of the images"
        if vit.grid[0] != vit.grid[1] and self.by != "default":
            return f"windows have the side of the pre-training's grid, and {vit.grid[0]}x{vit.grid[1]} patches are no square"
        return None

    def notes(self, protocol: Protocol, vit: ViTConfig) -> tuple[str, ...]:
        """An input that was rounded, and biases of the pre-training that the setting does not have."""
        wanted, side, by = self.wanted_side(protocol), self.input_side(protocol, vit), self.setting(protocol)
        found = [f"input of {side} pixels: the pyramid on patches of {vit.patch} does not divide {wanted}"] if side != wanted else []
        if by == "vitdet" and vit.relative_bias != "none":
            found.append("relative position bias of the pre-training kept beside ViTDet's relative positions")
        if by == "li21" and vit.relative_bias == "block":
            found.append("relative position bias of each block as pre-trained, in Li21's setting two are shared by all blocks")
        return tuple(found)

    def setting(self, protocol: Protocol) -> str:
        """What `by` stands for: Li21's setting where the paper family is not told otherwise."""
        return "li21" if protocol.family == "paper" and self.by == "default" else self.by

    def wanted_side(self, protocol: Protocol) -> int:
        """Side of the input in pixels before rounding."""
        return self.side or (1024 if protocol.family == "paper" else 96)

    def map_scales(self, vit: ViTConfig) -> tuple[float, float, float, float]:
        """Sizes of the four maps relative to the grid: strides of 4, 8, 16, 32 pixels for a patch of 16, and also for one of 8 (ours)."""
        return self.scales or ((2.0, 1.0, 0.5, 0.25) if vit.patch == 8 else (4.0, 2.0, 1.0, 0.5))

    def input_side(self, protocol: Protocol, vit: ViTConfig) -> int:
        """Side of the input in pixels: a multiple of the patch and of the coarsest map's stride, so 1036 for 1024 and a patch of 14."""
        multiple = max(vit.patch, round(vit.patch / min(self.map_scales(vit))))
        return -(-self.wanted_side(protocol) // multiple) * multiple

    def golden(self, folder: Path) -> tuple[Golden, ...]:
        """Known answers, see `evals.openmmlab.golden`."""
        from evals.openmmlab.foreign import openmmlab

        with openmmlab():
            from evals.openmmlab.golden import detection

            return detection(self, folder)

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Fine-tune and score; resumable inside context.session.dir.

        Raises:
            Interrupted: a signal came; running it again goes on.
            JobFailed: a broken image, or a loss that is not finite.
        """
        from evals.openmmlab.foreign import openmmlab

        with openmmlab():
            return self._run(checkpoint, context)

    def _run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        from evals.openmmlab import mask_rcnn, samples, session
        from evals.openmmlab.average_precision import AveragePrecision
        from evals.openmmlab.backbone import even_taps
        from evals.openmmlab.scenes import COCOScenes
        from evals.openmmlab.work import Work
        from harness.data import data_set
        from harness.randomness import seed_all

        lent, recipe, vit = context.session, context.recipe, checkpoint.config
        assert recipe is not None
        paper = context.protocol.family == "paper"
        side, scales = self.input_side(context.protocol, vit), self.map_scales(vit)
        folder = lent.folders["coco"]
        classes = data_set("coco").classes(folder)
        with session.quiet(lent, "mmdet"):
            train = COCOScenes(folder, "train2017", classes, mask_rcnn.train_pipeline(side, self.jitter or ((0.1, 2.0) if paper else (0.75, 1.33))))
            rest, held = samples.held_out(len(train), self.holdout)
            test = COCOScenes(folder, "train2017" if held else "val2017", classes, mask_rcnn.test_pipeline(side))
            chosen = samples.readable(test, held or range(len(test)), lent)
            seed_all(lent.seed, "init")
            metric = AveragePrecision(lent.dir / "outcomes.npz", test.json, test.ids(chosen), [number for number, _ in classes])
            by = self.setting(context.protocol)
            backbone = mask_rcnn.backbone(checkpoint, by, side, recipe.drop_path, 14 if paper else vit.grid[0], self.taps or even_taps(vit.depth), scales)
            model = mask_rcnn.build(checkpoint, backbone, mask_rcnn.PAPER if paper else mask_rcnn.SMALL, by, side, scales, len(classes))
            work = Work(
                lent, recipe, model, samples.InOrder(train, train.with_instances(rest), lent.seed, lent.on_bad_image == "skip"),
                samples.InOrder(test, chosen, None, False), metric, test_batch=1 if paper else 8,
            )
            scores = session.train_and_test(work, "mmdet")
        return Outcome({name: scores[name] for name in ("AP_box", "AP_mask")}, metric.path, work.record_facts())
