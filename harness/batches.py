"""A recipe's global batch in parts: micro-batches on one or several processes, and the sums that make one step of them.

How many parts there are is a matter of the machine and in no key. A part has every so-many-th image of the batch, so that copies of one image (repeated
augmentation) go to different parts as they do with DeiT's sampler. Processes of a `torch.distributed` group that was set up before `fit` share the
parts; each builds the same objective from the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.optim import local
from harness.plugins import Session
from harness.spec import JobFailed


def together() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if together() else 0


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if together() else 1


def couples(objective: nn.Module) -> bool:
    """Whether its loss couples the images of a batch; on several processes these meet inside a step, then."""
    return getattr(objective, "batch_coupled", False) or any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in objective.modules())


def parts_of(batch: int, session: Session, objective: nn.Module, at_least: int = 1) -> int:
    """Number of parts of a batch: a multiple of the processes, so that no part has more than session.micro_batch images.

    Args:
        at_least: parts that the job was begun with, or that memory asks for.

    Raises:
        JobFailed: fewer images than parts, or a loss that couples the images of a batch would be another one in parts.
    """
    count = processes()
    norms = [m for m in objective.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    coupled = couples(objective)
    at_least = 1 if coupled else at_least  # one part on each process, whatever it was begun with
    wanted = max(at_least, 1 if session.micro_batch is None else -(-batch // session.micro_batch))
    parts = count * -(-wanted // count)
    if parts > batch:
        raise JobFailed(f"a batch of {batch} images cannot be split into {parts} parts for {count} processes: use fewer, or raise the recipe's batch")
    alone = not all(isinstance(m, nn.SyncBatchNorm) for m in norms) or (getattr(objective, "batch_coupled", False) and not getattr(objective, "gathers", False))
    if count > 1 and alone:
        raise JobFailed(f"its loss couples the images of a batch, and does not see those of the other {count - 1} processes: run it on one process")
    if parts > count and coupled and not session.force_accumulation:
        raise JobFailed(
            f"its loss couples the images of a batch: {batch} in {parts} parts on {count} process{'es' * (count > 1)} would be another loss; "
            "give it more devices or memory, or set HARNESS_FORCE_ACCUMULATION=1"
        )
    return parts


def positions(steps: Iterable[int], batch: int, parts: int) -> list[range]:
    """Positions in the run of this process's parts, step by step."""
    return [range(s * batch + part, (s + 1) * batch, parts) for s in steps for part in range(rank(), parts, processes())]


def weigh(output: Mapping[str, Tensor], images: int) -> tuple[dict[str, Tensor], Tensor]:
    """(what an objective returned without its weight, the weight): what its mean is over, e.g. masked tokens; images unless it says so."""
    values = dict(output)
    weight: Any = values.pop("weight", images)
    loss = values["loss"]
    return values, weight.detach().to(loss) if isinstance(weight, Tensor) else torch.full_like(loss.detach(), weight)


def summing(objective: nn.Module, kind: type[DistributedDataParallel] = DistributedDataParallel) -> DistributedDataParallel:
    """An objective behind torch's DDP, which sums gradients over all processes while the backward pass goes on (benchmarks/overlap.py).

    Sums and not DDP's means, which would weigh each process's part alike: `merge` divides by what the mean is over. Each process built the same weights
    and read the same state, and batch norm is over all of them: neither weights nor buffers are sent. Looking for parameters without a gradient lets a
    step have some, and keeps torch from packing gradients anew after the first step: a run that goes on adds them in the order of one that was not stopped.
    """
    whole = kind(objective, forward_sync_buffers=False, init_sync=False, gradient_as_bucket_view=True, find_unused_parameters=True)
    hook: Any = lambda state, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda sums: sums.value()[0])  # noqa: E731
    whole.register_comm_hook(None, hook)
    return whole


def merge(outputs: list[tuple[dict[str, Tensor], Tensor]], parameters: list[nn.Parameter], summed: bool = False) -> dict[str, Tensor]:
    """One step from parts whose weighted losses were back-propagated: gradients and logged values become means over the whole batch, on all processes alike.

    Args:
        summed: gradients are sums over all processes already (`summing`).
    """
    names = sorted(outputs[0][0])
    rows = [torch.stack([*(values[n].detach().to(weight) * weight for n in names), weight]) for values, weight in outputs]
    sums = torch.stack(rows).sum(dim=0)
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if together():
        here = [] if summed else [p.grad for p in parameters if p.grad is not None and not hasattr(p.grad, "to_local")]  # sharded ones were summed on the way
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in (*here, sums)]:
            work.wait()
    torch._foreach_mul_(gradients, 1 / sums[-1])
    return {name: value / sums[-1] for name, value in zip(names, sums[:-1], strict=True)}


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is set in any process, known to all of them."""
    if not together():
        return flags
    found = torch.tensor(flags, dtype=torch.int32, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return tuple(bool(f) for f in found.tolist())


def gathered(value: Any) -> list[Any]:
    """The value of each process, known to all of them."""
    values = [value] * processes()
    if together():
        dist.all_gather_object(values, value)
    return values


class BatchNorm(nn.SyncBatchNorm):
    """Batch norm over the images of all processes, on a CPU too, where torch's own refuses; with one process plain batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same."""
        if self.training and processes() > 1:
            out: Tensor = super().forward(x) if x.is_cuda else self._joined(x)
            return out
        return nn.BatchNorm2d.forward(self, x)

    def _joined(self, x: Tensor) -> Tensor:
        """Batch norm from the sums of all processes, in fp32 at least; gradients go back through the sums."""
        from torch.distributed.nn import functional

        all_reduce: Any = functional.all_reduce  # torch leaves it without types
        wide, others = x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.ndim)]
        shape = [1, -1, *(1 for _ in others[1:])]
        count, total = all_reduce(torch.cat([wide.new_full((1,), x.numel() / x.shape[1]), wide.sum(others)])).split([1, x.shape[1]])
        if not count:  # nothing in any process, e.g. no positive box: a mean would be none, for good
            return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x
        centred = wide - (total / count).view(shape)
        square = all_reduce(centred.square().sum(others))
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(total / count, self.momentum or 0.0)
                self.running_var.lerp_(square / (count - 1), self.momentum or 0.0)
        x = (centred * (square / count + self.eps).rsqrt().view(shape)).to(x.dtype)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x
