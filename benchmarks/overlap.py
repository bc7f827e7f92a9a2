"""A step's gradients summed over two processes (gloo) after the backward pass, as the rival has it, or while it goes on (`harness.batches.Early`).

Prints, for three shapes of a ViT, seconds a step of each (median of interleaved rounds), their ratio, and whether the gradients are equal bit by bit.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from harness.batches import Early, merge
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
        parameters = list(vit.parameters())
        images = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(rank))

        def step(early: Early | None, vit: ViT = vit, parameters: list[torch.nn.Parameter] = parameters, images: torch.Tensor = images) -> list[torch.Tensor]:
            if early is not None:
                early.begin()
            loss = vit(images).square().mean()
            loss.backward()
            merge([({"loss": loss}, torch.tensor(1.0))], parameters, early)
            gradients = [p.grad for p in parameters if p.grad is not None]
            for parameter in parameters:
                parameter.grad = None
            return gradients

        ways: tuple[Early | None, ...] = (None, Early(parameters))
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
            print(f"ViT {width} wide, {depth} blocks, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, {batch} images each: after {after:.3f} s, "
                  f"during {during:.3f} s, ratio {after / during:.2f}, {'equal bits' if same else 'OTHER BITS'}", flush=True)
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
