"""The harness's optimiser behind mmengine's interface: layer decay by the ViT's names, clipping, mixed precision, a step from several parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from harness.batches import merge, together
from harness.optim import build_optimizer, clip_gradients, parameter_groups

if TYPE_CHECKING:
    from evals.openmmlab.work import Work


class Named(nn.Module):
    """The names that layer decay goes by: the ViT as `vit`, all else below `dense`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vit, self.dense = model.backbone.vit, model


class Optimize(OptimWrapper):  # type: ignore[misc]
    """The harness's optimiser, clipping and mixed precision behind mmengine's interface."""

    def __init__(self, work: Work) -> None:
        named = Named(work.model)
        groups = parameter_groups(named, work.recipe, len(named.vit.blocks))
        super().__init__(build_optimizer(groups, work.recipe))
        self.work = work
        self.norm = torch.zeros(())  # of the last step's gradient
        self.parameters = [p for p in work.model.parameters() if p.requires_grad]
        self.images: int | None = None  # of the part that is back-propagated; None: it is the whole step

    def update_params(self, loss: Tensor, step_kwargs: Any = None, zero_kwargs: Any = None) -> None:
        """The gradients of a step, or of a part of it by its number of images; `update_from` makes the step."""
        self.backward(loss if self.images is None else loss * self.images)

    def update_from(self, outputs: list[tuple[dict[str, Tensor], Tensor]], summed: bool) -> dict[str, Tensor]:
        """The step of all parts on all processes: from (logged values, images) of this process's to the values' means; see `harness.batches.merge`."""
        if together() and not summed:
            self._alike()
        losses = outputs[0][0] if self.images is None else merge(outputs, self.parameters, summed)
        self.step()
        self.zero_grad()
        return losses

    def _alike(self) -> None:
        """A gradient in each process where one has one: the sum over them wants the same."""
        used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int32, device=self.work.session.device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        for parameter, somewhere in zip(self.parameters, used.tolist(), strict=True):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Mixed precision for a forward pass."""
        with super().optim_context(model), self.work.autocast():
            yield

    def step(self, **kwargs: Any) -> None:
        """Clip as the recipe says and update."""
        self.norm = clip_gradients(self.parameters, self.work.recipe)
        self.optimizer.step(**kwargs)
