"""Fine-tuning a ViT on labelled images and scoring top-1: ImageNet, iNaturalist, Places, CIFAR-100, a user's own class folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from evals.recipes import PUBLISHED, Published, scaled_down
from harness.spec import JobFailed, Metric, Outcome, Protocol, Recipe, UserError, ViTConfig, suggest

if TYPE_CHECKING:
    from harness.checkpoint import Backbone
    from harness.classifier import Classifier
    from harness.plugins import EvalContext


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning, then top-1 on val. The model that was scored is kept as a checkpoint (`keeps_model`), for evaluators that go on from it.

    Attributes:
        holdout: fraction of train that is held out and scored instead of val, for tuning; 0 scores val.
        by: whose recipe, a name of `evals.recipes.PUBLISHED`; "default": the data set's usual one.
        size: side of the images in pixels, None: as pre-trained. Positions are interpolated to another size.
        pooling: what the classifier reads; "published": as the recipe's source has it (see `evals.recipes.Published`).
    """

    holdout: float = 0.0
    by: str = "default"
    size: int | None = None
    pooling: Literal["published", "cls", "mean"] = "published"

    version: ClassVar[int] = 2
    columns: ClassVar[tuple[Metric, ...]] = (Metric("top-1"),)
    distributed: ClassVar[bool] = True
    data: ClassVar[str]
    usual: ClassVar[str] = "mae"
    keeps_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout must be at least 0 and below 1, not {self.holdout}")
        if self.by != "default" and self.by not in PUBLISHED:
            raise UserError(f"by: no recipe {self.by!r}: {suggest(self.by, ['default', *PUBLISHED])}")

    @property
    def after(self) -> str:
        """The evaluator whose fine-tuned model this one trains on from: 384 pixels come after 224 (recipes A5, A7). "": none."""
        return self.data if self.by in ("beit-384", "deit-384") else ""

    @property
    def published(self) -> Published:
        """The recipe and read-out that it is tuned by under the paper protocols."""
        return PUBLISHED[self.usual if self.by == "default" else self.by]

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """The labelled set that is trained on and scored."""
        return (self.data,)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """paper: `evals.recipes`, for the sizes that the source has. demo, smoke: ours, with the usual recipe's name only."""
        if protocol.family == "paper":
            return self.published.recipe(vit.paper_size)
        return scaled_down(protocol.family) if self.by == "default" else None

    def skip(self, vit: ViTConfig) -> str | None:
        """A size that its patch does not divide."""
        fits = self.size is None or (self.size >= vit.patch and self.size % vit.patch == 0)
        return None if fits else f"a patch of {vit.patch} pixels does not divide an image size of {self.size}"

    def read_out(self, protocol: Protocol) -> Literal["cls", "mean"]:
        """What the classifier reads."""
        published = self.published.pooling if protocol.family == "paper" else "mean"
        return published if self.pooling == "published" else self.pooling

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Fine-tune and score; or score the classifier of the pre-training, when the method's transfer says so.

        Raises:
            JobFailed: that classifier is missing or of other classes; data or images are broken; the loss is not finite.
        """
        from evals.scoring import labelled_images, predict, rank, top1
        from harness.augment import EvalTransform, TrainTransform
        from harness.randomness import seed_all
        from harness.train import fit

        session, recipe = context.session, context.recipe
        train, val = labelled_images(self.data, session, self.holdout)
        target = dataclasses.replace(checkpoint.config, size=(self.size, self.size)) if self.size else checkpoint.config
        evaluate = EvalTransform(target.size, 0.875 if max(target.size) <= 224 else 1.0)  # recipes A2, A7
        if context.overrides.use_head:
            if self.holdout:
                raise JobFailed("holdout: the held-out images were trained on by the pre-training whose classifier is to be scored")
            model = self.own_classifier(checkpoint, val.classes, target)
            facts: dict[str, Any] = {"images_seen": 0, "flops": 0.0, "head": "of the pre-training"}
        else:
            assert recipe is not None
            if target.relative_bias == "shared":
                target = dataclasses.replace(target, relative_bias="block")  # BEiT fine-tunes a table per block (recipes A7)
            seed_all(session.seed, "head")
            if self.after:
                model = self.own_classifier(checkpoint, train.classes, target, recipe)
            else:
                model = self.fresh_classifier(checkpoint, train.classes, target, recipe, self.read_out(context.protocol))
            facts = fit(model, train, TrainTransform(target.size, recipe.augment), recipe, session)
        if self.keeps_model and rank() == 0:
            state = {k: v.detach().cpu().contiguous() for k, v in model.vit.state_dict().items()}
            kept = dataclasses.replace(checkpoint, config=model.vit.config, state=state, classifier=model.classifier())
            kept.save(session.dir / "checkpoint" / "backbone.pt")
        return top1(predict(model, val, evaluate, session), val, session, facts)

    def fresh_classifier(
        self, checkpoint: Backbone, classes: tuple[str, ...], target: ViTConfig, recipe: Recipe, pooling: Literal["cls", "mean"]
    ) -> Classifier:
        """The pre-trained ViT with a read-out to train."""
        from harness.classifier import FINE_TUNE_STD, Classifier

        return Classifier(
            checkpoint.build(target, recipe.drop_path), classes, mean=checkpoint.mean, std=checkpoint.std, pooling=pooling, augment=recipe.augment,
            **({"head_std": FINE_TUNE_STD} if self.published.small_head else {}),
        )

    def own_classifier(self, checkpoint: Backbone, classes: tuple[str, ...], target: ViTConfig, recipe: Recipe | None = None) -> Classifier:
        """The model as it comes, read-out included; with a recipe, to train on."""
        from harness.classifier import Classifier

        if checkpoint.classifier is None:
            raise JobFailed("the pre-training left no classifier to score: it was not trained with labels")
        saved = tuple(checkpoint.classifier.get("classes", ()))
        if saved != classes and saved != tuple(str(i) for i in range(len(classes))):  # numbers: an original's file, in the order of the sorted names
            raise JobFailed(
                f"the pre-training's classifier knows other classes than {self.data} ({len(saved)} against {len(classes)}): "
                "use --tuning shared to fine-tune"
            )
        vit = checkpoint.build(target, 0.0 if recipe is None else recipe.drop_path)
        augment = None if recipe is None else recipe.augment
        return Classifier.restore(vit, {**checkpoint.classifier, "classes": classes}, checkpoint.mean, checkpoint.std, augment)


@dataclass(frozen=True)
class ImageNet(FineTuning):
    """ImageNet-1K, or any set in its layout."""

    data: ClassVar[str] = "imagenet"
    keeps_model: ClassVar[bool] = True
    groups: ClassVar[tuple[str, ...]] = ("paper",)
    summary: ClassVar[str] = "end-to-end fine-tuning on ImageNet, top-1"
    source: ClassVar[str] = "MAE-repo FINETUNE.md (recipes A2)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{by: {"by": by} for by in ("mae", "mae-table9", "beit", "beit-repo", "beit-from-22k", "scratch", "mocov3", "dino")},
        "384": {"by": "beit-384", "size": 384}, "deit-384": {"by": "deit-384", "size": 384}, "448": {"by": "mae-448", "size": 448},
    }
    variant_sources: ClassVar[Mapping[str, str]] = {
        "beit-repo": "BEiT-repo README", "384": "BEiT-paper Table 1, DeiT-repo README_deit.md", "beit-from-22k": "BEiT-repo README, from pt22k_ft22k",
        "dino": "DINO-repo issue #31", "mae": "MAE-repo FINETUNE.md", "scratch": "MAE-paper Table 11: no fine-tuning", "448": "MAE-paper Table 3; recipe ours",
        "mae-table9": "MAE-paper Table 9", "beit": "BEiT-paper Table 13", "deit-384": "DeiT-repo README_deit.md", "mocov3": "MoCo3-paper Table 5, DeiT's code",
    }


@dataclass(frozen=True)
class INat2017(FineTuning):
    """iNaturalist 2017."""

    data: ClassVar[str] = "inat2017"
    usual: ClassVar[str] = "mae-transfer"
    groups: ClassVar[tuple[str, ...]] = ("inat",)
    summary: ClassVar[str] = "transfer to fine-grained classes: fine-tuning on iNaturalist 2017, top-1"
    source: ClassVar[str] = "MAE-paper A.5 with Table 9, lr and epochs ours (recipes A11)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"448": {"by": "mae-448", "size": 448}}
    variant_sources: ClassVar[Mapping[str, str]] = {"448": "MAE-paper Table 6, row ViT-H at 448 pixels; the recipe is ours"}


@dataclass(frozen=True)
class INat2018(INat2017):
    """iNaturalist 2018."""

    data: ClassVar[str] = "inat2018"
    summary: ClassVar[str] = "transfer to fine-grained classes: fine-tuning on iNaturalist 2018, top-1"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {**INat2017.variants, "deit": {"by": "inat-deit"}, "dino": {"by": "inat-dino"}}
    variant_sources: ClassVar[Mapping[str, str]] = {**INat2017.variant_sources, "deit": "DeiT-repo issues #105, #141", "dino": "DINO-repo issue #171"}


@dataclass(frozen=True)
class INat2019(INat2018):
    """iNaturalist 2019."""

    data: ClassVar[str] = "inat2019"
    summary: ClassVar[str] = "transfer to fine-grained classes: fine-tuning on iNaturalist 2019, top-1"


@dataclass(frozen=True)
class Places205(INat2017):
    """Places205."""

    data: ClassVar[str] = "places205"
    groups: ClassVar[tuple[str, ...]] = ("places",)
    summary: ClassVar[str] = "transfer to scenes: fine-tuning on Places205, top-1"


@dataclass(frozen=True)
class Places365(Places205):
    """Places365-Standard."""

    data: ClassVar[str] = "places365"
    summary: ClassVar[str] = "transfer to scenes: fine-tuning on Places365, top-1"


@dataclass(frozen=True)
class CIFAR100(FineTuning):
    """CIFAR-100 at the ViT's own image size."""

    data: ClassVar[str] = "cifar100"
    usual: ClassVar[str] = "cifar-beit"
    summary: ClassVar[str] = "transfer to small images: fine-tuning on CIFAR-100, top-1"
    source: ClassVar[str] = "BEiT-paper Table 13 (recipes A7)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mocov3": {"by": "cifar-mocov3"}, "dino": {"by": "cifar-dino"}}
    variant_sources: ClassVar[Mapping[str, str]] = {"mocov3": "MoCo3-repo transfer/README.md", "dino": "DINO-repo issue #144; min_lr is ours"}


@dataclass(frozen=True)
class ImageFolder(FineTuning):
    """A user's own class folder: DIR/train/<class> and DIR/val/<class>, or DIR/<class>, of which a fifth is then held out.

    Attributes:
        path: where it lies. No part of the identity: the content's fingerprint is.
    """

    path: str = field(default="", compare=False, metadata={"identity": False})

    data: ClassVar[str] = "imagefolder"
    summary: ClassVar[str] = "end-to-end fine-tuning on a class folder of yours (imagefolder:DIR), top-1"
    source: ClassVar[str] = "ours: as for ImageNet, MAE-repo FINETUNE.md (recipes A2)"

    @classmethod
    def from_argument(cls, text: str) -> ImageFolder:
        """The evaluator of a folder.

        Raises:
            UserError: there is no such folder.
        """
        if not text or not Path(text).is_dir():
            raise UserError(f"--evals imagefolder:{text}: is no folder: expected <class>/*.jpg, or train/<class> and val/<class>")
        return cls(path=text)

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """The folder under its own name."""
        return (f"{self.data}:{self.path}",)
