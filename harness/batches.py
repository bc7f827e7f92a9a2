"""A recipe's global batch in parts: micro-batches on one or several processes, and the sums that make one step of them.

How many parts there are is a matter of the machine and in no key. A part has every so-many-th image of the batch, so that copies of one image (repeated
augmentation) go to different parts as they do with DeiT's sampler. Processes of a `torch.distributed` group that was set up before `fit` share the
parts; each builds the same objective from the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def parts_of(batch: int, session: Session, objective: nn.Module, at_least: int = 1) -> int:
    """Number of parts of a batch: a multiple of the processes, so that no part has more than session.micro_batch images.

    Args:
        at_least: parts that the job was begun with, or that memory asks for.

    Raises:
        JobFailed: fewer images than parts, or a loss that couples the images of a batch would have to be accumulated.
    """
    count = processes()
    wanted = max(at_least, 1 if session.micro_batch is None else -(-batch // session.micro_batch))
    parts = count * -(-wanted // count)
    if parts > batch:
        raise JobFailed(f"a batch of {batch} images cannot be split into {parts} parts for {count} processes: use fewer, or raise the recipe's batch")
    coupled = getattr(objective, "batch_coupled", False) or any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in objective.modules())
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
    weight = values.pop("weight", None)
    loss = values["loss"]
    return values, torch.as_tensor(images if weight is None else weight, dtype=loss.dtype, device=loss.device).detach()


def merge(outputs: list[tuple[dict[str, Tensor], Tensor]], parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """One step from parts whose weighted losses were back-propagated: gradients and logged values become means over the whole batch, on all processes alike."""
    names = sorted(outputs[0][0])
    rows = [torch.stack([*(values[n].detach().to(weight) * weight for n in names), weight]) for values, weight in outputs]
    sums = torch.stack(rows).sum(dim=0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if together():
        for tensor in (*gradients, sums):
            dist.all_reduce(tensor)
    torch._foreach_mul_(gradients, 1 / sums[-1])
    return {name: value / sums[-1] for name, value in zip(names, sums[:-1], strict=True)}


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process, known to all of them."""
    if not together():
        return flag
    found = torch.tensor([int(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())
