"""`coco`: Mask R-CNN of mmdetection on a pyramid of the ViT, box and mask AP by COCO's protocol (recipes A10, Li21's setting).

Sizes of the papers: 1024 px square with large-scale jitter 0.1..2, 256 channels. The demo scales these down. Categories come from
the annotations; images without objects are left out in training and scored in validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Golden
from harness.spec import Metric, Outcome, Protocol, Recipe, ViTConfig

DEMO = Recipe(
    batch=8, lr=1.5e-3, iterations=400, warmup=40, schedule="cosine", weight_decay=0.1, layer_decay=0.9, drop_path=0.05, clip=10.0,
    no_decay=("*.cls_token", "*.pos_embed"), sources=(
        ("schedule, weight_decay", "recipes A10: Li21"), ("batch, iterations, lr, layer_decay, drop_path, warmup, clip", "ours"),
    ),
)
SMOKE = Recipe(
    batch=4, lr=6e-4, iterations=10, warmup=2, schedule="cosine", weight_decay=0.1, layer_decay=0.75, drop_path=0.05, clip=10.0,
    no_decay=("*.cls_token", "*.pos_embed"), sources=(("all", "ours"),),
)
PAPER_B = Recipe(
    batch=64, lr=8e-5, epochs=100, warmup=0.25, schedule="cosine", weight_decay=0.1, drop_path=0.1,
    sources=(("all", "recipes A10: Li21 for MAE, BEiT and supervised; random initialisation wants lr 1.6e-4 and weight decay 0.2"),),
)


@dataclass(frozen=True)
class COCO:
    """Object detection and instance segmentation. None: the papers' value under the paper family, a scaled-down one otherwise.

    `side` of the square input in pixels, `jitter` the range of the resize factor in training, `taps` four blocks of the ViT (0-based);
    `holdout` the fraction of the training images that is held out and scored in place of the validation images, for tuning.
    """

    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Metric, ...]] = (Metric("AP_box"), Metric("AP_mask"))
    summary: ClassVar[str] = "detection and instance segmentation: Mask R-CNN with FPN on the fine-tuned ViT, AP on COCO"
    source: ClassVar[str] = "He et al. 2017 (Mask R-CNN); set up as in Li et al. 2021, MAE Table 4 (recipes A10)"

    side: int | None = None
    jitter: tuple[float, float] | None = None
    taps: tuple[int, int, int, int] | None = None
    scales: tuple[float, float, float, float] | None = None
    holdout: float = 0.0

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """COCO 2017."""
        return ("coco",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Li21's for ViT-B; ours for demo and smoke."""
        if protocol.family == "paper":
            return PAPER_B if (vit.width, vit.depth) == (768, 12) else None
        return {"demo": DEMO, "smoke": SMOKE}.get(protocol.family)

    def skip(self, vit: ViTConfig) -> str | None:
        """Reason why Mask R-CNN cannot sit on this ViT, or None."""
        if vit.relative_bias != "none":
            return "relative position bias at another size than pre-training's is not supported yet"
        return None

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
        from evals.openmmlab import loops, mask_rcnn, samples, session
        from evals.openmmlab.average_precision import AveragePrecision
        from evals.openmmlab.backbone import even_taps, scales_for
        from evals.openmmlab.scenes import COCOScenes
        from harness.data import coco_classes
        from harness.randomness import seed_all

        lent, recipe, vit = context.session, context.recipe, checkpoint.config
        assert recipe is not None
        paper = context.protocol.family == "paper"
        side = self.side or (1024 if paper else 96)
        multiple = max(vit.patch, round(vit.patch / min(self.scales or scales_for(vit.patch))))
        side = -(-side // multiple) * multiple
        folder = lent.folders["coco"]
        classes = coco_classes(folder)
        with session.quiet(lent, "mmdet"):
            train = COCOScenes(folder, "train2017", classes, mask_rcnn.train_pipeline(side, self.jitter or ((0.1, 2.0) if paper else (0.75, 1.33))))
            rest, held = samples.held_out(len(train), self.holdout)
            test = COCOScenes(folder, "train2017" if held else "val2017", classes, mask_rcnn.test_pipeline(side))
            chosen = samples.readable(test, held or range(len(test)), lent)
            seed_all(lent.seed, "init")
            metric = AveragePrecision(lent.dir / "outcomes.npz", test.json, test.ids(chosen), [number for number, _ in classes])
            model = mask_rcnn.build(
                checkpoint, recipe, mask_rcnn.PAPER if paper else mask_rcnn.SMALL, side, self.taps or even_taps(vit.depth),
                self.scales or scales_for(vit.patch), len(classes),
            )
            work = loops.Work(
                lent, recipe, model, samples.InOrder(train, train.with_instances(rest), lent.seed, lent.on_bad_image == "skip"),
                samples.InOrder(test, chosen, None, False), metric, test_batch=1 if paper else 8,
            )
            scores = session.train_and_test(work, "mmdet")
        return Outcome({name: scores[name] for name in ("AP_box", "AP_mask")}, metric.path, work.record_facts())
