"""Loss, gradients and statistics of a tiny MoCo v3 on a batch, in float64: whole on one process, then on two. Run by test_mocov3.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from harness.batches import merge, weigh
from harness.randomness import seed_all
from harness.spec import ViTConfig
from harness.vit import ViT
from methods.mocov3 import MoCoV3Objective


def one(name: str, part: slice, place: Path) -> None:
    """The step of one process, as `harness.train.fit` makes it."""
    torch.set_num_threads(1)
    seed_all(3, "init")
    objective = MoCoV3Objective(ViT(ViTConfig(size=(16, 16), patch=8, width=16, depth=1, heads=2)), 16, 8, 0.2, 0.99, nn.Identity()).double().train()
    batch = torch.randn(7, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()[part]
    output, weight = weigh(objective({"views": batch}), len(batch))
    (output["loss"] * weight).backward()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    loss = merge([(output, weight)], parameters)["loss"]
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    torch.save({"loss": loss, "gradients": gradients, "buffers": dict(objective.named_buffers())}, place / f"{name}.pt")


def process(rank: int, place: Path) -> None:
    """One of two."""
    dist.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=2)
    one(str(rank), slice(rank, None, 2), place)
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            process(rank, folder)
            os._exit(0)
        children.append(child)
    one("whole", slice(None), folder)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
