"""What a training says of itself: step by step in metrics.jsonl and by the loggers that HARNESS_LOGGERS names, and the FLOPs of a step."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from harness.plugins import load
from harness.spec import UserError


def loggers() -> list[Any]:
    """Classes of the loggers that HARNESS_LOGGERS names, by commas; where it is not set TensorBoard, if that is installed.

    A logger is a class with `needs`, the package that it writes with, made with (folder of the job, stage, step that the job goes on from); it has
    add(step, values).

    Raises:
        UserError: there is no such logger, or what it needs is not installed.
    """
    text = os.environ.get("HARNESS_LOGGERS")
    if text is None:
        return [cls for cls in (load("loggers", "tensorboard"),) if find_spec(cls.needs)]
    found = [load("loggers", name, "HARNESS_LOGGERS") for name in filter(None, map(str.strip, text.split(",")))]
    for cls in found:
        if find_spec(cls.needs) is None:
            raise UserError(f"HARNESS_LOGGERS={text}: {cls.needs} is not installed: pip install {cls.needs}, or leave it out")
    return found


class Metrics:
    """metrics.jsonl: one line per log interval; lines after the step that a job resumes from are cut off. Loggers get the same."""

    def __init__(self, path: Path, stage: str, step: int) -> None:
        self.path, self.stage = path, stage
        lines = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError):  # the last line of a killed job may be half written
                entry = json.loads(line)
                if entry["stage"] != stage or entry["step"] <= step:
                    lines.append(line)
        path.write_text("".join(line + "\n" for line in lines))
        self.loggers: list[Any] = []
        for cls in loggers():
            try:
                self.loggers.append(cls(path.parent, stage, step))
            except Exception as error:
                self.left(cls, error)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        with open(self.path, "a") as stream:
            stream.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        for logger in list(self.loggers):
            try:
                logger.add(step, values)
            except Exception as error:
                self.loggers.remove(logger)
                self.left(type(logger), error)

    def left(self, cls: Any, error: Exception) -> None:
        """Say in the job's log that a logger is left out: no training ends because of one."""
        print(f"{self.stage}: {cls.__name__} is left out from here on ({type(error).__name__}: {error}); metrics.jsonl has everything", file=sys.stderr)


@contextmanager
def count_flops(facts: dict[str, Any], share: float = 1.0, now: bool = True) -> Iterator[None]:
    """Count the FLOPs of the first part (a `share` of a step) into facts (multiply and add = 2; matmuls, convolutions and attention), nothing later.

    `now`: false in a step that is not as the others, e.g. the first one of a dVAE, which starts from images."""
    if facts["flops_per_step"] is not None or not now:
        yield
        return
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    # torch leaves out the fused attention of a CPU. It counts as much as where it is done step by step: backward is two times forward.
    fused, attention = torch.ops.aten, cast(Any, sdpa_flop_count)
    seen = {fused._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: attention(q, k, v),
            fused._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *__, **___: 2 * attention(q, k, v)}
    eager: Any = torch.compiler.set_stance("force_eager") if os.environ.get("HARNESS_COMPILE") else nullcontext()  # compiled kernels are not seen
    with eager, FlopCounterMode(display=False, custom_mapping=seen) as counter:
        yield
    facts["flops_per_step"] = float(counter.get_total_flops()) / share
