"""Robustness without training: a classifier of ImageNet's classes, scored on ImageNet-A, -R, -Sketch and -C (recipes A12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from harness.spec import JobFailed, Metric, Outcome, Protocol, Recipe, ViTConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from harness.augment import EvalTransform
    from harness.checkpoint import Backbone
    from harness.classifier import Classifier
    from harness.data import ImageList
    from harness.plugins import EvalContext

OWN = "the checkpoint's own"


@dataclass(frozen=True)
class Robustness:
    """Top-1 of a classifier among the classes that the test set has (200 in -A and -R: the arg-max is taken among them).

    Attributes:
        after: the evaluator whose fine-tuned model is scored; "": none, the classifier that the checkpoint brings with it.
    """

    after: str = "imagenet"

    version: ClassVar[int] = 1
    trains: ClassVar[bool] = False
    distributed: ClassVar[bool] = True
    columns: ClassVar[tuple[Metric, ...]] = (Metric("top-1"),)
    groups: ClassVar[tuple[str, ...]] = ("robustness",)
    data: ClassVar[str]
    source: ClassVar[str] = "MAE-paper Table 13 and appendix (recipes A12)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"448": {"after": "imagenet@448"}, "head": {"after": ""}}
    variant_sources: ClassVar[Mapping[str, str]] = {
        "448": "MAE-paper Table 13, row ViT-H at 448 pixels", "head": "the classifier that the checkpoint brings with it, as `head` scores it",
    }

    @property
    def needs_classifier(self) -> bool:
        """Whether the method itself has to leave one."""
        return not self.after

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """The test set."""
        return (self.data,)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Nothing is trained."""
        return None

    def skip(self, vit: ViTConfig) -> str | None:
        """Runs on every ViT."""
        return None

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Score the fine-tuned classifier.

        Raises:
            JobFailed: the checkpoint has no classifier, or does not know the test set's classes; an image is broken.
        """
        import numpy as np

        from evals.robustness_metrics import predict_among
        from evals.scoring import rank, score
        from harness.checkpoint import write_atomically
        from harness.data import read_images

        session = context.session
        images = read_images(self.data, "val", session.folders[self.data])
        assert images.labels is not None
        model = fine_tuned(checkpoint)
        indices = places_among(images, model, self.data)
        transform = self.preparation(checkpoint.config.size)
        correct = np.zeros(len(images), dtype=bool)  # an image that cannot be read, and may be skipped, counts as wrong
        places, scores = score(model, images, transform, session, stage=self.data, read=lambda scores: scores)
        correct[places] = predict_among(scores, indices) == images.labels[places]
        path = session.dir / "outcomes.npz"
        if rank() == 0:
            write_atomically(path, lambda stream: np.savez_compressed(stream, correct=correct, label=images.labels))
        facts = {"images_seen": 0, "flops": 0.0, "scored_images": len(images), "classes": len(images.classes), "model": self.after or OWN}
        return Outcome({"top-1": 100.0 * float(correct.mean())}, path, facts)

    def preparation(self, size: tuple[int, int]) -> EvalTransform:
        """Resized and cropped as for fine-tuning's own test images."""
        from harness.augment import EvalTransform

        return EvalTransform(size, 0.875 if max(size) <= 224 else 1.0)


def fine_tuned(checkpoint: Backbone) -> Classifier:
    """The classifier of a checkpoint. Raises JobFailed when there is none."""
    from harness.classifier import Classifier

    if checkpoint.classifier is None:
        raise JobFailed("the checkpoint has no classifier: what is scored here is a model that was fine-tuned on ImageNet")
    return Classifier.restore(checkpoint.build(), checkpoint.classifier, checkpoint.mean, checkpoint.std)


def places_among(images: ImageList, model: Classifier, name: str) -> Any:
    """Places of the test set's classes among the classifier's, by name, int64 (K,). Raises JobFailed when it does not know one."""
    import numpy as np

    known = {c: i for i, c in enumerate(model.classes)}
    if unknown := [c for c in images.classes if c not in known]:
        raise JobFailed(
            f"{name}: {unknown[0]!r} is no class of the classifier ({len(known)} classes such as {model.classes[0]!r}): "
            "both must be called by ImageNet's folder names"
        )
    return np.array([known[c] for c in images.classes], dtype=np.int64)


