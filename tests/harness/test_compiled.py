"""HARNESS_COMPILE: training with compiled blocks counts and computes what training without does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import RECIPE, SMALL

from harness.data import ImageList
from harness.plugins import Session, TrainContext
from harness.randomness import seed_all
from harness.train import fit
from harness.vit import ViT
from methods.mae import MAE


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracer looks at it, and hides the warning itself
def test_the_same_weights_and_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernels may differ, and with this backend not even they do; FLOPs are counted in a step that is not compiled."""
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    images = ImageList(tmp_path, [f"{i}.png" for i in range(10)], None, ())
    found = []
    for backend in ("", "eager"):
        monkeypatch.setenv("HARNESS_COMPILE", backend)
        torch._dynamo.reset()
        seed_all(3, "init")
        objective: Any = MAE().objective(ViT(SMALL), TrainContext(SMALL, RECIPE, 3))
        (tmp_path / f"run{backend}").mkdir()
        session = Session(tmp_path / f"run{backend}", 3, torch.device("cpu"), torch.float32, {})
        facts = fit(objective, images, MAE().transform(SMALL, RECIPE), RECIPE, session)
        found.append((facts["flops"], facts["loss"], objective.state_dict()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found[0][:2] == found[1][:2] and found[0][0] > 0
    assert all(torch.equal(found[0][2][k], found[1][2][k]) for k in found[0][2])
