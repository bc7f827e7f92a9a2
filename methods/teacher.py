"""What a student and its momentum teacher need on one process or on many: the teacher's step, means and keys over the global batch."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.batches import processes, rank, together


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum x teacher + (1 - momentum) x student, parameter by parameter; buffers are the teacher's own."""
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    torch._foreach_mul_([t for t, _ in pairs], momentum)
    torch._foreach_add_([t for t, _ in pairs], [s.detach() for _, s in pairs], alpha=1 - momentum)


def rising(momentum: float, done: float) -> float:
    """Half a cosine from `momentum` to 1 at `done` of the training, 0..1 (MoCo3-repo adjust_moco_momentum, DINO-repo cosine_scheduler)."""
    return 1 - (1 - momentum) * 0.5 * (1 + math.cos(math.pi * done))


def gathered(x: Tensor) -> tuple[Tensor, int]:
    """Rows (n, D) of all processes, process after process, without gradients, and where this process's own begin."""
    if not together():
        return x.detach(), 0
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(processes())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    longest = max(int(n) for n in sizes)
    padded = torch.cat([x.detach(), x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)]), sum(int(n) for n in sizes[: rank()])


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, on all of them alike; without gradients."""
    total = x.detach()
    if together():
        total = total.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
    return total
