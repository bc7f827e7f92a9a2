"""Randomness as a function of what is trained, not of when or where: (seed, epoch, position) -> generator.

No generator state is ever saved. A resumed job draws the same crops, masks, mixup partners and dropped paths as one that was
never interrupted, because each draw is keyed by its place in the run.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a path of integers and strings, equal on every machine and Python version."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator for one place in a run, e.g. generator(seed, "sample", epoch, position)."""
    return np.random.Generator(np.random.PCG64(derive(*parts)))


def seed_all(*parts: int | str) -> None:
    """Seed torch's, numpy's and Python's global generators for one step (drop path, mixup, third-party code)."""
    import torch

    seed = derive(*parts)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed queues a stack trace for CUDA at each call until CUDA is used: 4 ms
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it without types
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
