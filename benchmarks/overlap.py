"""A step's gradients summed over two processes (gloo) after the backward pass, or by torch's DDP while it goes on (`harness.batches.summing`).

Prints, for three shapes of a ViT, seconds a step of each (median of interleaved rounds), their ratio, and whether the gradients are equal bit by bit.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from harness.batches import merge, summing
from harness.spec import ViTConfig
from harness.vit import ViT

ROUNDS = 9
SHAPES = ((192, 12, 8), (384, 6, 4), (768, 3, 2))  # width, blocks, images on each process


def process(rank: int, place: Path) -> None:
    """One of the two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=2)
    for width, depth, batch in SHAPES:
        torch.manual_seed(0)
        vit = ViT(ViTConfig(size=(64, 64), patch=8, width=width, depth=depth, heads=width // 64))
        images = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(rank))

        def step(model: torch.nn.Module, images: torch.Tensor = images) -> list[torch.Tensor]:
            parameters = list(model.parameters())
            loss = model(images).square().mean()
            loss.backward()
            merge([({"loss": loss}, torch.tensor(1.0))], parameters, isinstance(model, DistributedDataParallel))
            gradients = [p.grad.clone() for p in parameters if p.grad is not None]
            model.zero_grad(set_to_none=True)
            return gradients

        ways = (copy.deepcopy(vit), summing(vit))
        seconds: list[list[float]] = [[], []]
        same = all(torch.equal(a, b) for a, b in zip(*map(step, ways), strict=True))
        for _ in range(ROUNDS):
            for way, times in zip(ways, seconds, strict=True):
                dist.barrier()
                started = time.perf_counter()
                step(way)
                times.append(time.perf_counter() - started)
        after, during = map(statistics.median, seconds)
        if rank == 0:
            print(f"ViT {width} wide, {depth} blocks, {sum(p.numel() for p in vit.parameters()) / 1e6:.1f} M parameters, {batch} images each: "
                  f"after {after:.3f} s, during {during:.3f} s, ratio {after / during:.2f}, {'equal bits' if same else 'OTHER BITS'}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            if (child := os.fork()) == 0:
                process(rank, Path(folder))
                os._exit(0)
            children.append(child)
        sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
