"""Trains a tiny BEiT on pixels in N processes and writes its weights: `python processes.py N FOLDER`. Run by test_batches.py.

torch is imported once and the processes are forked before it has any threads.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.augment import TrainTransform
from harness.batches import BatchNorm
from harness.data import ImageList
from harness.plugins import Session, TrainContext
from harness.randomness import seed_all
from harness.spec import Augment, Interrupted, Recipe, ViTConfig
from harness.train import fit
from harness.vit import ViT
from methods.beit import BEiT

SMALL = ViTConfig(size=(32, 32), patch=4, width=16, depth=2, heads=2)
RECIPE = Recipe(batch=10, lr=0.3, iterations=3, optimizer="sgd", clip=1.0, drop_path=0.0, precision="fp32", augment=Augment(color_jitter=(0.4, 0.4, 0.4)))


class Unweighted(nn.Module):
    """An objective that does not say what its mean is over."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.vit = inner, inner.vit

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        return {"loss": self.inner(batch, progress)["loss"]}


def train(
    folder: Path, images: Path, recipe: Recipe = RECIPE, micro_batch: int | None = None, weighted: bool = True, **fields: Any
) -> dict[str, Tensor]:
    """Weights after three steps."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    method = BEiT(target="pixels", mask_patches=150)  # so many that the number hidden varies from image to image
    seed_all(3, "init")
    objective: Any = method.objective(ViT(SMALL, recipe.drop_path), TrainContext(SMALL, recipe, 3))
    objective = objective if weighted else Unweighted(objective)
    files = ImageList(images, sorted(p.name for p in images.glob("*.png")), None, ())
    session = Session(folder, 3, torch.device("cpu"), torch.float32, {}, micro_batch=micro_batch, **fields)
    fit(objective, files, method.transform(SMALL, recipe), recipe, session)
    return dict(objective.vit.state_dict())


class Probe(nn.Module):
    """A batch norm and a linear layer on the mean colours of the two halves of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = BatchNorm(6, affine=False), nn.Linear(6, 1)

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        halves = batch["image"].float().div(255).unflatten(2, (2, -1)).mean((3, 4)).flatten(1)  # (B, 6)
        return {"loss": (self.layer(self.norm(halves)) - halves[:, :1]).square().mean()}


def train_probe(folder: Path, images: Path) -> dict[str, Tensor]:
    """Weights and running statistics after three steps."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    seed_all(3, "init")
    probe, files = Probe(), ImageList(images, sorted(p.name for p in images.glob("*.png")), None, ())
    fit(probe, files, TrainTransform((32, 32), RECIPE.augment), RECIPE, Session(folder, 3, torch.device("cpu"), torch.float32, {}))
    return probe.state_dict()


class Runs(nn.Module):
    """A linear map, and one that is never used; runs out of memory in one process, once, with its gradients half made."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.layer, self.idle, self.calls, self.at = nn.Linear(3, 1), nn.Linear(3, 1), 0, at

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.at and dist.get_rank() == 1:
            self.layer.weight.grad = torch.full_like(self.layer.weight, 7.0)
            raise torch.OutOfMemoryError("as a GPU would")
        return {"loss": self.layer(batch["image"].float().div(255).mean((2, 3))).square().mean()}


def train_short(folder: Path, images: Path, at: int | None, **fields: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights after three steps, and what `fit` returned."""
    folder.mkdir(parents=True, exist_ok=True)
    seed_all(3, "init")
    model, files = Runs(at), ImageList(images, sorted(p.name for p in images.glob("*.png")), None, ())
    facts = fit(model, files, TrainTransform((32, 32), RECIPE.augment), RECIPE, Session(folder, 3, torch.device("cpu"), torch.float32, {}, **fields))
    return model.state_dict(), facts


def process(rank: int, count: int, place: Path) -> None:
    """One of them."""
    import dataclasses

    dist.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=count)
    for name, drop_path in (("plain", 0.0), ("dropped", 0.5)):
        state = train(place / f"{name}-{rank}", place / "images", dataclasses.replace(RECIPE, drop_path=drop_path))
        torch.save(state, place / f"{name}-{rank}.pt")
    early = train(place / f"early-{rank}", place / "images", micro_batch=2)
    late = train(place / f"late-{rank}", place / "images", micro_batch=2, on_oom="halve")  # which keeps sums to the end of a step
    with contextlib.suppress(Interrupted):
        train(place / "again", place / "images", micro_batch=2, should_stop=lambda: True)
    torch.save((early, late, train(place / "again", place / "images", micro_batch=2)), place / f"early-{rank}.pt")
    torch.save(train_probe(place / f"probe-{rank}", place / "images"), place / f"probe-{rank}.pt")
    halved, facts = train_short(place / f"short-{rank}", place / "images", 1, on_oom="halve")
    small, _ = train_short(place / f"long-{rank}", place / "images", None, micro_batch=2, on_oom="halve")
    summed, _ = train_short(place / f"summed-{rank}", place / "images", None, micro_batch=2)
    torch.save((halved, facts["out_of_memory"], small, summed), place / f"short-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    total, place = int(sys.argv[1]), Path(sys.argv[2])
    children = []
    for rank in range(total):
        if (child := os.fork()) == 0:
            process(rank, total, place)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
