"""A training whose weights, gradients and optimiser states lie in slices, one on each process (FSDP2): for a ViT that is too large for one device.

HARNESS_SHARD=1 asks for it and is in no key. A copy of the objective is sharded and trained, and its weights are put into the one that was lent at the end:
what comes after a training sees none of this. Each block of the ViT is whole while it is computed, everything else for the length of a step. Sums are those
of a training that is not sharded, up to the order in which they are added; communication is in fp32, as the weights are. A state has a file for each
process (see `harness.checkpoint.States`) and goes on with any number of processes, sharded or not. Run on CPUs (gloo) so far, not on GPUs.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from harness.batches import processes
from harness.optim import local
from harness.spec import JobFailed, Recipe


def stays_whole(objective: nn.Module, recipe: Recipe) -> str:
    """Why there is no use in sharding it, "" when there is.

    Raises:
        JobFailed: there would be, and it cannot be done.
    """
    vit: Any = getattr(objective, "vit", None)
    if processes() == 1:
        return "there is one process"
    if vit is None or not any(p.requires_grad for p in vit.parameters()):
        return "it trains no ViT"
    if recipe.optimizer == "lars":
        return "LARS looks at whole tensors"
    if os.environ.get("HARNESS_COMPILE"):
        raise JobFailed("HARNESS_SHARD: the blocks of a sharded ViT cannot be compiled: leave it out, or begin anew (--force) without HARNESS_COMPILE")
    if hasattr(objective, "after_step"):
        raise JobFailed("HARNESS_SHARD: a momentum teacher cannot be sharded: leave HARNESS_SHARD out for this method")
    names = [name for name, _ in objective.named_parameters(remove_duplicate=False)]
    if twice := set(names) - {name for name, _ in objective.named_parameters()}:
        raise JobFailed(f"HARNESS_SHARD: {min(twice)} is shared by two layers, which cannot be sharded: leave HARNESS_SHARD out for this job")
    return ""


def shard(objective: nn.Module, device: torch.device) -> tuple[nn.Module, list[tuple[nn.Parameter, Tensor]]]:
    """A sharded copy of an objective, and what each slice of a gradient is multiplied by where the parameter has hooks (the k part of a bias held at zero).

    FSDP reduces gradients without running such hooks; each is taken to be a product with a mask, which it gives of ones.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    found: dict[str, Any] = {}
    for name, parameter in objective.named_parameters():
        for hook in (parameter._backward_hooks or {}).values():
            found[name] = hook(found.get(name, torch.ones_like(parameter, requires_grad=False)))
    whole: Any = copy.deepcopy(objective)
    mesh = init_device_mesh(device.type, (processes(),))
    for block in whole.vit.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums: `harness.batches.merge` divides by what the mean is over
            module.set_force_sum_reduction_for_comms(True)
    parameters = dict(whole.named_parameters())
    return whole, [(parameters[name], local(slice_of(mask, parameters[name]))) for name, mask in found.items()]


def slice_of(whole: Tensor, like: Any) -> Tensor:
    """A whole tensor as a sharded one like another, without asking the other processes; as it is, when the other is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def slices(state: dict[str, Any], objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A training state with slices of what is sharded in place of whole tensors."""
    own, parameters = objective.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    named = {part: state[part] and {k: slice_of(v, own.get(k)) for k, v in state[part].items()} for part in ("objective", "ema")}
    moments = {
        i: {k: slice_of(v, parameters[i]) if getattr(v, "shape", None) == parameters[i].shape else v for k, v in entry.items()}
        for i, entry in state["optimizer"]["state"].items()
    }
    return {**state, **named, "optimizer": {**state["optimizer"], "state": moments}}


def whole_again(objective: nn.Module, sharded: nn.Module) -> None:
    """Put the weights and buffers of the sharded copy into the objective."""
    objective.load_state_dict({k: (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu() for k, v in sharded.state_dict().items()})
