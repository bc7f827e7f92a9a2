"""A dense evaluation's work: what to train, on what, how to score it, and what a record is told of the training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evals.openmmlab.optimizer import Named
from evals.openmmlab.samples import InOrder
from harness.batches import processes
from harness.plugins import Session
from harness.restarts import past, remarks
from harness.spec import Recipe
from harness.vit import choose_attention


@dataclass
class Work:
    """One dense evaluation: what to train, on what, and how to score it."""

    session: Session
    recipe: Recipe
    model: nn.Module
    train: InOrder
    test: InOrder
    metric: Any
    test_batch: int = 1
    facts: dict[str, Any] = field(default_factory=lambda: {"flops_per_step": None, "seconds": 0.0, "loss": None, "parts": 1})

    @property
    def steps(self) -> int:
        """Training iterations of the recipe."""
        per_epoch = len(self.train) / self.recipe.batch
        return self.recipe.iterations if self.recipe.iterations is not None else max(1, round((self.recipe.epochs or 0) * per_epoch))

    @property
    def states_folder(self) -> Path:
        """Where its training states are."""
        return self.session.dir / "checkpoint" / "train"

    @property
    def passes(self) -> int:
        """Forward passes of training in each process."""
        return self.steps * int(self.facts["parts"]) // processes()

    def __post_init__(self) -> None:
        choose_attention(self.model, self.session.device, self.session.dtype)
        vit: Any = Named(self.model).vit
        vit.set_grad_checkpointing(self.session.recompute)
        # measured in bf16 on a CPU, five interleaved rounds: UperNet's step 1.06 times as fast (1.02 to 1.07), Mask R-CNN's 1.01 (0.99 to 1.04)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def autocast(self) -> Any:
        """Mixed precision as the session has it, on CPU as on CUDA (mmengine's AmpOptimWrapper wants a GPU)."""
        dtype = self.session.dtype
        return torch.autocast(self.session.device.type, dtype, enabled=dtype != torch.float32)

    def record_facts(self) -> dict[str, Any]:
        """Facts of the training as `harness.train.fit` gives them."""
        restarts = past(self.states_folder)
        return {
            "steps": self.steps, "images_seen": self.steps * self.recipe.batch, "flops": self.steps * (self.facts["flops_per_step"] or 0.0),
            "seconds": round(self.facts["seconds"], 3), "loss": self.facts["loss"], "scored_images": len(self.test),
            **({"out_of_memory": self.facts["halved"]} if "halved" in self.facts else {}),
            **({"deviations": remarks(restarts, self.steps)} if restarts else {}),
        }
