"""Files of compact per-image outcomes, kept beside a record."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from harness.checkpoint import write_atomically


def save_outcomes(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as one compressed .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, lambda stream: stream.write(buffer.getvalue()))
