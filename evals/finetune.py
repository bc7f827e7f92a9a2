"""Fine-tuning the whole ViT on labelled images and scoring top-1: ImageNet, iNaturalist 2018, Places365, a user's own class folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from harness.spec import Augment, JobFailed, Metric, Outcome, Protocol, Recipe, UserError, ViTConfig

if TYPE_CHECKING:
    from harness.checkpoint import Backbone
    from harness.classifier import Classifier
    from harness.plugins import EvalContext

POLICY = "rand-m9-mstd0.5-inc1"
NO_DECAY = ("vit.pos_embed", "vit.cls_token")  # MAE's and BEiT's fine-tuning (recipes A2); vectors are exempt anyway


def published(lr: float, layer_decay: float, erasing: float, sources: tuple[tuple[str, str], ...]) -> Recipe:
    """MAE's fine-tuning of ViT-B/16 at 224 pixels, 100 epochs (recipes A2); the arguments are where its two tables differ."""
    augment = Augment(crop_scale=(0.08, 1.0), rand_augment=POLICY, erasing=erasing, mixup=0.8, cutmix=1.0, smoothing=0.1)
    return Recipe(
        batch=1024, lr=lr, lr_batch=256, epochs=100, warmup=5, min_lr=1e-6, weight_decay=0.05, no_decay=NO_DECAY, layer_decay=layer_decay,
        drop_path=0.1, augment=augment, sources=sources,
    )


MAE_FINETUNE = published(5e-4, 0.65, 0.25, (
    ("all", "MAE-repo FINETUNE.md, ViT-B (recipes A2)"), ("augment.crop_scale", "timm's default (recipes A2)"),
))
MAE_TABLE_9 = published(1e-3, 0.75, 0.0, (
    ("all", "MAE-paper A.5: the setting of Table 9 (recipes A2, A11)"), ("min_lr", "MAE-repo FINETUNE.md"),
    ("lr, epochs", "Table 9's: what was adjusted for each data set was never published (recipes A11)"),
))


