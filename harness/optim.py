"""From a Recipe to an optimiser: parameter groups with layer-wise learning rates, schedules per step, clipping, EMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from harness.spec import Recipe, UserError


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def layer_of(name: str, depth: int, bias_per_block: bool = True) -> int:
    """Layer of a parameter for layer-wise decay (BEiT's and MAE's rule): embeddings 0, block i i+1, everything else depth+1.

    A relative bias table belongs to its block; a table that all blocks share belongs to "everything else", as in BEiT's code.
    """
    if not name.startswith("vit."):
        return depth + 1
    parts = name.split(".")
    if parts[1] in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    if parts[1] == "blocks" or (parts[1] == "relative_bias" and bias_per_block):
        return int(parts[2]) + 1
    return depth + 1


def parameter_groups(module: nn.Module, recipe: Recipe, depth: int) -> list[dict[str, Any]]:
    """Parameters of a module that train, grouped by weight decay and learning rate scale.

    Parameters that match `recipe.frozen` get requires_grad False and are left out. Exempt from weight decay: those that match
    `recipe.no_decay`, and those with at most one dimension unless `recipe.decay_vectors`. Layer decay scales the learning rate of layer i
    by layer_decay ** (depth + 1 - i); see `layer_of`.

    Args:
        depth: number of blocks of `module.vit`, 0 if it has none.

    Returns:
        groups with "params", "names", "weight_decay", "decays" (whether a weight decay schedule moves it) and "lr_scale".

    Raises:
        UserError: a pattern of `frozen` matches nothing, or nothing is left to train.
    """
    config = getattr(getattr(module, "vit", None), "config", None)
    per_block = getattr(config, "relative_bias", "block") == "block"
    names = [name for name, _ in module.named_parameters()]
    for pattern in recipe.frozen:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"recipe.frozen: {pattern!r} matches no parameter (they are called e.g. {', '.join(names[:3])})")
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if _matches(name, recipe.frozen):
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        decays = (parameter.ndim > 1 or recipe.decay_vectors) and not _matches(name, recipe.no_decay)
        scale = 1.0 if recipe.layer_decay is None else recipe.layer_decay ** (depth + 1 - layer_of(name, depth, per_block))
        group = groups.setdefault((decays, scale), {
            "params": [], "names": [], "weight_decay": recipe.weight_decay if decays else 0.0, "decays": decays, "lr_scale": scale,
        })
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise UserError("recipe.frozen leaves nothing to train")
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """LARS without trust scaling and weight decay for parameters of at most one dimension, as MAE's linear probe has it (recipes A3)."""

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update: velocity = momentum x velocity + scaled gradient; weights -= lr x velocity."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight_norm, update_norm = p.norm(), update.norm()
                    ratio = group["trust"] * weight_norm / update_norm
                    update = update * torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                p.add_(state["momentum_buffer"].mul_(group["momentum"]).add_(update), alpha=-group["lr"])
        return loss


def build_optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`, each group's lr at its peak; `apply_schedule` sets it before each step."""
    groups = [{**g, "lr": recipe.peak_lr * g["lr_scale"]} for g in groups]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas, eps=recipe.eps, fused=True)
    if recipe.optimizer == "lars":
        return LARS(groups, lr=recipe.peak_lr, momentum=recipe.momentum)
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum)


def lr_at(recipe: Recipe, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0), before layer decay: linear warm-up from `warmup_lr`, then the schedule down to `min_lr`.

    Cosine and poly run from the end of warm-up to the last step; `steps` (a tenth of the lr at each) are in the recipe's own unit.
    cosine-stepwise is BEiT's and DINO's `cosine_scheduler`: the warm-up's last step has the full rate already, the cosine starts from it
    once more and stops one step short of `min_lr`.
    """
    if recipe.schedule == "cosine-stepwise":
        return _stepwise(recipe, step, total_steps)
    length = recipe.epochs if recipe.epochs is not None else float(recipe.iterations or 1)
    now = step / max(1, total_steps) * length  # in epochs or iterations, fractional
    peak = recipe.peak_lr
    if now < recipe.warmup:
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * now / recipe.warmup
    done = min(1.0, (now - recipe.warmup) / max(length - recipe.warmup, 1e-12))
    if recipe.schedule == "cosine":
        return recipe.min_lr + (peak - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "poly":
        return recipe.min_lr + (peak - recipe.min_lr) * math.pow(1.0 - done, recipe.poly_power)
    if recipe.schedule == "step":
        return max(recipe.min_lr, peak * math.pow(0.1, sum(now >= s for s in recipe.steps)))
    return peak


def _stepwise(recipe: Recipe, step: int, total_steps: int) -> float:
    """`lr_at` of cosine-stepwise: whole steps of warm-up, both ends included, then whole steps of cosine."""
    warmup = round(recipe.warmup / (recipe.epochs or recipe.iterations or 1) * total_steps)
    if step < warmup:
        return recipe.warmup_lr + (recipe.peak_lr - recipe.warmup_lr) * step / max(1, warmup - 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    return recipe.min_lr + (recipe.peak_lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def weight_decay_at(recipe: Recipe, step: int, total_steps: int) -> float:
    """Weight decay of a step: constant, or half a cosine from `weight_decay` to `weight_decay_end`."""
    if recipe.weight_decay_end is None:
        return recipe.weight_decay
    start, end = recipe.weight_decay, recipe.weight_decay_end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))


def apply_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, total_steps: int) -> None:
    """Set lr and weight decay of every group for a step."""
    lr, decay = lr_at(recipe, step, total_steps), weight_decay_at(recipe, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = decay


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor: all of it, or its slice where it is sharded (`harness.sharding`)."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def clip_gradients(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Tensor:
    """Clip gradients in place as the recipe says, over all of them or tensor by tensor (DINO's rule); the global norm before that, a scalar."""
    found = [p.grad for p in parameters if p.grad is not None]
    if not found:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(grads := [local(g) for g in found]))
    if hasattr(found[0], "to_local"):
        torch.distributed.all_reduce(squares := norms.square())
        norms = squares.sqrt()
    total: Tensor = norms.norm()
    if recipe.clip is not None and recipe.clip_mode == "global":
        torch._foreach_mul_(grads, (recipe.clip / (total + 1e-6)).clamp(max=1.0))
    elif recipe.clip is not None:
        torch._foreach_mul_(grads, list((recipe.clip / (norms + 1e-6)).clamp(max=1.0).unbind()))
    return total


class Ema:
    """Exponential moving average of a module's floating-point parameters and persistent buffers; integer buffers are copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"recipe.ema must be at least 0 and below 1, not {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """average = decay x average + (1 - decay) x module, after an optimiser step."""
        averages, values = [], []
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                averages.append(local(self.average[key]))
                values.append(local(value.detach()))
            else:
                self.average[key].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by name."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved average.

        Raises:
            KeyError: the names differ.
        """
        if set(state) != set(self.average):
            raise KeyError("the saved EMA has other parameters than the model")
        for key, value in state.items():
            self.average[key].copy_(value)

    def copy_to(self, module: nn.Module) -> None:
        """Put the average into the module."""
        module.load_state_dict(self.average)
