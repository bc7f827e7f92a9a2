"""What goes wrong inside a dense training, on order: losses that are not finite at some places in the run, memory that gives out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from evals.openmmlab.foreign import openmmlab


@contextlib.contextmanager
def faults(nan: tuple[int, ...] = (), fail: Callable[[list[int]], Exception | None] = lambda places: None, shift: int = 0) -> Iterator[list[list[int]]]:
    """Inside, dense trainings of this process go wrong; gives the places in the run of each part that they tried, in order.

    Args:
        nan: places whose image has no finite pixel.
        fail: places of a part -> what is raised once it is back-propagated, or None.
        shift: what is drawn at a place is what another training draws so many places later.
    """
    with openmmlab():
        from mmengine.model import BaseModel

        from evals.openmmlab.samples import InOrder
    tried: list[list[int]] = []
    get, step = InOrder.__getitem__, BaseModel.train_step

    def item(self: InOrder, position: int) -> dict[str, Any]:
        return get(self, position) if self.seed is None else {**get(self, position + shift), "place": position}

    def train_step(self: Any, data: dict[str, Any], wrapper: Any) -> dict[str, torch.Tensor]:
        tried.append(places := data.pop("place"))
        data["inputs"] = [image * torch.nan if place in nan else image for place, image in zip(places, data["inputs"], strict=True)]
        losses: dict[str, torch.Tensor] = step(self, data, wrapper)
        if (error := fail(places)) is not None:
            raise error
        return losses

    with mock.patch.object(InOrder, "__getitem__", item), mock.patch.object(BaseModel, "train_step", train_step):
        yield tried