def scaled_down(family: str) -> Recipe | None:
    """The recipes of the demo and of smoke, for all data sets alike."""
    sources = (
        ("betas, smoothing, weight_decay, layer-wise decay, drop_path's rule", "MAE-paper Table 9 (recipes A2)"),
        ("batch, lr, length, warmup, layer_decay, drop_path, augment", "ours, for a budget of seconds"),
    )
    if family == "demo":
        return Recipe(
            batch=32, lr=3e-3, iterations=80, warmup=8, min_lr=1e-6, weight_decay=0.05, no_decay=NO_DECAY, layer_decay=0.9,
            augment=Augment(crop_scale=(0.4, 1.0), smoothing=0.1), sources=sources,
        )
    if family == "smoke":
        augment = Augment(crop_scale=(0.4, 1.0), rand_augment=POLICY, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
        return Recipe(
            batch=32, lr=1e-3, iterations=16, warmup=2, min_lr=1e-6, weight_decay=0.05, no_decay=NO_DECAY, layer_decay=0.75, drop_path=0.1,
            augment=augment, sources=sources,
        )
    return None


@dataclass(frozen=True)
class FineTuning:
    """End-to-end fine-tuning with the mean of the patch tokens as read-out (MAE's and BEiT's code), then top-1 on val.

    Attributes:
        holdout: fraction of train that is held out and scored instead of val, for tuning; 0 scores val.
    """

    holdout: float = 0.0

    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Metric, ...]] = (Metric("top-1"),)
    data: ClassVar[str]
    full_scale: ClassVar[Recipe]

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout must be at least 0 and below 1, not {self.holdout}")

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """The labelled set that is trained on and scored."""
        return (self.data,)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """paper: MAE's, for ViT-B/16 at 224 pixels. demo, smoke: ours."""
        if protocol.family == "paper":
            base = (vit.size, vit.patch, vit.width, vit.depth) == ((224, 224), 16, 768, 12)
            return self.full_scale if base else None
        return scaled_down(protocol.family)

    def skip(self, vit: ViTConfig) -> str | None:
        """Runs on every ViT."""
        return None

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Fine-tune and score; or score the classifier of the pre-training, when the method's transfer says so.

        Raises:
            JobFailed: that classifier is missing or of other classes; data or images are broken; the loss is not finite.
        """
        from harness.augment import EvalTransform, TrainTransform
        from harness.classifier import FINE_TUNE_STD, Classifier, labelled_images, predict, top1
        from harness.randomness import seed_all
        from harness.train import fit

        session, recipe = context.session, context.recipe
        train, val = labelled_images(self.data, session, self.holdout)
        evaluate = EvalTransform(checkpoint.config.size, 0.875 if max(checkpoint.config.size) <= 224 else 1.0)  # recipes A2
        if context.overrides.use_head:
            if self.holdout:
                raise JobFailed("holdout: the held-out images were trained on by the pre-training whose classifier is to be scored")
            model = self.own_classifier(checkpoint, val.classes)
            return top1(predict(model, val, evaluate, session), val, session, {"images_seen": 0, "flops": 0.0, "head": "of the pre-training"})
        assert recipe is not None
        target = checkpoint.config
        if target.relative_bias == "shared":
            target = dataclasses.replace(target, relative_bias="block")  # BEiT fine-tunes a table per block (recipes A7)
        seed_all(session.seed, "head")
        model = Classifier(
            checkpoint.build(target, recipe.drop_path), train.classes, mean=checkpoint.mean, std=checkpoint.std, augment=recipe.augment,
            head_std=FINE_TUNE_STD,
        )
        facts = fit(model, train, TrainTransform(target.size, recipe.augment), recipe, session)
        return top1(predict(model, val, evaluate, session), val, session, facts)

    def own_classifier(self, checkpoint: Backbone, classes: tuple[str, ...]) -> Classifier:
        """The model as pre-trained, read-out included."""
        from harness.classifier import Classifier

        if checkpoint.classifier is None:
            raise JobFailed("the pre-training left no classifier to score: it was not trained with labels")
        saved = tuple(checkpoint.classifier.get("classes", ()))
        if saved != classes:
            raise JobFailed(
                f"the pre-training's classifier knows other classes than {self.data} ({len(saved)} against {len(classes)}): "
                "use --tuning shared to fine-tune"
            )
        return Classifier.restore(checkpoint.build(), checkpoint.classifier, checkpoint.mean, checkpoint.std)


@dataclass(frozen=True)
class ImageNet(FineTuning):
    """ImageNet-1K, or any set in its layout."""

    data: ClassVar[str] = "imagenet"
    full_scale: ClassVar[Recipe] = MAE_FINETUNE
    summary: ClassVar[str] = "end-to-end fine-tuning on ImageNet, top-1"
    source: ClassVar[str] = "MAE-repo FINETUNE.md; MAE-paper Table 9 (recipes A2)"


@dataclass(frozen=True)
class INat2018(FineTuning):
    """iNaturalist 2018."""

    data: ClassVar[str] = "inat2018"
    full_scale: ClassVar[Recipe] = MAE_TABLE_9
    groups: ClassVar[tuple[str, ...]] = ("inat",)
    summary: ClassVar[str] = "transfer to fine-grained classes: fine-tuning on iNaturalist 2018, top-1"
    source: ClassVar[str] = "MAE-paper A.5 with Table 9 (recipes A11)"


@dataclass(frozen=True)
class Places365(FineTuning):
    """Places365-Standard."""

    data: ClassVar[str] = "places365"
    full_scale: ClassVar[Recipe] = MAE_TABLE_9
    groups: ClassVar[tuple[str, ...]] = ("places",)
    summary: ClassVar[str] = "transfer to scenes: fine-tuning on Places365, top-1"
    source: ClassVar[str] = "MAE-paper A.5 with Table 9 (recipes A11)"


@dataclass(frozen=True)
class ImageFolder(FineTuning):
    """A user's own class folder: DIR/train/<class> and DIR/val/<class>, or DIR/<class>, of which a fifth is then held out.

    Attributes:
        path: where it lies. No part of the identity: the content's fingerprint is.
    """

    path: str = field(default="", compare=False, metadata={"identity": False})

    data: ClassVar[str] = "imagefolder"
    full_scale: ClassVar[Recipe] = dataclasses.replace(MAE_FINETUNE, sources=(("all", "ours: as for ImageNet (recipes A2)"),))
    summary: ClassVar[str] = "end-to-end fine-tuning on a class folder of yours (imagefolder:DIR), top-1"
    source: ClassVar[str] = "MAE-repo FINETUNE.md (recipes A2)"

    @classmethod
    def from_argument(cls, text: str) -> ImageFolder:
        """The evaluator of a folder.

        Raises:
            UserError: there is no such folder.
        """
        if not text or not Path(text).is_dir():
            raise UserError(f"--evals imagefolder:{text}: no such folder: expected <class>/*.jpg, or train/<class> and val/<class>")
        return cls(path=text)

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """The folder under its own name."""
        return (f"{self.data}:{self.path}",)
