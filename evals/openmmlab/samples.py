"""Images and labels in the order of training, each place in the run with randomness of its own; the reader that all evaluators share.

A place in the run (iteration x batch + row) decides the file and the random numbers of its augmentation. Resuming is starting at
a place: no generator or loader state is saved, nothing is replayed (mmengine#1520).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.registry import TRANSFORMS
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from harness.data import BadImage, load_rgb
from harness.plugins import Session
from harness.randomness import generator, seed_all
from harness.spec import JobFailed

MAX_BAD_IN_A_ROW = 100


class Reader(BaseTransform):  # type: ignore[misc]
    """A step of a pipeline that reads files and raises BadImage for one that cannot be used."""


class ReadImage(Reader):
    """`img_path` -> `img` (H, W, 3) uint8, blue first as OpenMMLab has it, by the reader of all other evaluators (EXIF, CMYK, bad files).

    The labels' size decides whether an EXIF orientation is followed (see load_rgb): the size of the label picture, or the one that the annotations give.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds img, img_shape and ori_shape, each (H, W).

        Raises:
            BadImage: the file cannot be read, or has another size than its labels.
        """
        path, wanted = Path(results["img_path"]), size_of_labels(results)
        read = load_rgb(path, wanted)
        if wanted is not None and read.size != wanted:
            raise BadImage(f"{results.get('seg_map_path') or path}: {wanted[0]}x{wanted[1]} pixels by its labels, its image has {read.width}x{read.height}: "
                           f"mend or remove {path.name} and its labels, or add --retry --on-bad-image skip")
        image = np.ascontiguousarray(np.asarray(read)[:, :, ::-1])
        results["img"], results["img_shape"], results["ori_shape"] = image, image.shape[:2], image.shape[:2]
        return results


TRANSFORMS.register_module("HarnessReadImage", module=ReadImage, force=True)


def size_of_labels(results: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) that the labels of a data info are for; None where nothing says it, or where the label picture is broken (its reader says so)."""
    if "seg_map_path" not in results:
        return (results["width"], results["height"]) if "width" in results else None
    try:
        with Image.open(results["seg_map_path"]) as picture:
            return picture.size
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None


def held_out(count: int, fraction: float) -> tuple[list[int], list[int]]:
    """(rest, held out) of `count` images: drawn once, the same for every method and seed; none held out for a fraction of 0."""
    if fraction <= 0:
        return list(range(count)), []
    order = generator("held out", count).permutation(count)
    size = min(count - 1, max(1, round(fraction * count)))
    return sorted(order[size:].tolist()), sorted(order[:size].tolist())


class InOrder(Dataset[dict[str, Any]]):
    """Item `position` of a run over some images of a data set.

    Args:
        source: mmseg's or mmdet's data set: data infos and a pipeline.
        indices: the images to use.
        seed: of the run; None: no shuffling (evaluation), item i is image i.
        skip_bad: an unreadable image is replaced by the next one and named under "bad" instead of failing the job.
    """

    def __init__(self, source: BaseDataset, indices: Sequence[int], seed: int | None, skip_bad: bool) -> None:
        if len(indices) == 0:
            raise JobFailed(f"{source.data_prefix}: no images with labels: nothing to train on or to score")
        self.source, self.indices, self.seed, self.skip_bad = source, np.asarray(indices), seed, skip_bad
        self.metainfo = source.metainfo
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def _place(self, position: int) -> int:
        if self.seed is None:
            return position
        epoch, place = divmod(position, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, generator(self.seed, "order", epoch).permutation(len(self)))
        return int(self._order[1][place])

    def __getitem__(self, position: int) -> dict[str, Any]:
        """What the pipeline makes of one image, and "bad": the paths of unreadable files that it stands in for, a line each."""
        if self.seed is not None:
            seed_all(self.seed, "sample", position)
        place, bad = self._place(position), list[str]()
        for _ in range(MAX_BAD_IN_A_ROW):
            info = self.source.get_data_info(int(self.indices[place]))
            try:
                sample: dict[str, Any] = self.source.pipeline(info)
                return {**sample, "bad": "\n".join(bad)}
            except BadImage:
                if not self.skip_bad or self.seed is None:
                    raise
                bad.append(str(info["img_path"]))
                place = (place + 1) % len(self)
            except Exception as error:  # of OpenMMLab's transforms, which name no file
                reason = (str(error).strip().splitlines() or [""])[0]
                raise JobFailed(f"{info['img_path']}: cannot be prepared with its labels ({type(error).__name__}: {reason}): mend or remove both") from error
        raise JobFailed(f"{bad[-1]}: {MAX_BAD_IN_A_ROW} unreadable images in a row: run `python -m harness data verify`")


def readable(source: BaseDataset, indices: Sequence[int], session: Session) -> list[int]:
    """The images to score, each read with its labels before training begins: a broken one would be met hours later.

    With `--on-bad-image skip`, those that can be read; the others are counted in the session.

    Raises:
        BadImage: one cannot be read, and `--on-bad-image` is fail.
    """
    readers = [step for step in source.pipeline.transforms if isinstance(step, Reader)]

    def broken(index: int) -> str:
        info = source.get_data_info(index)
        try:
            for read in readers:
                info = read(info)
        except BadImage:
            if session.on_bad_image == "fail":
                raise
            return str(info["img_path"])
        return ""

    places = [int(i) for i in indices]
    with ThreadPoolExecutor(max(1, session.workers)) as threads:
        paths = list(threads.map(broken, places))
    session.skipped_images.update({path: "cannot be read" for path in paths if path})
    return [place for place, path in zip(places, paths, strict=True) if not path]


def batches(samples: InOrder, session: Session, places: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Batches of the samples at these positions of a run, each a dict of lists."""
    if session.workers == 0:
        return (pseudo_collate([samples[p] for p in place]) for place in places)
    return _plain_errors(DataLoader(
        samples, batch_sampler=places, num_workers=session.workers, collate_fn=pseudo_collate, worker_init_fn=_one_thread,
        pin_memory=session.device.type == "cuda",
        multiprocessing_context="fork",  # workers never touch CUDA; a spawned one would have its own copy of all annotations, and no mmcv ops
    ))


def _plain_errors(loader: DataLoader[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches of a loader; a failure in one of its processes in one line, without the traceback that torch wraps around it."""
    try:
        yield from loader
    except JobFailed as error:
        raise JobFailed(str(error).strip().splitlines()[-1].partition(": ")[2]) from error


def _one_thread(worker: int) -> None:
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
