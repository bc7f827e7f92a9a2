"""A dense evaluation's work, and the loop by which mmengine's Runner trains it, by place in the run.

Randomness is keyed by the place in the run (samples.py, and the seed of each step here), so a training state is model, optimiser and
iteration, kept by `harness.checkpoint.States` and not by mmengine (its file does not load with weights_only, and it forgets
the random generators and the sampler's position).

A step's images come in parts as in `harness.batches`: micro-batches on one or several processes. UperNet's loss is a mean over pixels, all crops having as
many, and its batch norm is over all processes, but over one part of each: on one device its batch is not split. Mask R-CNN's losses are means over the boxes
sampled in a part: detectron2 takes them so on each device, with one image on each of 64 in the papers. Without batch norm (ViTDet) it can be split.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from evals.openmmlab.optimizer import Named
from evals.openmmlab.samples import InOrder, batches
from harness.batches import any_of, couples, gathered, parts_of, positions, processes, rank
from harness.checkpoint import States
from harness.metrics import Metrics
from harness.optim import apply_schedule
from harness.plugins import Progress, Session
from harness.randomness import seed_all
from harness.restarts import NotFinite, go_back, past, remarks
from harness.spec import Interrupted, JobFailed, Recipe
from harness.train import OUT_OF_MEMORY, SAVES_APART, check_finite, choose_attention, count_flops

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
    def states(self) -> Path:
        """The folder of its training states."""
        return self.session.dir / "checkpoint" / "train"

    @property
    def passes(self) -> int:
        """Forward passes of training in each process."""
        return self.steps * int(self.facts["parts"]) // processes()

    def __post_init__(self) -> None:
        choose_attention(self.model, self.session)
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
        restarts = past(self.states)
        return {
            "steps": self.steps, "images_seen": self.steps * self.recipe.batch, "flops": self.steps * (self.facts["flops_per_step"] or 0.0),
            "seconds": round(self.facts["seconds"], 3), "loss": self.facts["loss"], "scored_images": len(self.test),
            **({"out_of_memory": self.facts["halved"]} if "halved" in self.facts else {}),
            **({"deviations": remarks(restarts, self.steps)} if restarts else {}),
        }


class TrainByPlace(BaseLoop):  # type: ignore[misc]
    """Training that starts at the iteration of the last state and saves, stops and reports as the session asks."""

    def __init__(self, runner: Any, dataloader: InOrder) -> None:
        self._runner, self.work = runner, runner.work
        self.iter, self.max_iters, self.skips = 0, runner.work.steps, 0  # skips: places left out by restarts (`harness.restarts`), in steps

    def run(self) -> nn.Module:
        """Train to the end.

        Raises:
            Interrupted: a signal came; the state is saved.
            JobFailed: the loss is not finite, memory gives out, or the batch cannot be split as it would have to be (`harness.batches.parts_of`).
        """
        session, folder = self.work.session, self.work.states
        self.runner.call_hook("before_train")
        while True:
            try:
                self._train()
                break
            except NotFinite as failure:
                if len(past(folder)) >= session.nan_restarts:
                    raise
                session.log(str(failure))
                restarts = go_back(folder, failure.step)
                session.log(f"train: restart {len(restarts)} of at most {session.nan_restarts}, without the batches in between")
        self.runner.call_hook("after_train")
        return self.work.model

    def _train(self) -> None:
        """`run` up to a loss that is not finite (NotFinite)."""
        work, session, recipe, total = self.work, self.work.session, self.work.recipe, self.max_iters
        wrapper, lead, count = self.runner.optim_wrapper, rank() == 0, processes()
        states = States(work.states, total, session.milestones)
        self.skips = sum(at - back for at, back in past(work.states))
        if (found := states.latest()) is not None:
            self.iter, state = found
            work.model.load_state_dict(state["model"])
            wrapper.optimizer.load_state_dict(state["optimizer"])
            work.facts = state["facts"]
            session.skipped_images.update(state["skipped"])
            session.log(f"train: going on from iteration {self.iter} of {total}")
        facts = work.facts
        parts = facts["parts"] = parts_of(recipe.batch, session, work.model, facts.get("parts", 1))
        if lead:
            states.tidy(self.iter)
        if parts > 1:
            session.log(f"train: a step is {parts} parts of {-(-recipe.batch // parts)} images on {count} process{'es' * (count > 1)}")
        metrics, log_every = Metrics(session.dir / "metrics.jsonl", "train", self.iter) if lead else None, max(1, total // 200)
        first, started = self.iter, time.monotonic()
        shown = started

        def save() -> float:
            for skipped in gathered(session.skipped_images):
                session.skipped_images.update(skipped)
            if lead:
                states.save(self.iter, {
                    "model": work.model.state_dict(), "optimizer": wrapper.optimizer.state_dict(), "skipped": dict(session.skipped_images),
                    "facts": {**facts, "seconds": facts["seconds"] + time.monotonic() - started},
                })
            return time.monotonic()

        saved = save() if self.iter == 0 and session.nan_restarts else started
        stream = self._stream(parts)
        halves = session.on_oom == "halve" and not couples(work.model)
        work.model.train()
        while self.iter < total:
            apply_schedule(wrapper.optimizer, recipe, self.iter, total)
            outputs, short = self._gradients(stream, parts)
            if (halves and any_of(bool(short))[0]) or short:
                parts = self._more_parts(parts, short, halves)
                stream = self._stream(parts)
                continue
            losses = wrapper.update_from(outputs)
            self.iter += 1
            now = time.monotonic()
            every = session.checkpoint_every_s and max(session.checkpoint_every_s, SAVES_APART * states.took)
            stop, due = any_of(session.should_stop(), lead and now - saved > every)
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
                saved = save()
            if stop and self.iter < total:
                states.wait()
                gathered(None)  # the others wait until it is saved
                raise Interrupted(f"train: stopped at iteration {self.iter} of {total}, saved")
        states.wait()
        facts["seconds"] += time.monotonic() - started if first < total else 0.0

    def _stream(self, parts: int) -> Iterator[dict[str, Any]]:
        """This process's parts from the iteration on."""
        work, places = self.work, range(self.iter + self.skips, self.max_iters + self.skips)
        return batches(work.train, work.session, positions(places, work.recipe.batch, parts))

    def _gradients(self, stream: Iterator[dict[str, Any]], parts: int) -> tuple[list[tuple[dict[str, Tensor], Tensor]], str]:
        """This process's parts of a step, back-propagated: (logged values, images) of each; or what was said when memory gave out."""
        work, session, batch, wrapper = self.work, self.work.session, self.work.recipe.batch, self.runner.optim_wrapper
        outputs = []
        try:
            for part in range(rank(), parts, processes()):
                data = next(stream)
                session.skipped_images.update({path: "cannot be read" for path in data.pop("bad") if path})
                images = len(data["inputs"])
                wrapper.images = None if parts == 1 else images
                seed_all(session.seed, "step", self.iter + self.skips, *((part,) if parts > 1 else ()))
                self.runner.call_hook("before_train_iter", batch_idx=self.iter, data_batch=data)
                with count_flops(work.facts, images / batch):
                    losses = work.model.train_step(data, wrapper)
                self.runner.call_hook("after_train_iter", batch_idx=self.iter, data_batch=data, outputs=losses)
                outputs.append((losses, torch.tensor(float(images), device=session.device)))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            short = f"{type(error).__name__} {error}"
            if isinstance(error, JobFailed) or not OUT_OF_MEMORY.search(short):  # JobFailed: an image's own
                raise
            return [], short
        return outputs, ""

    def _more_parts(self, parts: int, short: str, halves: bool) -> int:
        """The parts to do a step in again, one of the processes having run out of memory; `short`: what was said of it here.

        Raises:
            JobFailed: it is not to be halved, one image is too much already, or the loss would be another one.
        """
        work, session, batch = self.work, self.work.session, self.work.recipe.batch
        more, coupled = min(2 * parts, batch // processes() * processes()), couples(work.model)
        told, half = f"train: out of memory at step {self.iter} with {-(-batch // parts)} images at a time", -(-batch // more)
        if not halves or more == parts:
            session.log(short)
            remedy = f"set HARNESS_MICRO_BATCH={half} or --on-oom halve, which changes no key"
            larger = "it needs a larger device" + (": its loss couples the images of a batch" if coupled else "")
            less = "" if session.recompute else "; HARNESS_RECOMPUTE=1 takes less memory, for the same numbers"
            raise JobFailed(f"{told}: {larger if coupled or more == parts else remedy}{less}")
        parts = work.facts["parts"] = parts_of(batch, session, work.model, more)
        work.facts["halved"] = [*work.facts.get("halved", ()), f"{told}: {half} from there on"]
        session.log(work.facts["halved"][-1])
        self.runner.optim_wrapper.zero_grad()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        return parts
