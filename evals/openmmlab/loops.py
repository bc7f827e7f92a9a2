"""The loop by which mmengine's Runner trains a dense evaluation, by place in the run.

Randomness is keyed by the place in the run (samples.py, and the seed of each step here), so a training state is model, optimiser and
iteration, kept by `harness.checkpoint.States` and not by mmengine (its file does not load with weights_only, and it forgets
the random generators and the sampler's position).

A step's images come in parts as in `harness.batches`: micro-batches on one or several processes. UperNet's loss is a mean over pixels, all crops having as
many, and its batch norm is over all processes, but over one part of each: on one device its batch is not split. Mask R-CNN's losses are means over the boxes
sampled in a part: detectron2 takes them so on each device, with one image on each of 64 in the papers. Without batch norm (ViTDet) it can be split.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from evals.openmmlab.samples import InOrder, batches
from evals.openmmlab.work import Work
from harness.batches import any_of, couples, gathered, parts_of, positions, processes, rank, summing
from harness.checkpoint import States
from harness.memory import no_room, out_of_memory
from harness.metrics import Metrics, count_flops
from harness.optim import apply_schedule
from harness.plugins import Progress
from harness.randomness import seed_all
from harness.restarts import bounded, check_finite, skipped
from harness.spec import Interrupted, JobFailed

LOG_EVERY_S = 1.0


class TrainByPlace(BaseLoop):  # type: ignore[misc]
    """Training that starts at the iteration of the last state and saves, stops and reports as the session asks."""

    def __init__(self, runner: Any, dataloader: InOrder) -> None:
        work: Work = runner.work
        self._runner, self.work, self.lead = runner, work, rank() == 0
        self.iter, self.max_iters, self.skips, self.parts = 0, work.steps, 0, 1  # skips: steps that restarts leave out (`harness.restarts`)
        self.states, self.coupled = States(work.states_folder, work.steps, work.session.milestones), couples(work.model)
        self.halves = work.session.on_oom == "halve" and not self.coupled
        at_end = self.halves or (self.coupled and work.session.device.type == "cpu")  # see `harness.train.Training`
        self.summing = summing(work.model, MMDistributedDataParallel) if processes() > 1 and not at_end else None

    def run(self) -> nn.Module:
        """Train to the end.

        Raises:
            Interrupted: a signal came; the state is saved.
            JobFailed: the loss is not finite, memory gives out, or the batch cannot be split as it would have to be (`harness.batches.parts_of`).
        """
        self.runner.call_hook("before_train")
        bounded(self._train, self.work.states_folder, self.work.session, "train")
        self.runner.call_hook("after_train")
        return self.work.model

    def _train(self) -> None:
        """`run` up to a loss that is not finite (NotFinite)."""
        self._restore()
        work, session, recipe, total, states = self.work, self.work.session, self.work.recipe, self.max_iters, self.states
        first, facts, wrapper, log_every = self.iter, work.facts, self.runner.optim_wrapper, max(1, total // 200)
        metrics = Metrics(session.dir / "metrics.jsonl", "train", first) if self.lead else None
        self.started = time.monotonic()
        if first == 0 and session.nan_restarts:
            self._save()
        saved = shown = time.monotonic()
        work.model.train()
        while self.iter < total:
            apply_schedule(wrapper.optimizer, recipe, self.iter, total)
            outputs, short = self._gradients()
            if (self.halves and any_of(bool(short))[0]) or short:
                self._make_room(short)
                continue
            losses = wrapper.update_from(outputs, self.summing is not None)
            self.iter += 1
            now = time.monotonic()
            stop, due = any_of(session.should_stop(), self.lead and states.due(now - saved, session.checkpoint_every_s))
            saves = stop or due or self.iter == total
            if saves or self.iter % log_every == 0 or self.iter == 1:
                check_finite("train", self.iter, total, recipe, losses["loss"], wrapper.norm, states)
            if self.iter % log_every == 0 or self.iter in (1, total):
                values = {k: float(v.detach()) for k, v in losses.items()}
                facts["loss"] = values["loss"]
                if metrics is not None:
                    metrics.add(self.iter, {**values, "lr": wrapper.optimizer.param_groups[0]["lr"]})
            if self.lead and (now - shown > LOG_EVERY_S or self.iter in (first + 1, total)):
                shown, speed = now, (self.iter - first) * recipe.batch / max(now - self.started, 1e-9)
                session.report(Progress("train", self.iter, total, speed, facts["loss"], (total - self.iter) * recipe.batch / speed))
            if saves:
                self._save()
                saved = time.monotonic()
            if stop and self.iter < total:
                states.wait()
                gathered(None)  # the others wait until it is saved
                raise Interrupted(f"train: stopped at iteration {self.iter} of {total}, saved")
        states.wait()
        facts["seconds"] += time.monotonic() - self.started if first < total else 0.0

    def _restore(self) -> None:
        """Go on from the last state, if there is one. Raises JobFailed when the processes find different ones."""
        work, session = self.work, self.work.session
        if (found := self.states.latest()) is not None:
            self.iter, state = found
            work.model.load_state_dict(state["model"])
            self.runner.optim_wrapper.optimizer.load_state_dict(state["optimizer"])
            work.facts = state["facts"]
            session.skipped_images.update(state["skipped"])
            session.log(f"train: going on from iteration {self.iter} of {self.max_iters}")
        self.skips = skipped(work.states_folder, self.iter)
        self._split(work.facts.get("parts", 1))
        if self.lead:
            self.states.tidy(self.iter)
        if self.parts > 1:
            count = processes()
            session.log(f"train: a step is {self.parts} parts of {-(-work.recipe.batch // self.parts)} images on {count} process{'es' * (count > 1)}")

    def _save(self) -> None:
        """Begin to write a state; all processes call it."""
        work, session, facts = self.work, self.work.session, self.work.facts
        for bad in gathered(session.skipped_images):
            session.skipped_images.update(bad)
        if self.lead:
            self.states.save(self.iter, {
                "model": work.model.state_dict(), "optimizer": self.runner.optim_wrapper.optimizer.state_dict(), "skipped": dict(session.skipped_images),
                "facts": {**facts, "seconds": facts["seconds"] + time.monotonic() - self.started},
            })

    def _split(self, at_least: int) -> None:
        """Have a step's images in so many parts, or more, from this iteration on. Raises JobFailed (`harness.batches.parts_of`)."""
        work = self.work
        self.parts = work.facts["parts"] = parts_of(work.recipe.batch, work.session, work.model, at_least)
        places = range(self.iter + self.skips, self.max_iters + self.skips)
        self.stream = batches(work.train, work.session, positions(places, work.recipe.batch, self.parts))

    def _gradients(self) -> tuple[list[tuple[dict[str, Tensor], Tensor]], str]:
        """This process's parts of a step, forward and backward: (logged values and images of each, what was said when memory gave out)."""
        work, session, wrapper, outputs = self.work, self.work.session, self.runner.optim_wrapper, []
        try:
            for part in range(rank(), self.parts, processes()):
                data = next(self.stream)
                session.skipped_images.update({path: "cannot be read" for paths in data.pop("bad") for path in paths.splitlines()})
                images = len(data["inputs"])
                wrapper.images = None if self.parts == 1 else images
                seed_all(session.seed, "step", self.iter + self.skips, *((part,) if self.parts > 1 else ()))
                self.runner.call_hook("before_train_iter", batch_idx=self.iter, data_batch=data)
                last = part + processes() >= self.parts
                with count_flops(work.facts, images / work.recipe.batch), nullcontext() if last or not self.summing else self.summing.no_sync():
                    losses = (self.summing or work.model).train_step(data, wrapper)
                self.runner.call_hook("after_train_iter", batch_idx=self.iter, data_batch=data, outputs=losses)
                outputs.append((losses, torch.tensor(float(images), device=session.device)))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not (short := out_of_memory(error)):
                raise
            return [], short
        return outputs, ""

    def _make_room(self, short: str) -> None:
        """When memory gave out, here or in another process: the same step in more parts, where that is asked for and makes the same step.

        Raises:
            JobFailed: it is not, or there are no more parts. The message names how many images at a time fit, if any do.
        """
        session, batch = self.work.session, self.work.recipe.batch
        more, now = min(2 * self.parts, batch // processes() * processes()), -(-batch // self.parts)
        told, half = f"train: out of memory at step {self.iter} with {now} images at a time", -(-batch // more)
        self.runner.optim_wrapper.zero_grad()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.halves or more == self.parts:
            session.log(short)
            self.summing = None  # what it was doing in this step is not waited for
            larger = ": its loss couples the images of a batch" if self.coupled else "" if more == self.parts else None
            failure = no_room(told, now, session, larger, self._attempt)
            raise failure if session.recompute else JobFailed(f"{failure}; HARNESS_RECOMPUTE=1 takes less memory, for the same numbers")
        self._split(more)
        self.work.facts["halved"] = [*self.work.facts.get("halved", ()), f"{told}: {half} from there on"]
        session.log(self.work.facts["halved"][-1])

    def _attempt(self, images: int) -> None:
        """Forward and backward of so many images, with room for what an optimiser keeps of each gradient from its first step on."""
        wrapper = self.runner.optim_wrapper
        wrapper.zero_grad()
        wrapper.images, room = None, [torch.empty_like(p) for p in wrapper.parameters for _ in range(2)] if not wrapper.optimizer.state else []
        data = pseudo_collate([self.work.train[i] for i in range(images)])
        data.pop("bad")
        self.work.model.train_step(data, wrapper)
        del room
