"""What a process does with memory that a step has freed. Page faults are counted in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps freed memory by rules of its own")
CODE = """
import resource, numpy as np
from harness.provenance import keep_freed_memory
keep_freed_memory({})
def step():
    kept = [np.ones(2**21, dtype=np.uint8) for _ in range(64)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step()
print(-step() + step())
"""


def faults(trim: str, **environment: str) -> int:
    """Page faults of a step that frees 128 MB, 32,768 pages, behind others like it."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", CODE.format(trim)], capture_output=True, check=True, env={**plain, **environment})
    return int(done.stdout)


def test_a_step_does_not_get_the_memory_of_the_one_before_anew() -> None:
    assert faults("") < 1000 < 10_000 < faults("2**26")


def test_what_the_user_has_set_for_glibc_stays() -> None:
    assert faults("", MALLOC_TRIM_THRESHOLD_=str(2**20)) > 10_000
