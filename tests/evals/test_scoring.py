"""Every image counts once, whatever the number of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.scoring import merge, share

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("count,world", [(50_000, 7), (5, 8), (1, 1), (24, 6)])
def test_each_image_is_in_one_share(count: int, world: int) -> None:
    """50,000 is no multiple of 7: padding to equal shares, as samplers for training do, would count some images twice."""
    shares = [share(count, rank, world) for rank in range(world)]
    assert sorted(i for s in shares for i in s) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    outcome = np.random.default_rng(0).integers(0, 1000, count)
    places, rows = merge(count, [(list(s), outcome[list(s)]) for s in reversed(shares)])
    assert places.tolist() == list(range(count)) and rows.tolist() == outcome.tolist()


def test_an_image_that_is_there_twice_is_an_error() -> None:
    """It would weigh double in the accuracy."""
    for parts in ([([0, 1], np.zeros(2)), ([1], np.zeros(1))], [([0, 3], np.zeros(2))]):
        with pytest.raises(ValueError, match="twice or of no image"):
            merge(3, parts)
    places, rows = merge(3, [([2], np.ones(1)), ([], np.empty(0))])  # one could not be read, a process had none
    assert places.tolist() == [2] and rows.tolist() == [1.0]


WORKER = """
import sys
from pathlib import Path
import numpy as np, torch, torch.distributed as dist
from harness.augment import EvalTransform
from harness.classifier import Classifier
from harness.data import ImageList
from harness.plugins import Session
from harness.randomness import seed_all
from evals.scoring import predict
from harness.spec import ViTConfig
from harness.vit import ViT
folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
seed_all("model")
model = Classifier(ViT(ViTConfig(size=(8, 8), patch=4, width=16, depth=1, heads=2)), 5, mean=(0.5,) * 3, std=(0.2,) * 3, head_std=1.0)
images = ImageList(folder, [f"{i}.png" for i in range(11)], np.zeros(11, dtype=np.int64), tuple("abcde"))
np.save(folder / f"{world}-{rank}.npy", predict(model, images, EvalTransform((8, 8)), Session(folder, 0, torch.device("cpu"), torch.float32, {}), batch=2))
"""


def test_processes_together_predict_what_one_does(tmp_path: Path) -> None:
    """Eleven images on two processes (gloo): both end with the outcomes of all, equal to those of one process alone."""
    rng = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    jobs = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(rank), str(world)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for world in (1, 2) for rank in range(world)]
    for job in jobs:
        _, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors
    alone = np.load(tmp_path / "1-0.npy").tolist()
    assert len(set(alone)) > 1 and np.load(tmp_path / "2-0.npy").tolist() == np.load(tmp_path / "2-1.npy").tolist() == alone
