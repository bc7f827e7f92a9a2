"""Scoring labelled images: each one read once, on one process or several, its outcome kept. What the classification evaluators have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harness.batches import gathered, processes, rank
from harness.checkpoint import write_atomically
from harness.classifier import Classifier
from harness.data import BadImage, ImageList, read_images
from harness.plugins import Progress, Session
from harness.spec import Interrupted, JobFailed, Outcome, UserError


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
    samples: ImageList, transform: Callable[[Any], dict[str, Tensor]], session: Session, batch: int, stage: str, places: Sequence[int] | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, uint8 images (B, 3, H, W) on the device) over the images at `places` (all) in order, the last batch shorter; progress is reported.

    Images that cannot be read are left out and counted in session.skipped_images when `on_bad_image` says so.

    Raises:
        BadImage: one cannot be read.
        Interrupted: a signal came.
    """
    images = _Images(samples, transform, session.on_bad_image == "skip")
    places = range(len(samples)) if places is None else places
    groups = [list(places[i : i + batch]) for i in range(0, len(places), batch)]
    stream: Any = ([images[i] for i in group] for group in groups)
    if session.workers > 0:
        context = "spawn" if session.device.type == "cuda" else "fork"
        stream = DataLoader(images, batch_sampler=groups, num_workers=session.workers, collate_fn=_as_list, multiprocessing_context=context)
    started = shown = time.monotonic()
    done = 0
    for number, items in enumerate(stream, start=1):
        if session.should_stop():
            raise Interrupted(f"{stage}: stopped at image {done} of {len(places)}")
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
            session.report(Progress(stage, number, len(groups), speed, None, (len(places) - done) / speed))


# ----------------------------------------------------------------------------------------------------- several processes


def share(count: int, rank: int, world: int) -> range:
    """Places of the images that a process scores. No place is padded or repeated, so the shares may differ in length by one."""
    return range(rank, count, world)


def merge(count: int, parts: Sequence[tuple[Sequence[int], np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(places, rows) of all processes in the order of places, from the (places, rows) of each.

    Raises:
        ValueError: a place is there twice, or is none of `count`: an image would be counted twice.
    """
    places = np.concatenate([np.asarray(p, dtype=np.int64) for p, _ in parts])
    if len(np.unique(places)) != len(places) or (len(places) and (places.min() < 0 or places.max() >= count)):
        raise ValueError(f"{len(places)} outcomes of {count} images, some of them twice or of no image")
    order = np.argsort(places)
    return places[order], np.concatenate([rows for _, rows in parts if len(rows)] or [parts[0][1]])[order]


def score(
    model: Classifier, samples: ImageList, transform: Callable[[Any], dict[str, Tensor]], session: Session, batch: int = 64, stage: str = "predict",
    read: Callable[[Tensor], Tensor] = lambda scores: scores.argmax(1),
) -> tuple[np.ndarray, np.ndarray]:
    """(places (n,), rows (n, ...)) of all images that could be read: `read` makes rows from class scores (B, classes).

    In a process group every process scores its share and gets the outcomes of all; each image is read and counted once whatever their number.
    """
    model.to(session.device).eval()
    places: list[int] = []
    rows: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    with torch.inference_mode(), torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32):
        for indices, images in image_batches(samples, transform, session, batch, stage, share(len(samples), rank(), processes())):
            rows.append(read(model.logits(images)).cpu().numpy())
            places += indices
    parts = gathered((places, np.concatenate(rows[1:] or rows), session.skipped_images))
    for _, _, skipped in parts:
        session.skipped_images |= skipped
    return merge(len(samples), [(p, r) for p, r, _ in parts])


def predict(
    model: Classifier, samples: ImageList, transform: Callable[[Any], dict[str, Tensor]], session: Session, batch: int = 64, stage: str = "predict"
) -> np.ndarray:
    """Class with the highest score for each image, int64 (len(samples),); each image is read once. -1 where an image was skipped as unreadable."""
    predicted = np.full(len(samples), -1, dtype=np.int64)
    places, classes = score(model, samples, transform, session, batch, stage)
    predicted[places] = classes
    return predicted


# ------------------------------------------------------------------------------------------- what evaluators have in common


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
    if rank() == 0:
        write_atomically(path, lambda stream: np.savez_compressed(stream, correct=correct, label=label))
    return Outcome({"top-1": 100.0 * float(correct.mean())}, path, {**facts, "scored_images": len(images), "classes": len(images.classes)})
