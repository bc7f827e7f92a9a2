"""mmengine's Runner inside a job of the harness: its log in the job's log, no files of its own, nothing on the console."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import cv2
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from evals.openmmlab.loops import TrainByPlace
from evals.openmmlab.optimizer import Optimize
from evals.openmmlab.score_loop import TestInOrder
from evals.openmmlab.work import Work
from harness.plugins import Session
from harness.randomness import derive

_numbers = itertools.count()
_instead: ContextVar[Callable[[Work, str], dict[str, float]] | None] = ContextVar("instead", default=None)


class Lines(io.TextIOBase):
    """A text stream that gives whole lines to a function."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log, self.rest = log, ""

    def write(self, text: str) -> int:
        """Pass complete lines on."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.strip():
                with contextlib.redirect_stdout(sys.__stdout__):  # a log that prints must not come back here
                    self.log(line)
        return len(text)


class QuietRunner(Runner):  # type: ignore[misc]
    """A Runner that writes to the job's log only, makes no folders there, and trains and tests with the loops above."""

    def __init__(self, work: Work, scope: str, folder: str) -> None:
        self.work = work
        super().__init__(
            model=work.model, work_dir=folder, train_dataloader=work.train, train_cfg={"type": TrainByPlace}, optim_wrapper=Optimize(work),
            test_dataloader=work.test, test_cfg={"type": TestInOrder}, test_evaluator=Evaluator(work.metric), default_scope=scope,
            default_hooks=dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")),
            randomness={"seed": derive(work.session.seed, "runner") % 2**31}, experiment_name=f"{scope}-{next(_numbers)}",
        )

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Nothing set for the whole process, other processes left to the loops (mmengine would choose a start method, and file limits)."""
        self._rank, self._world_size, self._timestamp = 0, 1, ""

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """mmengine's logger with one handler: the job's log."""
        logger = MMLogger.get_instance(self.experiment_name, logger_name="mmengine")
        handler = logging.StreamHandler(Lines(self.work.session.log))
        handler.setLevel(logging.WARNING)
        logger.handlers = [handler]
        return logger

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """One that stores nothing."""
        return Visualizer.get_instance(self.experiment_name)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """The model on the session's device (mmengine would take a GPU whenever there is one)."""
        return model.to(self.work.session.device)

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Nothing: the record has the versions."""

    def dump_config(self) -> None:
        """Nothing: job.json is the configuration."""


@contextlib.contextmanager
def quiet(session: Session, scope: str) -> Iterator[None]:
    """OpenMMLab's surroundings for one job: registry scope, standard output in the job's log, no OpenCV threads."""
    cv2.setNumThreads(0)
    with contextlib.redirect_stdout(Lines(session.log)), DefaultScope.overwrite_default_scope(scope):
        yield


def train_and_test(work: Work, scope: str) -> dict[str, float]:
    """Train from the last state on, score, and give the metric's scores. `work.facts` then has what a record wants to know.

    Inside `instead_of_training` something else is done with the work.

    Raises:
        Interrupted: a signal came; running it again goes on.
        JobFailed: an image cannot be read, or the loss is not finite.
    """
    if (other := _instead.get()) is not None:
        return other(work, scope)
    with tempfile.TemporaryDirectory() as folder:
        runner = QuietRunner(work, scope, folder)
        runner.train()
        return runner.test()


@contextlib.contextmanager
def instead_of_training(do: Callable[[Work, str], dict[str, float]]) -> Iterator[None]:
    """Inside: an evaluator's `run` prepares its data, model and metric as ever, and then `do` gets them (known answers, benchmarks)."""
    token = _instead.set(do)
    try:
        yield
    finally:
        _instead.reset(token)


def only_test(work: Work, scope: str) -> dict[str, float]:
    """The metric's scores of the model as it is."""
    with tempfile.TemporaryDirectory() as folder:
        return QuietRunner(work, scope, folder).test()
