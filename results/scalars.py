"""Loggers of trainings besides metrics.jsonl: TensorBoard, CSV and Weights & Biases (`harness.metrics.loggers`)."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar


class TensorBoard:
    """Event files below the job's folder, so that `tensorboard --logdir runs` shows every job. What a job resumes behind is purged."""

    needs: ClassVar[str] = "tensorboard"

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=step + 1 if step else None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write a step's values."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class CSV:
    """metrics.csv with the columns stage, step, name, value: one row for each value."""

    needs: ClassVar[str] = "csv"

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        self.path, self.stage = folder / "metrics.csv", stage
        rows = []
        if self.path.exists():
            with open(self.path, newline="") as stream:
                rows = [row for row in list(csv.reader(stream))[1:] if len(row) == 4 and (row[0] != stage or int(row[1]) <= step)]
        with open(self.path, "w", newline="") as stream:
            csv.writer(stream).writerows([("stage", "step", "name", "value"), *rows])

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append a step's values."""
        with open(self.path, "a", newline="") as stream:
            csv.writer(stream).writerows((self.stage, step, name, value) for name, value in values.items())


class WandB:
    """Weights & Biases: the job is one run under the name of its folder, whatever stages and starts it has. Without a network nothing waits: offline
    unless WANDB_MODE says otherwise; `wandb sync` sends it later."""

    needs: ClassVar[str] = "wandb"

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        import wandb

        self.stage = stage
        self.run = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vision-harness"), id=folder.name, name=folder.name, resume="allow", dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"), settings=wandb.Settings(console="off", silent=True),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step's values, each named after its stage, as is the step itself."""
        self.run.log({f"{self.stage}/{name}": value for name, value in {**values, "step": step}.items()})
