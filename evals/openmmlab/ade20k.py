"""`ade20k`: UperNet of mmsegmentation on a pyramid of the ViT, mIoU over ADE20K's validation images (recipes A9).

Sizes of the papers: crop 512, head as wide as the ViT, resize of the short side to 512 times 0.5..2, sliding window with stride
341. The demo scales these down. Classes come from objectInfo150.txt; label 0 is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Golden
from harness.spec import Metric, Outcome, Protocol, Recipe, ViTConfig

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
PAPER_B = Recipe(
    batch=16, lr=1e-4, iterations=160_000, warmup=1500, warmup_lr=1e-10, schedule="poly", weight_decay=0.05, layer_decay=0.65, drop_path=0.1,
    sources=(("lr, layer_decay, drop_path, iterations, batch", "recipes A9: MAESeg ViT-B and MMSeg mae-base, 160k reproduction"),
             ("warmup, schedule, weight_decay", "recipes A9: common to BEiT's configs")),
)
RELEASED_TAPS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}  # recipes A9, BEiT's configs; not evenly spaced at depth 12


@dataclass(frozen=True)
class ADE20K:
    """Semantic segmentation. None: the papers' value under the paper family, a scaled-down one otherwise.

    `crop` is the side of training crops and test windows, `short` the side that images are resized to, `stride` of the window,
    all in pixels; `channels` the width of the head; `taps` four blocks of the ViT, 0-based; `holdout` the fraction of the training
    images that is held out and scored in place of the validation images, for tuning.
    """

    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Metric, ...]] = (Metric("mIoU"),)
    summary: ClassVar[str] = "semantic segmentation: UperNet on the fine-tuned ViT, mIoU on ADE20K"
    source: ClassVar[str] = "Xiao et al. 2018 (UperNet); set up as in MAE Table 5 and BEiT's configurations (recipes A9)"

    crop: int | None = None
    short: int | None = None
    stride: int | None = None
    channels: int | None = None
    auxiliary: float = 0.4
    taps: tuple[int, int, int, int] | None = None
    scales: tuple[float, float, float, float] | None = None
    holdout: float = 0.0

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """ADE20K."""
        return ("ade20k",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """MAE's 160k-iteration reproduction for ViT-B; ours for demo and smoke."""
        if protocol.family == "paper":
            return PAPER_B if (vit.width, vit.depth) == (768, 12) else None
        return {"demo": DEMO, "smoke": SMOKE}.get(protocol.family)

    def skip(self, vit: ViTConfig) -> str | None:
        """Reason why UperNet cannot sit on this ViT, or None."""
        if vit.relative_bias != "none":
            return "relative position bias at another size than pre-training's is not supported yet"
        return None

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
        from evals.openmmlab import loops, samples, session, upernet
        from evals.openmmlab.mean_iou import MeanIoU
        from harness.data import ade20k_classes
        from harness.randomness import seed_all

        lent, recipe = context.session, context.recipe
        assert recipe is not None
        sizes = self.sizes(checkpoint.config, context.protocol)
        folder = lent.folders["ade20k"]
        classes = ade20k_classes(folder)
        with session.quiet(lent, "mmseg"):
            train = upernet.scenes(folder, "training", classes, upernet.train_pipeline(sizes, len(classes)))
            rest, held = samples.held_out(len(train), self.holdout)
            test = upernet.scenes(folder, "training" if held else "validation", classes, upernet.test_pipeline(sizes, len(classes)))
            chosen = samples.readable(test, held or range(len(test)), lent)
            seed_all(lent.seed, "init")
            metric = MeanIoU(lent.dir / "outcomes.npz")
            work = loops.Work(
                lent, recipe, upernet.build(checkpoint, recipe, sizes, len(classes)),
                samples.InOrder(train, rest, lent.seed, lent.on_bad_image == "skip"), samples.InOrder(test, chosen, None, False), metric,
            )
            scores = session.train_and_test(work, "mmseg")
        return Outcome({"mIoU": scores["mIoU"]}, metric.path, work.record_facts())

    def sizes(self, vit: ViTConfig, protocol: Protocol) -> dict[str, Any]:
        """What the fields that are None stand for."""
        from evals.openmmlab.backbone import even_taps, scales_for

        paper = protocol.family == "paper"
        crop = self.crop or (512 if paper else vit.size[0])
        crop = -(-crop // vit.patch) * vit.patch
        return {
            "crop": crop, "short": self.short or crop, "stride": self.stride or crop * 2 // 3, "channels": self.channels or (vit.width if paper else 64),
            "auxiliary": self.auxiliary, "taps": self.taps or RELEASED_TAPS.get(vit.depth, even_taps(vit.depth)),
            "scales": self.scales or scales_for(vit.patch), "patch": vit.patch,
        }
