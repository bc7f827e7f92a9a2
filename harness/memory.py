"""Memory that gives out in a training step: how it is recognised, and how many images at a time would have fitted."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable

from harness.plugins import Session
from harness.spec import JobFailed

OUT_OF_MEMORY = re.compile("OutOfMemory|can't allocate memory|out of memory")


def out_of_memory(error: BaseException) -> str:
    """The error in a line when it says that memory gave out (torch has a class for GPUs and a plain RuntimeError for a CPU), else ""."""
    if isinstance(error, JobFailed):  # says itself what happened
        return ""
    return short if OUT_OF_MEMORY.search(short := f"{type(error).__name__} {error}") else ""


def most_that_fit(attempt: Callable[[int], None], images: int) -> int:
    """The largest of a half, a quarter, ... of `images` with which `attempt` comes to its end; 0 when it does not even with one."""
    while images > 1:
        images //= 2
        try:
            attempt(images)
            return images
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not (isinstance(error, MemoryError) or out_of_memory(error)):
                raise
    return 0


def no_room(told: str, images: int, session: Session, larger: str | None, attempt: Callable[[int], None] | None) -> JobFailed:
    """How a training ends whose step does not fit: a line with what helps.

    Args:
        told: where memory gave out, with so many `images` at a time.
        larger: why fewer images are no way out ("" where there are no fewer); None: they are one.
        attempt: what a step does with so many images; None where processes would have to meet for it.
    """
    if larger is not None:
        return JobFailed(f"{told}: it needs a larger device{larger}")
    if attempt is None:
        return JobFailed(f"{told}: set HARNESS_MICRO_BATCH={-(-images // 2)}, which changes no key")
    session.log(f"trying how many images fit, from {images // 2} on")
    gc.collect()  # a process's first DDP lies in a cycle of references: while it is there, it takes an attempt's gradients for those of the step that failed
    if not (fits := most_that_fit(attempt, images)):
        return JobFailed(f"{told}, nor with one: it needs a larger device")
    return JobFailed(f"{told}; {fits} fit: set HARNESS_MICRO_BATCH={fits} or --on-oom halve, which changes no key")
