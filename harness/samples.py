"""From files on a disk to batches: which image stands at which place of a run, how it is drawn, and who loads it.

The order is a function of (seed, epoch) and what is drawn for an image of its place in the run, however many workers load it (see `harness.randomness`).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from harness.data import BadImage, ImageList
from harness.randomness import generator
from harness.spec import JobFailed, Recipe

Batch = dict[str, Tensor]
Transform = Callable[[Any, np.random.Generator], Batch]
MAX_BAD_IN_A_ROW = 100
LONG, TIMED, DEARER = 200, 4, 1.3  # batches worth timing, batches timed, and what an image costs in another process (benchmarks/LOG.md)


class Samples(Dataset[Batch]):
    """Images in the order of training: item `position` is a place in the run, not a file, and brings its own randomness.

    Within each epoch the files are permuted by (seed, epoch); an epoch has steps x batch positions, the rest is dropped as the
    originals do (a set smaller than one batch is repeated to fill it). With `repeats` K each file takes K places in a row, every one with
    crops of its own, so that an epoch is as long and sees 1/K of the files (repeated augmentation: DeiT-repo samplers.py).
    """

    def __init__(self, images: ImageList, transform: Transform, seed: int, per_epoch: int, skip_bad: bool, repeats: int = 1) -> None:
        self.images, self.transform, self.seed, self.per_epoch, self.skip_bad, self.repeats = images, transform, seed, per_epoch, skip_bad, repeats
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def file_at(self, position: int) -> int:
        """Index of the file at a position."""
        epoch, place = divmod(position, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, generator(self.seed, "order", epoch).permutation(len(self.images)))
        return int(self._order[1][place // self.repeats % len(self.images)])

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Batch]:
        """Items of a batch. Generators come before the first image and labels behind the last: an image leaves none of such code in the processor's cache."""
        drawn = [generator(self.seed, "sample", *divmod(position, self.per_epoch)) for position in positions]
        loaded = [self._load(self.file_at(position), rng) for position, rng in zip(positions, drawn, strict=True)]
        for sample, index, bad in loaded:
            if self.images.labels is not None:
                sample["label"] = torch.tensor(int(self.images.labels[index]))
            sample["bad"] = torch.tensor(bad)
        return [sample for sample, _, _ in loaded]

    def _load(self, index: int, rng: np.random.Generator) -> tuple[Batch, int, tuple[int, int]]:
        """(what the transform makes of a file, or of the next one that can be read; index of that; the first that was wanted and how many cannot be read)."""
        wanted = index
        for _ in range(MAX_BAD_IN_A_ROW):
            try:
                image = self.images.load(index)
                break
            except BadImage:
                if not self.skip_bad:
                    raise
                index = (index + 1) % len(self.images)  # the next file stands in, so that the batch keeps its size
        else:
            raise JobFailed(f"{self.images.root}: {MAX_BAD_IN_A_ROW} unreadable images in a row: run `python -m harness data verify`")
        return self.transform(image, rng), index, (wanted, (index - wanted) % len(self.images))


def loader(samples: Samples, batches: Sequence[Any], workers: int, pin: bool, say: Callable[[str], None] | None = None) -> Iterator[Batch]:
    """Batches of positions -> stacked tensors, in order. With `say` a long training's workers are measured, and told, unless HARNESS_WORKERS is set."""
    if say is not None and len(batches) >= LONG and not os.environ.get("HARNESS_WORKERS") and (pin or torch.get_num_threads() > 1):
        return _timed(samples, batches, pin, say)
    if workers == 0:
        return (default_collate(samples.__getitems__(batch)) for batch in batches)
    how: Any = {"worker_init_fn": _one_thread, "multiprocessing_context": "fork"}  # no CUDA there, and a transform may be a closure
    return iter(DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=pin, **how))


def _timed(samples: Samples, batches: Sequence[Any], pin: bool, say: Callable[[str], None]) -> Iterator[Batch]:
    """The first batches loaded here, on one thread, between steps that are waited for; the rest by as many workers as these ask for."""
    cores, loads, steps = torch.get_num_threads(), list[float](), list[float]()
    for batch in batches[:TIMED]:
        start = time.perf_counter()
        torch.set_num_threads(1)
        made: Batch = default_collate(samples.__getitems__(batch))
        torch.set_num_threads(cores)
        loads.append((given := time.perf_counter()) - start)
        yield made
        if pin:
            torch.cuda.synchronize()
        steps.append(time.perf_counter() - given)
    workers = workers_for(min(loads), min(steps), cores, pin)
    say(f"loader: {workers} processes, of {cores} cores: a batch of {len(batches[0])} takes {min(loads):.3g} s to load, {min(steps):.3g} s to train on")
    yield from loader(samples, batches[TIMED:], workers, pin)


def workers_for(load: float, step: float, cores: int, gpu: bool) -> int:
    """Loader processes for batches of so many seconds on one core and in training: a GPU is to wait for none; a CPU is to gain a tenth by giving up cores."""
    if gpu:
        return min(cores, 1 + int(DEARER * load / step))
    taken = [load + step, *(max(DEARER * load / w, step * cores / (cores - w)) for w in range(1, cores))]
    return taken.index(min(taken)) if min(taken) < 0.9 * taken[0] else 0


def _one_thread(worker: int) -> None:
    gc.freeze()  # a collection would write to every object that was here before the fork, and copy its page: 90 MB a worker
    torch.set_num_threads(1)


def steps_of(recipe: Recipe, images: int) -> tuple[int, int]:
    """(steps per epoch, total steps) of a recipe on a number of images."""
    per_epoch = max(1, images // recipe.batch)
    total = recipe.iterations if recipe.iterations is not None else round((recipe.epochs or 0) * per_epoch)
    return per_epoch, max(1, total)
