"""Linear probe: the ViT is frozen, a batch norm and a linear layer on its class token are trained, top-1 on ImageNet's val."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.spec import Augment, Metric, Outcome, Protocol, Recipe, UserError, ViTConfig

if TYPE_CHECKING:
    from harness.checkpoint import Backbone
    from harness.classifier import Classifier
    from harness.data import ImageList
    from harness.plugins import EvalContext, Session

FROZEN = ("vit.*",)
PLAIN = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)


@dataclass(frozen=True)
class Linear:
    """MAE's linear probe (recipes A3).

    With the recipe's augmentation switched off (crop_scale and crop_ratio (1, 1), flip 0: the demo's choice) the features of the central
    crops are computed once and all epochs read them; else every epoch crops anew, with MAE's sampler that does not retry.

    Attributes:
        holdout: fraction of train that is held out and scored instead of val, for tuning; 0 scores val.
    """

    holdout: float = 0.0

    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Metric, ...]] = (Metric("top-1"),)
    summary: ClassVar[str] = "linear probe on ImageNet with a frozen ViT, top-1"
    source: ClassVar[str] = "MAE-repo main_linprobe.py; MAE-paper Table 10 (recipes A3)"

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout must be at least 0 and below 1, not {self.holdout}")

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """ImageNet, or any set in its layout."""
        return ("imagenet",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """paper: MAE-paper Table 10, for ViT-B/16 at 224 pixels. demo, smoke: the same optimiser on cached features (ours)."""
        if protocol.family == "paper":
            if (vit.size, vit.patch, vit.width, vit.depth) != ((224, 224), 16, 768, 12):
                return None
            return Recipe(
                batch=16384, lr=0.1, lr_batch=256, epochs=90, warmup=10, optimizer="lars", momentum=0.9, weight_decay=0.0, frozen=FROZEN,
                augment=Augment(crop_scale=(0.08, 1.0)), sources=(("all", "MAE-paper Table 10, MAE-repo main_linprobe.py (recipes A3)"),),
            )
        if protocol.family not in ("demo", "smoke"):
            return None
        demo = protocol.family == "demo"
        return Recipe(
            batch=512 if demo else 64, lr=0.1, lr_batch=256 if demo else 64, epochs=90 if demo else 20, warmup=10 if demo else 2, optimizer="lars",
            momentum=0.9, weight_decay=0.0, frozen=FROZEN, augment=PLAIN,
            sources=(
                ("optimizer, lr, epochs, warmup, schedule, weight_decay", "MAE-paper Table 10 (recipes A3); smoke's length is ours"),
                ("batch, augment", "ours: features of the central crops, computed once"),
            ),
        )

    def skip(self, vit: ViTConfig) -> str | None:
        """Runs on every ViT."""
        return None

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Train the probe and score it.

        Raises:
            JobFailed: data or images are broken; the loss is not finite.
        """
        from harness.augment import EvalTransform, TrainTransform
        from harness.classifier import PROBE_STD, Classifier, labelled_images, predict, top1
        from harness.randomness import seed_all
        from harness.train import fit

        session, recipe, size = context.session, context.recipe, checkpoint.config.size
        assert recipe is not None
        train, val = labelled_images("imagenet", session, self.holdout)
        evaluate = EvalTransform(size, 0.875 if max(size) <= 224 else 1.0)  # recipes A3
        seed_all(session.seed, "head")
        probe = Classifier(
            checkpoint.build(), train.classes, mean=checkpoint.mean, std=checkpoint.std, pooling="cls", augment=recipe.augment, head_std=PROBE_STD,
            probe=True,
        )
        a = recipe.augment
        if (a.crop_scale, a.crop_ratio, a.flip) == (PLAIN.crop_scale, PLAIN.crop_ratio, PLAIN.flip) and not (
            a.color_jitter or a.rand_augment or a.erasing or a.mixup or a.cutmix
        ):
            facts = train_on_features(probe, train, evaluate, recipe, session)
        else:
            facts = fit(probe, train, TrainTransform(size, a, retry=False), recipe, session)
        return top1(predict(probe, val, evaluate, session), val, session, facts)


def features(probe: Classifier, images: ImageList, transform: Any, session: Session) -> Any:
    """Features (n, D) and labels (n,) of all images that can be read, computed once and kept in the job's checkpoint folder."""
    import torch

    from harness.checkpoint import write_atomically
    from harness.classifier import image_batches

    path = Path(session.dir) / "checkpoint" / "features.pt"
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        return saved["features"], saved["label"]
    probe.to(session.device).eval()
    rows, kept = [], []
    with torch.no_grad(), torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32):
        for indices, batch in image_batches(images, transform, session, 64, "features"):
            rows.append(probe.features(batch).cpu())
            kept += indices
    assert images.labels is not None
    x, label = torch.cat(rows), torch.from_numpy(images.labels[kept])
    write_atomically(path, lambda stream: torch.save({"features": x, "label": label}, stream))
    return x, label


def train_on_features(probe: Classifier, images: ImageList, transform: Any, recipe: Recipe, session: Session) -> dict[str, Any]:
    """`harness.train.fit` for what has no augmentation: the ViT runs once over the images, the epochs over its features. Seconds; not saved midway.

    Raises:
        JobFailed: the loss is not finite.
    """
    import torch
    import torch.nn.functional as F

    from harness.optim import apply_schedule, build_optimizer, clip_gradients, parameter_groups
    from harness.randomness import generator
    from harness.spec import JobFailed
    from harness.train import Metrics, count_flops, steps_of

    x, label = (t.to(session.device) for t in features(probe, images, transform, session))
    per_epoch, total = steps_of(recipe, len(x))
    optimizer = build_optimizer(parameter_groups(probe, recipe, len(probe.vit.blocks)), recipe)
    trained = [p for p in probe.parameters() if p.requires_grad]
    metrics, loss = Metrics(session.dir / "metrics.jsonl", "probe", 0), torch.zeros(())
    probe.train()
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.from_numpy(generator(session.seed, "order", epoch).permutation(len(x))).to(session.device)
        chosen = order[torch.arange(place * recipe.batch, (place + 1) * recipe.batch, device=session.device) % len(x)]
        apply_schedule(optimizer, recipe, step, total)
        scores = probe.read(x[chosen])
        loss = F.cross_entropy(scores, label[chosen], label_smoothing=recipe.augment.smoothing)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        clip_gradients(trained, recipe)
        optimizer.step()
        if step % max(1, total // 50) == 0 or step == total - 1:
            metrics.add(step + 1, {"loss": float(loss.detach()), "lr": optimizer.param_groups[0]["lr"]})
    if not torch.isfinite(loss):
        end = float(loss.detach())
        raise JobFailed(f"linear probe: loss is {end} after {total} steps (lr {recipe.peak_lr:.3g}): lower lr with --set linear.recipe.lr=...")
    one = torch.zeros(1, 3, *probe.vit.config.size, dtype=torch.uint8, device=session.device)
    counted: dict[str, Any] = {"flops_per_step": None}
    with torch.no_grad(), count_flops(counted):
        probe.eval().features(one)
    flops = counted["flops_per_step"] * len(x)
    return {"steps": total, "images_seen": len(x), "flops": flops, "loss": float(loss.detach()), "epochs_on_features": total / per_epoch}
