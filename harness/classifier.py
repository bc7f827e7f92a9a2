"""Classification with the shared ViT: read-out, loss with mixup, and exact prediction. Fine-tuning, probing and the supervised method use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness.augment import Normalize
from harness.checkpoint import write_atomically
from harness.data import BadImage, ImageList, read_images
from harness.plugins import Progress, Session
from harness.spec import Augment, Interrupted, JobFailed, Outcome, UserError
from harness.vit import ViT

FINE_TUNE_STD = 2e-5  # MAE: trunc_normal std 2e-5 (recipes A2); BEiT: std 0.02 x init_scale 0.001 (A7), the same
PROBE_STD = 0.01  # MAE's linear probe (A3)


class Classifier(nn.Module):
    """A ViT with a linear read-out. Images are uint8 or float (B, 3, H, W) with values 0..255 and are normalised inside.

    Args:
        vit: the lent ViT, kept as `vit`, so that layer decay sees its parameters.
        classes: class names, or their number where nobody will compare names.
        mean, std: what images are normalised with: those of the pre-training.
        pooling: "cls" reads the class token after the final norm; "mean" the mean of the patch tokens before it, through a fresh
            LayerNorm `fc_norm`: the final norm is then not used and not trained, as in MAE's and BEiT's fine-tuning (recipes A2, A7).
        augment: mixup, cutmix and smoothing of the training loss.
        head_std: of the truncated normal that the head's weights start from.
        probe: the ViT stays frozen and in eval mode, and a BatchNorm without affine parameters goes before the head (recipes A3).
    """

    def __init__(
        self, vit: ViT, classes: Sequence[str] | int, *, mean: Sequence[float], std: Sequence[float], pooling: Literal["cls", "mean"] = "mean",
        augment: Augment | None = None, head_std: float = 0.02, probe: bool = False,
    ) -> None:
        super().__init__()
        self.classes = tuple(f"{i}" for i in range(classes)) if isinstance(classes, int) else tuple(classes)
        if len(self.classes) < 2:
            raise JobFailed(f"a classifier needs two classes or more, the data has {len(self.classes)}")
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be cls or mean, not {pooling!r}")
        self.vit, self.pooling, self.probe, self.augment = vit, pooling, probe, augment or Augment()
        self.normalize = Normalize((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
        width = vit.config.width
        self.fc_norm = nn.LayerNorm(width, eps=1e-6) if pooling == "mean" else nn.Identity()
        self.batch_norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if probe else nn.Identity()
        self.head = nn.Linear(width, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)
        if pooling == "mean":
            vit.norm.requires_grad_(False)
        if probe:
            vit.requires_grad_(False)
        self._mixup: Any = None
        if self.augment.mixup > 0 or self.augment.cutmix > 0:
            from timm.data.mixup import Mixup

            make: Any = Mixup  # timm has no types
            self._mixup = make(
                mixup_alpha=self.augment.mixup, cutmix_alpha=self.augment.cutmix, prob=self.augment.mixup_prob,
                switch_prob=self.augment.mixup_switch_prob, label_smoothing=self.augment.smoothing, num_classes=len(self.classes),
            )

    def train(self, mode: bool = True) -> Classifier:
        """A probed ViT stays in eval mode."""
        super().train(mode)
        if self.probe:
            self.vit.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """What the read-out reads, float (B, D), of images with values 0..255."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.probe):
            return self._pooled(self.normalize(images))

    def _pooled(self, images: Tensor) -> Tensor:
        """Pooled tokens (B, D) of normalised images."""
        grid = (images.shape[-2] // self.vit.config.patch, images.shape[-1] // self.vit.config.patch)
        x = self.vit.run_blocks(self.vit.place(self.vit.patches(images), grid=grid), grid=grid)[-1]  # (B, 1 + N, D)
        pooled: Tensor = self.vit.norm(x[:, 0]) if self.pooling == "cls" else self.fc_norm(x[:, 1:].mean(dim=1))
        return pooled.float()

    def read(self, features: Tensor) -> Tensor:
        """Class scores (B, classes), float, of features (B, D)."""
        scores: Tensor = self.head(self.batch_norm(features))
        return scores.float()

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, classes) of images with values 0..255."""
        return self.read(self.features(images))

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """Loss and batch accuracy (0..1, against the unmixed labels) of {"image": (B, 3, H, W), "label": int64 (B,)}.

        Mixup draws from numpy's global generator, which `harness.train.fit` seeds for each step.
        """
        label = batch["label"]
        if self._mixup is None or not self.training:
            scores = self.logits(batch["image"])
            loss = F.cross_entropy(scores, label, label_smoothing=self.augment.smoothing if self.training else 0.0)
        else:
            images, target = self._mix(self.normalize(batch["image"]), label)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.probe):
                pooled = self._pooled(images)
            scores = self.read(pooled)
            loss = F.cross_entropy(scores, target)
        return {"loss": loss, "top1": (scores.argmax(1) == label).float().mean()}

    def _mix(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and soft targets (B, classes); timm's Mixup pairs first with last and wants an even batch, an odd one's last is left plain."""
        even = len(images) // 2 * 2
        if even == len(images):
            mixed: tuple[Tensor, Tensor] = self._mixup(images, label)
            return mixed
        smoothing, count = self.augment.smoothing, len(self.classes)
        plain = F.one_hot(label[even:], count).float() * (1 - smoothing) + smoothing / count
        if even == 0:
            return images, plain
        first, target = self._mixup(images[:even].clone(), label[:even])
        return torch.cat([first, images[even:]]), torch.cat([target, plain])

    def classifier(self) -> dict[str, Any]:
        """The read-out as tensors and plain values, kept beside the ViT's weights; `restore` is the inverse."""
        state = {k: v.detach().cpu().clone() for k, v in self.state_dict().items() if not k.startswith("vit.")}
        return {"classes": list(self.classes), "pooling": self.pooling, "probe": self.probe, "state": state}

    @classmethod
    def restore(cls, vit: ViT, saved: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> Classifier:
        """The trained model from its ViT and what `classifier` gave.

        Raises:
            JobFailed: the saved read-out does not fit the ViT, or is none of this class.
        """
        try:
            model = cls(vit, saved["classes"], mean=mean, std=std, pooling=saved["pooling"], probe=saved["probe"])
            missing, unexpected = model.load_state_dict(dict(saved["state"]), strict=False)
        except (KeyError, RuntimeError, ValueError) as error:
            raise JobFailed(f"the checkpoint's classifier cannot be used ({' '.join(str(error).split())[:120]})") from error
        if unexpected or any(not k.startswith("vit.") for k in missing):
            raise JobFailed("the checkpoint's classifier has other parameters than a read-out of this version")
        return model


class _Images(Dataset[tuple[int, Tensor | None]]):
    """(index, uint8 image or None if it cannot be read and may be skipped)."""

    def __init__(self, samples: ImageList, transform: Callable[[Any], dict[str, Tensor]], skip_bad: bool) -> None:
        self.samples, self.transform, self.skip_bad = samples, transform, skip_bad

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        try:
            return index, self.transform(self.samples.load(index))["image"]
        except BadImage:
            if not self.skip_bad:
                raise
            return index, None


def _as_list(items: list[tuple[int, Tensor | None]]) -> list[tuple[int, Tensor | None]]:
    return items


def image_batches(
    samples: ImageList, transform: Callable[[Any], dict[str, Tensor]], session: Session, batch: int, stage: str
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, uint8 images (B, 3, H, W) on the device) over all images in order, the last batch shorter; progress is reported.

    Images that cannot be read are left out and counted in session.skipped_images when `on_bad_image` says so.

    Raises:
        BadImage: one cannot be read.
        Interrupted: a signal came.
    """
    images = _Images(samples, transform, session.on_bad_image == "skip")
    groups = [list(range(i, min(i + batch, len(samples)))) for i in range(0, len(samples), batch)]
    stream: Any = ([images[i] for i in group] for group in groups)
    if session.workers > 0:
        context = "spawn" if session.device.type == "cuda" else "fork"
        stream = DataLoader(images, batch_sampler=groups, num_workers=session.workers, collate_fn=_as_list, multiprocessing_context=context)
    started = shown = time.monotonic()
    done = 0
    for number, items in enumerate(stream, start=1):
        if session.should_stop():
            raise Interrupted(f"{stage}: stopped at image {done} of {len(samples)}")
        for index, image in items:
            if image is None:
                session.skipped_images[str(samples.files[index])] = "cannot be read"
        good = [(index, image) for index, image in items if image is not None]
        if good:
            yield [index for index, _ in good], torch.stack([image for _, image in good]).to(session.device)
        done += len(items)
        now = time.monotonic()
        if now - shown > 1.0 or number == len(groups):
            shown, speed = now, done / max(now - started, 1e-9)
            session.report(Progress(stage, number, len(groups), speed, None, (len(samples) - done) / speed))


def predict(
    model: Classifier, samples: ImageList, transform: Callable[[Any], dict[str, Tensor]], session: Session, batch: int = 64, stage: str = "predict"
) -> np.ndarray:
    """Class with the highest score for each image, int64 (len(samples),); each image is read once. -1 where an image was skipped as unreadable."""
    model.to(session.device).eval()
    predicted = np.full(len(samples), -1, dtype=np.int64)
    with torch.inference_mode(), torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32):
        for indices, images in image_batches(samples, transform, session, batch, stage):
            predicted[indices] = model.logits(images).argmax(1).cpu().numpy()
    return predicted


# -------------------------------------------------------------------------------------------- what evaluators have in common


def labelled_images(name: str, session: Session, holdout: float = 0.0) -> tuple[ImageList, ImageList]:
    """(training, scoring) images of a labelled set, found in session.folders under `name` or under "name:FOLDER".

    With `holdout`, val is left alone: that fraction of train is scored and the rest trained on, for tuning.

    Raises:
        UserError: the folder is missing, empty, of another layout, or has no labels.
        JobFailed: labels or classes of the two splits do not fit together.
    """
    place = next((folder for key, folder in session.folders.items() if key.partition(":")[0] == name), None)
    if place is None:
        raise UserError(f"--data: no folder for {name}: give a root that holds it, or a TOML that names it")
    train, val = (read_images(name, split, place) for split in ("train", "val"))
    for split, images in (("train", train), ("val", val)):
        if len(images) == 0:
            raise UserError(f"{place}: no images in {split}: needed for {name}")
        if images.labels is None or not images.classes:
            raise UserError(f"{place}: {split} has no {'labels' if images.labels is None else 'classes'}: {name} needs labelled images")
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= len(images.classes):
            wrong = low if low < 0 else high
            raise JobFailed(f"{place}: {split} has label {wrong}, but there are {len(images.classes)} classes: mend the label files")
    if train.classes != val.classes:
        extra = sorted(set(val.classes) - set(train.classes)) or ["another order"]
        raise JobFailed(f"{place}: the classes of val are not those of train ({extra[0]}): mend the label files")
    return train.split(holdout) if holdout > 0 else (train, val)


def top1(predicted: np.ndarray, images: ImageList, session: Session, facts: Mapping[str, Any]) -> Outcome:
    """Top-1 accuracy 0..100 over all images (a skipped one counts as wrong), and outcomes.npz: "correct" bool and "label" int64, (n,)."""
    label = images.labels
    assert label is not None
    correct = predicted == label
    path = session.dir / "outcomes.npz"
    write_atomically(path, lambda stream: np.savez_compressed(stream, correct=correct, label=label))
    return Outcome({"top-1": 100.0 * float(correct.mean())}, path, {**facts, "scored_images": len(images), "classes": len(images.classes)})
