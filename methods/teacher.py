"""What a student and its momentum teacher need on one process or on many: the teacher's step, means and keys over the global batch."""

from __future__ import annotations

import math
from typing import Any

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


class Total(torch.autograd.Function):
    """Sum over all processes; so is the gradient, as each process has a part of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sum, on all processes alike."""
        return summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """The sum of the gradients."""
        return summed(gradient)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the global batch, on CPU too: torch's own on one process, the same formula with sums over all processes on several."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, D)."""
        if not (self.training and together()):
            return super().forward(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        count = Total.apply(torch.tensor(float(len(x)), device=x.device))
        mean = Total.apply(x.sum(dim=0)) / count
        variance = Total.apply((x - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        y: Tensor = (x - mean) * torch.rsqrt(variance + self.eps)
        return y * self.weight + self.bias if self.affine else y
