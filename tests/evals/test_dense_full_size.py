"""One training step and one scored image at the papers' full size fit into the memory of a laptop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import resource, sys
from pathlib import Path
import torch
from evals.openmmlab.foreign import openmmlab
from harness import plugins
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Session
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Protocol, Recipe, ViTConfig
from harness.vit import ViT

name, root, dtype = sys.argv[1], Path(sys.argv[2]), torch.bfloat16
with openmmlab():
    from evals.openmmlab import golden

    if name.startswith("ade20k"):
        golden.write_ade20k(root / "data", 1, 150)
    else:
        golden.write_coco(root / "data", 1, 80)
vit, recipe = ViTConfig(), Recipe(batch=1, lr=1e-4, iterations=1, layer_decay=0.65, drop_path=0.1)
paper = Protocol(name="paper", family="paper", summary="", backbones={"b": vit}, backbone="b")
session = Session(root, 0, torch.device("cpu"), dtype, {name.partition("@")[0]: root / "data"}, recompute=True)
outcome = plugins.build("evals", name).run(Backbone(vit, IMAGENET_MEAN, IMAGENET_STD, ViT(vit).state_dict()), EvalContext(session, paper, recipe))
print(outcome.facts["steps"], outcome.facts["scored_images"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["ade20k", "coco"])
def test_a_step_at_full_size_takes_at_most_sixteen_gigabytes(name: str, tmp_path: Path) -> None:
    """ViT-B: 512 pixels and 150 classes, 1024 pixels and 80 classes."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", STEP, name, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, scored, gigabytes = (float(word) for word in done.stdout.split()[-3:])
    assert (steps, scored) == (1, 1) and 1 < gigabytes <= 16
    assert len(list((tmp_path / "samples").iterdir())) == 1
