"""Going on after a loss that is not finite: from the last good state and past the images that led to it, so many times and no more.

Training is a function of the place in the run, so that the same images after the same state would end the same way. The steps between the state and
the loss are therefore left out: the step after the state draws what the first one behind them would have drawn (images, crops, masks, dropped paths), and so on
from there, past the end of the recipe; schedules stay with the step. PaLM (arXiv 2204.02311, section 5.1) left out the batches around a spike, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from harness.batches import gathered, rank
from harness.checkpoint import States
from harness.optim import lr_at
from harness.plugins import Session
from harness.spec import JobFailed, Recipe
from harness.store import read_json, write_json


class NotFinite(JobFailed):
    """The loss, or the norm of its gradient, was not finite after `step` steps."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def check_finite(stage: str, step: int, total: int, recipe: Recipe, loss: Tensor, norm: Tensor, states: States) -> None:
    """Raises NotFinite when the loss of a step, or the norm of its gradient, is not: the weights after it are no state to go on from."""
    if not (math.isfinite(last := float(loss.detach())) and math.isfinite(float(norm))):
        states.wait()
        numbers = f"gradient norm {float(norm):.3g}, lr {lr_at(recipe, step - 1, total):.3g}, at its peak {recipe.peak_lr:.3g}"
        remedy = "lower lr with --set, use fp32, or let it go back so many times with HARNESS_NAN_RESTARTS"
        raise NotFinite(f"{stage}: loss {last:.4g} at step {step} of {total} ({numbers}): {remedy}; {states.newest()}", step)


def past(folder: Path) -> list[list[int]]:
    """[step of the loss that was not finite, step gone back to] of each restart of the training whose states are in a folder."""
    return list(read_json(folder / "restarts.json") or [])


def bounded(train: Callable[[], None], folder: Path, session: Session, stage: str) -> None:
    """Train, and go back and do it again after a loss that is not finite, at most session.nan_restarts times. Raises NotFinite, JobFailed."""
    while True:
        try:
            return train()
        except NotFinite as failure:
            if len(past(folder)) >= session.nan_restarts:
                raise
            session.log(str(failure))
            restarts = go_back(folder, failure.step)
            if States(folder).latest() is None:
                raise JobFailed(f"{failure}: and no state in {folder} can be read: start the job again (--retry), from its beginning") from failure
            session.log(f"{stage}: restart {len(restarts)} of at most {session.nan_restarts}, without the batches in between")


def skipped(folder: Path, step: int) -> int:
    """Steps that restarts leave out of a training which goes on from `step`. A state gone back to that could not be read was not gone back to.

    Raises:
        JobFailed: the processes go on from different steps.
    """
    if len(set(steps := gathered(step))) > 1:
        raise JobFailed(f"{folder}: the processes find states of steps {steps}: is the runs folder one that all of them see?")
    restarts = past(folder)
    if any(back > step for _, back in restarts):
        restarts = [[at, min(back, step)] for at, back in restarts]
        gathered(None)  # every process has read it
        if rank() == 0:
            write_json(folder / "restarts.json", restarts)
    return sum(at - back for at, back in restarts)


def remarks(restarts: Sequence[Sequence[int]], total: int) -> list[str]:
    """What a table says of them."""
    return [f"loss not finite at step {at} of {total}: went on from step {back}, without the batches in between ({at - back})" for at, back in restarts]


def go_back(folder: Path, at: int) -> list[list[int]]:
    """Note, for all processes, that training goes on from the newest state; restarts so far, this one the last."""
    gathered(None)  # what was being written is there
    restarts: list[list[int]] = gathered([*past(folder), [at, (States(folder).steps() or [0])[-1]]])[0]
    if rank() == 0:
        write_json(folder / "restarts.json", restarts)
    gathered(None)
    return restarts
