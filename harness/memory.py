"""Memory that gives out in a training step: how it is recognised, and how many images at a time would have fitted."""

from __future__ import annotations

import re
from collections.abc import Callable

OUT_OF_MEMORY = re.compile("OutOfMemory|can't allocate memory|out of memory")


def out_of_memory(error: BaseException) -> str:
    """The error in a line when it says that memory gave out (torch has a class for GPUs and a plain RuntimeError for a CPU), else ""."""
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
