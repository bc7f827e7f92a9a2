"""Importing OpenMMLab without its noise: the ops stand-in installed first, its own warnings left out one by one."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

from evals.openmmlab import mmcv_ops

WARNINGS: tuple[tuple[str, type[Warning]], ...] = (  # start of the message, category; none that a user could act on
    ("``MultiScaleDeformableAttention`` has been moved", ImportWarning),  # mmcv, about mmcv
    ("__array__ implementation doesn't accept a copy keyword", DeprecationWarning),  # pycocotools, under numpy 2
    ("Default ``avg_non_ignore`` is False", UserWarning),  # mmseg, about its default, which BEiT's and MAE's configs have
    ("For binary segmentation, we suggest", UserWarning),  # mmseg, at two classes: every number of classes has the same head here
    ("``build_loss`` would be deprecated soon", UserWarning),  # mmseg's heads call their own old function
)


@contextlib.contextmanager
def openmmlab() -> Iterator[None]:
    """Inside: mmdet and mmseg can be imported and used."""
    mmcv_ops.install()
    hidden = "transformers" not in sys.modules
    if hidden:  # mmengine and mmdet import it if they can, for models that we do not have: three seconds of a job
        sys.modules["transformers"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            for message, category in WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield
    finally:
        if hidden:
            del sys.modules["transformers"]
