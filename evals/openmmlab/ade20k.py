"""`ade20k`: UperNet or SETR of mmsegmentation on the fine-tuned ViT, mIoU over ADE20K's validation images (recipes A9).

Recipes, sizes and windows of the papers are in `ade20k_published`. The demo scales them down. Classes come from objectInfo150.txt; label 0 is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from evals.openmmlab.ade20k_published import PUBLISHED, USUAL, Published, beit
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Golden
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Metric, Outcome, Protocol, Recipe, UserError, ViTConfig, suggest

DEMO = Recipe(
    batch=16, lr=4e-3, iterations=260, warmup=20, schedule="poly", weight_decay=0.05, layer_decay=0.9, drop_path=0.05,
    no_decay=("*.cls_token", "*.pos_embed"), sources=(
        ("schedule", "recipes A9: poly, power 1, linear warm-up"), ("weight_decay", "recipes A9"), ("batch, iterations, lr, layer_decay, drop_path", "ours"),
    ),
)
SMOKE = Recipe(
    batch=8, lr=8e-4, iterations=12, warmup=2, schedule="poly", weight_decay=0.05, layer_decay=0.75, drop_path=0.05,
    no_decay=("*.cls_token", "*.pos_embed"), sources=(("all", "ours"),),
)
RELEASED_TAPS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}  # recipes A9, BEiT's configs; not evenly spaced at depth 12
SETR_TAPS = {12: (4, 7, 9, 11), 24: (9, 14, 19, 23)}  # SETR-repo configs/SETR, for twelve blocks SETR_PUP_DeiT_512x512_160k_ade20k


@dataclass(frozen=True)
class ADE20K:
    """Semantic segmentation. None: the papers' value under the paper family, a scaled-down one otherwise.

    Attributes:
        by: whose protocol, a name of `ade20k_published.PUBLISHED`; "default": MAE's under the paper family; in demo and smoke UperNet without an
            added bias. A protocol decides the decoder, what is added to the ViT, and under the paper family recipe, sizes and windows.
        multi_scale: also score the mean of six scales and their mirror images, as mIoU_ms: fifteen times the time of scoring.
        crop, short, stride: side of training crops and test windows, side that images are resized to, step between windows, in pixels. A crop
            that the patch does not divide is rounded up.
        channels: width of the head.
        auxiliary: weight of the auxiliary losses; 0: no auxiliary heads.
        taps: four blocks of the ViT, 0-based; `scales`: size of their maps relative to the grid.
        holdout: fraction of the training images that is held out and scored in place of the validation images, for tuning.
    """

    version: ClassVar[int] = 2
    groups: ClassVar[tuple[str, ...]] = ("paper",)
    distributed: ClassVar[bool] = True
    summary: ClassVar[str] = "semantic segmentation: UperNet on the fine-tuned ViT, mIoU on ADE20K"
    source: ClassVar[str] = "MAE-paper Table 5 and A.4, UperNet of Xiao et al. 2018 as in BEiT's configurations (recipes A9)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"by": name, "multi_scale": True} if name == "mae-160k" or name.startswith("beit") else {"by": name} for name in PUBLISHED
    }
    variant_sources: ClassVar[Mapping[str, str]] = {
        "mae": "MAE-paper Table 5, A.4", "mae-160k": "MAESeg, MMSeg: reproductions with LayerScale", "mae-long-seq": "long_seq_mae issue 1",
        "beit": "BEiT-repo, 512, no labels seen", "beit-pt2ft": "BEiT-repo, 512, after intermediate fine-tuning",
        "beit-640": "BEiT-repo, 640, after intermediate fine-tuning", "setr": "BEiT-paper Tables 3, 4, 10",
    }

    by: str = "default"
    multi_scale: bool = False
    crop: int | None = None
    short: int | None = None
    stride: int | None = None
    channels: int | None = None
    auxiliary: float = 0.4
    taps: tuple[int, int, int, int] | None = None
    scales: tuple[float, float, float, float] | None = None
    holdout: float = 0.0

    def __post_init__(self) -> None:
        if self.by != "default" and self.by not in PUBLISHED:
            raise UserError(f"by: no protocol {self.by!r}: {suggest(self.by, ['default', *PUBLISHED])}")

    @property
    def columns(self) -> tuple[Metric, ...]:
        """One scale, and if asked for six scales and mirrored."""
        return (Metric("mIoU"), Metric("mIoU_ms")) if self.multi_scale else (Metric("mIoU"),)

    def published(self, protocol: Protocol) -> Published:
        """What the protocol of the evaluation prescribes."""
        if self.by != "default":
            return PUBLISHED[self.by]
        return PUBLISHED[USUAL] if protocol.family == "paper" else Published(beit)

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """ADE20K."""
        return ("ade20k",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """`ade20k_published`, for the sizes that the source has; ours for demo and smoke. Raises UserError for windows that leave gaps."""
        crop, stride = self.windows(protocol, vit)
        if not 0 < stride <= crop:
            raise UserError(f"stride must be at least 1 and at most the crop of {crop} pixels, not {stride}")
        if protocol.family == "paper":
            return self.published(protocol).recipe(vit.paper_size)
        return {"demo": DEMO, "smoke": SMOKE}.get(protocol.family)

    def skip(self, vit: ViTConfig) -> str | None:
        """Reason why a decoder cannot sit on this ViT, or None."""
        if vit.relative_bias != "none" and min(vit.grid) < 2:
            return f"the relative bias of a grid of {vit.grid[0]}x{vit.grid[1]} patches cannot be brought to that of the crops"
        return None

    def notes(self, protocol: Protocol, vit: ViTConfig) -> tuple[str, ...]:
        """A crop that was rounded."""
        wanted, crop = self.crop or self.published(protocol).crop, self.windows(protocol, vit)[0]
        return (f"crops of {crop} pixels: the patch of {vit.patch} does not divide {wanted}",) if protocol.family == "paper" and crop != wanted else ()

    def windows(self, protocol: Protocol, vit: ViTConfig) -> tuple[int, int]:
        """Side of crops and windows, and the step between windows, in pixels: the protocol's, or two thirds of another crop (ours)."""
        paper, its = protocol.family == "paper", self.published(protocol)
        crop = self.crop or (its.crop if paper else vit.size[0])
        stride = its.stride if paper and not self.crop else crop * 2 // 3
        return -(-crop // vit.patch) * vit.patch, stride if self.stride is None else self.stride

    def golden(self, folder: Path) -> tuple[Golden, ...]:
        """Known answers, see `evals.openmmlab.golden`."""
        from evals.openmmlab.foreign import openmmlab

        with openmmlab():
            from evals.openmmlab.golden import segmentation

            return segmentation(self, folder)

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Fine-tune and score; resumable inside context.session.dir.

        Raises:
            Interrupted: a signal came; running it again goes on.
            JobFailed: a broken image or label, or a loss that is not finite.
        """
        from evals.openmmlab.foreign import openmmlab

        with openmmlab():
            return self._run(checkpoint, context)

    def _run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        from evals.openmmlab import samples, session, upernet
        from evals.openmmlab.backbone import steps_by_running_statistics
        from evals.openmmlab.mean_iou import MeanIoU
        from evals.openmmlab.work import Work
        from harness.data import data_set
        from harness.randomness import seed_all

        lent, recipe = context.session, context.recipe
        assert recipe is not None
        sizes = self.sizes(checkpoint.config, context.protocol)
        folder = lent.folders["ade20k"]
        classes = data_set("ade20k").classes(folder)
        with session.quiet(lent, "mmseg"):
            train = upernet.scenes(folder, "training", classes, upernet.train_pipeline(sizes, len(classes)))
            rest, held = samples.held_out(len(train), self.holdout)
            test = upernet.scenes(folder, "training" if held else "validation", classes, upernet.test_pipeline(sizes, len(classes)))
            chosen = samples.readable(test, held or range(len(test)), lent)
            seed_all(lent.seed, "init")
            metric = MeanIoU(lent.dir / "outcomes.npz", [column.name for column in self.columns])
            model = upernet.build(checkpoint, recipe, sizes, len(classes))
            work = Work(
                lent, recipe, model,
                samples.InOrder(train, rest, lent.seed, lent.on_bad_image == "skip"), samples.InOrder(test, chosen, None, False), metric,
            )
            scores = session.train_and_test(work, "mmseg")
        facts, alone = work.record_facts(), steps_by_running_statistics(model, work.passes)
        facts["deviations"] = [*self.deviations(checkpoint, context.protocol, alone), *facts.get("deviations", ())]
        return Outcome({column.name: scores[column.name] for column in self.columns}, metric.path, facts)

    def deviations(self, checkpoint: Backbone, protocol: Protocol, alone: int) -> list[str]:
        """What a reader must know of how it ran. `alone`: training steps in which a batch norm had one value per channel."""
        found = [f"batch norm of the 1x1 pooled branch by running statistics in {alone} steps: one image at a time"] if alone else []
        other = (tuple(checkpoint.mean), tuple(checkpoint.std)) != (IMAGENET_MEAN, IMAGENET_STD)
        if protocol.family == "paper" and self.by.startswith("beit") and other:
            found.append("normalised as in pre-training, BEiT's segmentation code always with ImageNet's mean and std")
        return found

    def sizes(self, vit: ViTConfig, protocol: Protocol) -> dict[str, Any]:
        """What the fields that are None stand for, and what the protocol adds to the ViT."""
        from evals.openmmlab.backbone import even_taps, scales_for

        paper, its = protocol.family == "paper", self.published(protocol)
        crop, stride = self.windows(protocol, vit)
        setr = its.head == "setr"
        return {
            "crop": crop, "short": self.short or crop, "stride": stride, "channels": self.channels or (vit.width if paper else 64),
            "auxiliary": self.auxiliary, "taps": self.taps or (SETR_TAPS if setr else RELEASED_TAPS).get(vit.depth, even_taps(vit.depth)),
            "scales": self.scales or ((1.0, 1.0, 1.0, 1.0) if setr else scales_for(vit.patch)), "patch": vit.patch, "multi_scale": self.multi_scale,
            "head": its.head, "bias": its.bias, "layer_scale": its.layer_scale, "positions": its.positions,
        }