@dataclass(frozen=True)
class ImageNetA(Robustness):
    """ImageNet-A: photographs that a ResNet-50 gets wrong, 200 classes."""

    data: ClassVar[str] = "imagenet-a"
    summary: ClassVar[str] = "robustness: the fine-tuned model on ImageNet-A, top-1 among its 200 classes"


@dataclass(frozen=True)
class ImageNetR(Robustness):
    """ImageNet-R: renditions, 200 classes."""

    data: ClassVar[str] = "imagenet-r"
    summary: ClassVar[str] = "robustness: the fine-tuned model on ImageNet-R, top-1 among its 200 classes"


@dataclass(frozen=True)
class ImageNetSketch(Robustness):
    """ImageNet-Sketch: all 1000 classes."""

    data: ClassVar[str] = "imagenet-sketch"
    summary: ClassVar[str] = "robustness: the fine-tuned model on ImageNet-Sketch, top-1"


class CentralCrop:
    """The central crop, without any resizing: ImageNet-C's images are 224 x 224 already (recipes A12). A smaller image is enlarged first."""

    def __init__(self, size: tuple[int, int]) -> None:
        from harness.augment import EvalTransform

        self.size, self.enlarge = size, EvalTransform(size, 1.0)

    def __call__(self, image: Image) -> dict[str, Any]:
        """{"image": uint8 (3, H, W)}."""
        from harness.augment import to_tensor

        (height, width), (h, w) = self.size, image.size[::-1]
        if h < height or w < width:
            return self.enlarge(image)
        top, left = round((h - height) / 2), round((w - width) / 2)
        return {"image": to_tensor(image.crop((left, top, left + width, top + height)))}


@dataclass(frozen=True)
class ImageNetC(Robustness):
    """ImageNet-C: mean corruption error over 15 corruptions at 5 severities, normalised by AlexNet's; lower is better."""

    columns: ClassVar[tuple[Metric, ...]] = (Metric("mCE", higher_is_better=False),)
    data: ClassVar[str] = "imagenet-c"
    summary: ClassVar[str] = "robustness: the fine-tuned model on ImageNet-C, mCE normalised by AlexNet (lower is better)"

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Score the 75 sets one after the other; each one's outcomes are kept, so that a stopped job goes on with the next."""
        import numpy as np

        from evals.robustness_metrics import ALEXNET_ERROR, corruption_errors, mean_corruption_error, mean_error
        from evals.scoring import gathered, predict, rank
        from harness.checkpoint import write_atomically
        from harness.data import read_images

        session = context.session
        model, transform = fine_tuned(checkpoint), CentralCrop(checkpoint.config.size)
        correct: dict[str, Any] = {}
        for name in (f"{corruption}/{severity}" for corruption in ALEXNET_ERROR for severity in range(1, 6)):
            path = session.dir / "checkpoint" / "scored" / f"{name.replace('/', '-')}.npy"
            found = gathered(np.load(path) if rank() == 0 and path.is_file() else None)[0]
            if found is None:
                images = read_images(self.data, name, session.folders[self.data])
                places = places_among(images, model, self.data)
                found = predict(model, images, transform, session, stage=name) == places[images.labels]
                if rank() == 0:
                    write_atomically(path, partial(np.save, arr=found))
            correct[name] = found
        packed = {name: np.packbits(found) for name, found in correct.items()}
        if rank() == 0:
            write_atomically(session.dir / "outcomes.npz", lambda stream: np.savez_compressed(stream, **packed))
        accuracy = {c: [float(correct[f"{c}/{severity}"].mean()) for severity in range(1, 6)] for c in ALEXNET_ERROR}
        facts = {
            "images_seen": 0, "flops": 0.0, "scored_images": sum(map(len, correct.values())), "model": self.after or OWN, "mean_error": mean_error(accuracy),
            "corruption_errors": corruption_errors(accuracy),
        }
        return Outcome({"mCE": mean_corruption_error(accuracy)}, session.dir / "outcomes.npz", facts)
