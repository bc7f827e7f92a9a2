"""A dense evaluation's work, and the loop by which mmengine's Runner trains it, by place in the run.

Randomness is keyed by the place in the run (samples.py, and the seed of each step here), so a training state is model, optimiser and
iteration, kept by `harness.checkpoint.States` and not by mmengine (its file does not load with weights_only, and it forgets
the random generators and the sampler's position).

A step's images come in parts as in `harness.batches`: micro-batches on one or several processes. UperNet's loss is a mean over pixels, all crops having as
many, and its batch norm is over all processes, so parts make the same step. Mask R-CNN's losses are means over the boxes sampled in a part: detectron2
takes them so on each device, with one image on each of 64 in the papers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from evals.openmmlab.samples import InOrder, batches
from harness.batches import any_of, merge, parts_of, positions, processes, rank, together
from harness.checkpoint import States
from harness.metrics import Metrics, count_flops
from harness.optim import apply_schedule, build_optimizer, clip_gradients, parameter_groups
from harness.plugins import Progress, Session
from harness.randomness import seed_all
from harness.restarts import check_finite
from harness.spec import Interrupted, Recipe
from harness.vit import choose_attention

LOG_EVERY_S = 1.0


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
        return {
            "steps": self.steps, "images_seen": self.steps * self.recipe.batch, "flops": self.steps * (self.facts["flops_per_step"] or 0.0),
            "seconds": round(self.facts["seconds"], 3), "loss": self.facts["loss"], "scored_images": len(self.test),
        }


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
        """A whole step, or the gradients of a part of it, by its number of images; then `update_from` makes the step."""
        if self.images is None:
            super().update_params(loss, step_kwargs, zero_kwargs)
        else:
            self.backward(loss * self.images)

    def update_from(self, outputs: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
        """The step of all parts on all processes: from (logged values, images) of this process's to the values' means."""
        if together():  # the sum over processes wants the same gradients in each
            used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int32, device=self.work.session.device)
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
            for parameter, somewhere in zip(self.parameters, used.tolist(), strict=True):
                if somewhere and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        losses = merge(outputs, self.parameters)
        self.step()
        self.zero_grad()
        return losses

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Mixed precision for a forward pass."""
        with super().optim_context(model), self.work.autocast():
            yield

    def step(self, **kwargs: Any) -> None:
        """Clip as the recipe says and update."""
        self.norm = clip_gradients(self.parameters, self.work.recipe)
        self.optimizer.step(**kwargs)


class TrainByPlace(BaseLoop):  # type: ignore[misc]
    """Training that starts at the iteration of the last state and saves, stops and reports as the session asks."""

    def __init__(self, runner: Any, dataloader: InOrder) -> None:
        self._runner, self.work = runner, runner.work
        self.iter, self.max_iters = 0, runner.work.steps

    def run(self) -> nn.Module:
        """Train to the end.

        Raises:
            Interrupted: a signal came; the state is saved.
            JobFailed: the loss is not finite, or the batch cannot be split as it would have to be (`harness.batches.parts_of`).
        """
        work, session, recipe, total = self.work, self.work.session, self.work.recipe, self.max_iters
        wrapper, facts = self.runner.optim_wrapper, self.work.facts
        states = States(session.dir / "checkpoint" / "train", total, session.milestones)
        if (found := states.latest()) is not None:
            self.iter, state = found
            work.model.load_state_dict(state["model"])
            wrapper.optimizer.load_state_dict(state["optimizer"])
            facts.update(state["facts"])
            session.skipped_images.update(state["skipped"])
            session.log(f"train: going on from iteration {self.iter} of {total}")
        parts, lead, count = parts_of(recipe.batch, session, work.model), rank() == 0, processes()
        facts["parts"] = parts
        if lead:
            states.tidy(self.iter)
        if parts > 1:
            session.log(f"train: a step is {parts} parts of {-(-recipe.batch // parts)} images on {count} process{'es' * (count > 1)}")
        metrics, log_every = Metrics(session.dir / "metrics.jsonl", "train", self.iter) if lead else None, max(1, total // 200)
        first, started = self.iter, time.monotonic()
        saved = shown = started

        def save() -> None:
            if lead:
                states.save(self.iter, {
                    "model": work.model.state_dict(), "optimizer": wrapper.optimizer.state_dict(), "skipped": dict(session.skipped_images),
                    "facts": {**facts, "seconds": facts["seconds"] + time.monotonic() - started},
                })

        stream = batches(work.train, session, positions(range(self.iter, total), recipe.batch, parts))
        work.model.train()
        self.runner.call_hook("before_train")
        while self.iter < total:
            apply_schedule(wrapper.optimizer, recipe, self.iter, total)
            outputs = []
            for part in range(rank(), parts, processes()):
                data = next(stream)
                session.skipped_images.update({path: "cannot be read" for path in data.pop("bad") if path})
                images = len(data["inputs"])
                wrapper.images = None if parts == 1 else images
                seed_all(session.seed, "step", self.iter, *((part,) if parts > 1 else ()))
                self.runner.call_hook("before_train_iter", batch_idx=self.iter, data_batch=data)
                with count_flops(facts, images / recipe.batch):
                    losses = work.model.train_step(data, wrapper)
                self.runner.call_hook("after_train_iter", batch_idx=self.iter, data_batch=data, outputs=losses)
                outputs.append((losses, torch.tensor(float(images), device=session.device)))
            losses = outputs[0][0] if parts == 1 else wrapper.update_from(outputs)
            self.iter += 1
            now = time.monotonic()
            stop, due = any_of(session.should_stop(), now - saved > session.checkpoint_every_s)
            saves = stop or due or self.iter == total
            if saves or self.iter % log_every == 0 or self.iter == 1:
                check_finite("train", self.iter, total, recipe, losses["loss"], wrapper.norm, states)
            if self.iter % log_every == 0 or self.iter in (1, total):
                values = {k: float(v.detach()) for k, v in losses.items()}
                facts["loss"] = values["loss"]
                if metrics is not None:
                    metrics.add(self.iter, {**values, "lr": wrapper.optimizer.param_groups[0]["lr"]})
            if lead and (now - shown > LOG_EVERY_S or self.iter in (first + 1, total)):
                shown, speed = now, (self.iter - first) * recipe.batch / max(now - started, 1e-9)
                session.report(Progress("train", self.iter, total, speed, facts["loss"], (total - self.iter) * recipe.batch / speed))
            if saves:
                save()
                saved = time.monotonic()
            if stop and self.iter < total:
                states.wait()
                raise Interrupted(f"train: stopped at iteration {self.iter} of {total}, saved")
        states.wait()
        facts["seconds"] += time.monotonic() - started if first < total else 0.0
        self.runner.call_hook("after_train")
        return work.model
