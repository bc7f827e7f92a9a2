"""The one training loop: pre-training, fine-tuning, probing and tokenizers are all `fit`.

What is drawn at random is keyed by the place in the run (see `harness.randomness`), so a training state is weights, optimiser
and a step count. A job that is stopped or killed at any moment goes on from its last state to the same numbers.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from harness.batches import any_of, couples, gathered, merge, parts_of, positions, processes, rank, summing, weigh
from harness.checkpoint import States
from harness.data import ImageList
from harness.memory import no_room, out_of_memory
from harness.metrics import Metrics, count_flops
from harness.optim import Ema, apply_schedule, build_optimizer, clip_gradients, local, parameter_groups
from harness.plugins import Progress, Session
from harness.randomness import seed_all
from harness.restarts import bounded, check_finite, past, remarks, skipped
from harness.samples import Samples, Transform, loader, steps_of
from harness.sharding import shard, slices, stays_whole, whole_again
from harness.spec import Interrupted, JobFailed, Recipe
from harness.vit import choose_attention, compile_blocks

LOG_EVERY_S = 1.0
PREPARE_IMAGES = 256


def fit(
    objective: nn.Module, images: ImageList, transform: Transform, recipe: Recipe, session: Session, *, stage: str = "train"
) -> dict[str, Any]:
    """Train `objective` on `images` by `recipe`, going on from the last state in session.dir if there is one.

    Args:
        objective: forward(batch, progress) -> {"loss": scalar mean, ...}, with "weight" if the mean is not over images: what it is over, e.g. the number
            of masked tokens. Holds the lent ViT as `vit`, for layer decay. `prepare(batch)`, if it has that, is called before the first step.
        transform: PIL RGB image, generator -> {"image": uint8 (3, H, W), ...}, or whatever the objective takes.
        stage: distinguishes several trainings of one job.

    Returns:
        steps, images_seen, flops, seconds and the last logged loss. The objective holds the trained weights (EMA's if the recipe has one).

    Raises:
        Interrupted: a signal came; the state is saved.
        JobFailed: an image cannot be read, the loss is not finite, memory or the disk is full.
    """
    out: dict[str, Any] = {}
    bounded(lambda: out.update(Training(objective, images, transform, recipe, session, stage).run()), session.dir / "checkpoint" / stage, session, stage)
    return out


class Training:
    """One training: what is trained, the step it is at, and the parts that a batch has on this machine. `run` goes to the end, or a loss that is not finite."""

    def __init__(self, objective: nn.Module, images: ImageList, transform: Transform, recipe: Recipe, session: Session, stage: str) -> None:
        if len(images) == 0:
            raise JobFailed(f"{images.root}: no images to train on")
        self.images, self.recipe, self.session, self.stage, self.lent = images, recipe, session, stage, objective
        self.per_epoch, self.total = steps_of(recipe, len(images))
        self.cuda, self.lead = session.device.type == "cuda", rank() == 0
        choose_attention(objective.train(), session.device, session.dtype)
        if backend := os.environ.get("HARNESS_COMPILE"):
            compile_blocks(objective, backend)
        vit: Any = getattr(objective, "vit", None)
        depth = 0 if vit is None else len(vit.blocks)
        groups, reason = parameter_groups(objective, recipe, depth), stays_whole(objective, recipe) if session.shard else ""
        self.masks = list[tuple[nn.Parameter, Tensor]]()
        self.sharded = session.shard and not reason
        if self.sharded:
            objective, self.masks = shard(objective, session.device)
            groups = parameter_groups(objective, recipe, depth)
        else:
            objective.to(session.device)
        if session.shard:
            self.log(f"sharded among {processes()} processes" if self.sharded else f"not sharded: {reason}")
        self.objective, self.optimizer = objective, build_optimizer(groups, recipe)
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.ema = Ema(objective, recipe.ema) if recipe.ema is not None else None
        self.states = States(session.dir / "checkpoint" / stage, self.total, session.milestones, slice_of=(rank(), processes()) if self.sharded else None)
        self.samples = Samples(images, transform, session.seed, self.per_epoch * recipe.batch, session.on_bad_image == "skip", recipe.augment.repeats)
        self.coupled = couples(objective)  # in more parts another loss
        self.halves = session.on_oom == "halve" and not (self.sharded or self.coupled)
        # summed at the end of a step (`merge`) where a process may leave one and do it again; and on a CPU with batch norm over all, which DDP refuses there
        at_end = self.halves or self.sharded or (self.coupled and not self.cuda)
        self.summing = summing(objective) if processes() > 1 and not at_end else None
        self.facts: dict[str, Any] = {"flops_per_step": None, "seconds": 0.0, "loss": None}
        self.step, self.parts, self.started = 0, 1, time.monotonic()

    def log(self, text: str) -> None:
        """A line of the job's log."""
        self.session.log(f"{self.stage}: {text}")

    def run(self) -> dict[str, Any]:
        """See `fit`. Raises NotFinite, too."""
        self.restore()
        self.begin()
        session, recipe, total, first = self.session, self.recipe, self.total, self.step
        metrics = Metrics(session.dir / "metrics.jsonl", self.stage, first) if self.lead else None
        log_every = max(1, total // 200)
        self.started = saved = shown = time.monotonic()
        while self.step < total:
            apply_schedule(self.optimizer, recipe, self.step, total)
            outputs, short = self.gradients()
            if (self.halves and any_of(bool(short))[0]) or short:
                self.make_room(short)
                continue
            output, norm = self.update(outputs)
            now = time.monotonic()
            if self.step % log_every == 0 or self.step in (1, total):
                check_finite(self.stage, self.step, total, recipe, output["loss"], norm, self.states)
                self.facts["loss"] = float(output["loss"].detach())
                values = {k: float(v.detach()) for k, v in output.items()} | {"grad_norm": float(norm)}
                if metrics is not None:
                    metrics.add(self.step, {**values, "lr": self.optimizer.param_groups[0]["lr"]})
            if self.lead and (now - shown > LOG_EVERY_S or self.step in (first + 1, total)):
                shown, speed = now, (self.step - first) * recipe.batch / max(now - self.started, 1e-9)
                session.report(Progress(self.stage, self.step, total, speed, self.facts["loss"], (total - self.step) * recipe.batch / speed))
            stop, due = any_of(session.should_stop(), self.lead and self.states.due(now - saved, session.checkpoint_every_s))
            if self.step < total and (stop or due):
                check_finite(self.stage, self.step, total, recipe, output["loss"], norm, self.states)
                self.save()
                saved = time.monotonic()
                if stop:
                    self.states.wait()
                    gathered(None)  # the others wait until it is saved
                    raise Interrupted(f"{self.stage}: stopped at step {self.step} of {total}, saved")
        if first < total:
            self.save()
            self.states.wait()
            self.facts["seconds"] += time.monotonic() - self.started
        return self.finished()

    def restore(self) -> None:
        """Go on from the last state, if there is one. Raises JobFailed when the processes find different ones."""
        if (found := self.states.latest()) is not None:
            self.step, state = found
            state = slices(state, self.objective, self.optimizer) if self.sharded else state
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.facts, self.session.skipped_images = state["facts"], {**self.session.skipped_images, **state["skipped"]}
            self.log(f"going on from step {self.step} of {self.total}")
            if (before := self.facts.get("processes", 1)) != processes():
                now = f"{processes()} process{'es' * (processes() > 1)}"
                self.log(f"on {now} now, {before} before: the batch stays {self.recipe.batch} images")
        else:
            self.log(f"{self.total} steps of {self.recipe.batch} images, {self.per_epoch} an epoch, peak lr {self.recipe.peak_lr:.3g}, {self.session.dtype}")
        self.skips = skipped(self.states.folder, self.step)

    def begin(self) -> None:
        """What comes before the first step."""
        self.split(self.facts.get("parts", 1))
        if self.lead:
            self.states.tidy(self.step)
        at_a_time = f"{self.parts} micro-batch{'es' * (self.parts > 1)} of {-(-self.recipe.batch // self.parts)}"
        self.log(f"a step is {at_a_time} on {processes()} process{'es' * (processes() > 1)}")
        prepare: Any = getattr(self.objective, "prepare", None)
        if self.step == 0 and prepare is not None:
            prepare(self.some(min(self.recipe.batch, PREPARE_IMAGES)))  # the same in every process, whatever the parts
        if self.step == 0 and self.session.nan_restarts:
            self.started = time.monotonic()
            self.save()

    def split(self, at_least: int) -> None:
        """Have a step's batch in so many parts, or more. Raises JobFailed (`harness.batches.parts_of`)."""
        self.parts = self.facts["parts"] = parts_of(self.recipe.batch, self.session, self.objective, at_least)
        self.facts["processes"] = processes()
        places = positions(range(self.step + self.skips, self.total + self.skips), self.recipe.batch, self.parts)
        self.stream = loader(self.samples, places, self.session.workers, self.cuda, self.log)

    def some(self, images: int) -> dict[str, Tensor]:
        """The first images of the run, as a batch."""
        return {k: v.to(self.session.device) for k, v in default_collate([self.samples[i] for i in range(images)]).items() if k != "bad"}

    def gradients(self) -> tuple[list[tuple[dict[str, Tensor], Tensor]], str]:
        """This process's parts of a step, forward and backward: (what the objective returned of each and its weight, what was said when memory gave out)."""
        session, recipe, outputs = self.session, self.recipe, []
        try:
            for part in range(rank(), self.parts, processes()):
                bad = (drawn := next(self.stream)).pop("bad")  # stays here: looking at it must not wait for a GPU
                batch = {k: v.to(session.device, non_blocking=self.cuda) for k, v in drawn.items()}
                if session.on_bad_image == "skip":
                    for first, count in bad[bad[:, 1] > 0].tolist():
                        session.skipped_images |= {str(self.images.files[(first + i) % len(self.images)]): "cannot be read" for i in range(count)}
                seed_all(session.seed, "step", self.step + self.skips, *((part,) if self.parts > 1 else ()))
                last = part + processes() >= self.parts
                counting = count_flops(self.facts, len(bad) / recipe.batch, now=self.step > 0 or self.total == 1)
                with counting, self.autocast(), nullcontext() if last or not self.summing else self.summing.no_sync():
                    output, weight = weigh((self.summing or self.objective)(batch, self.step / self.total), len(bad))
                    loss: Any = output["loss"] if self.parts == 1 else output["loss"] * weight
                    loss.backward()
                outputs.append((output, weight))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not (short := out_of_memory(error)):
                raise
            return [], short
        return outputs, ""

    def update(self, outputs: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        """The step that the parts make. Returns (logged values, norm of the gradient)."""
        for parameter, mask in self.masks:
            if parameter.grad is not None:
                local(parameter.grad).mul_(mask)
        output = outputs[0][0] if self.parts == 1 else merge(outputs, self.parameters, self.summing is not None)
        norm = clip_gradients(self.parameters, self.recipe)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        after_step = getattr(self.objective, "after_step", None)
        if after_step is not None:
            after_step(self.step / self.total)
        if self.ema is not None:
            self.ema.update(self.objective)
        return output, norm

    def make_room(self, short: str) -> None:
        """When memory gave out, here or in another process: the same step in more parts, where that is asked for and makes the same step.

        Raises:
            JobFailed: it is not, or there are no more parts. The message names how many images at a time fit, if any do.
        """
        batch = self.recipe.batch
        more, now = min(2 * self.parts, batch // processes() * processes()), -(-batch // self.parts)
        told, half = f"{self.stage}: out of memory at step {self.step} with {now} images at a time", -(-batch // more)
        self.optimizer.zero_grad(set_to_none=True)
        if self.cuda:
            torch.cuda.empty_cache()
        if not self.halves or more == self.parts:
            self.log(short)
            self.summing = None  # what it was doing in this step is not waited for
            larger = ": its loss couples the images of a batch" if self.coupled else "" if more == self.parts else None
            raise no_room(told, now, self.session, larger, None if self.sharded else self.attempt)
        self.split(more)
        self.facts["halved"] = [*self.facts.get("halved", ()), f"{told}: {half} from there on"]
        self.session.log(self.facts["halved"][-1])

    def attempt(self, images: int) -> None:
        """Forward and backward of so many images, with room for the averages that an optimiser keeps of each gradient from its first step on."""
        self.optimizer.zero_grad(set_to_none=True)
        room = [torch.empty_like(p) for p in self.parameters for _ in range(2)] if not self.optimizer.state else []
        with self.autocast():
            loss: Any = self.objective(self.some(images), self.step / self.total)["loss"]
            loss.backward()
        del room

    def autocast(self) -> Any:
        """Mixed precision as the session has it."""
        dtype = self.session.dtype
        return torch.autocast(self.session.device.type, dtype, enabled=dtype != torch.float32)

    def save(self) -> None:
        """Begin to write a state; all processes call it."""
        for bad in gathered(self.session.skipped_images):
            self.session.skipped_images |= bad
        if self.lead or self.sharded:
            self.states.save(self.step, {
                "objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": None if self.ema is None else self.ema.state_dict(),
                "facts": {**self.facts, "seconds": self.facts["seconds"] + time.monotonic() - self.started}, "skipped": dict(self.session.skipped_images),
            })

    def finished(self) -> dict[str, Any]:
        """Put the trained weights into the objective that was lent; what `fit` returns."""
        if self.ema is not None:
            self.ema.copy_to(self.objective)
        if self.sharded:
            whole_again(self.lent, self.objective)
        self.lent.to(self.session.device).eval()
        facts, total = self.facts, self.total
        return {
            "steps": total, "images_seen": total * self.recipe.batch, "flops": total * (facts["flops_per_step"] or 0.0),
            "seconds": round(facts["seconds"], 3), "loss": facts["loss"], **({"out_of_memory": facts["halved"]} if "halved" in facts else {}),
            **({"deviations": remarks(restarts, total)} if (restarts := past(self.states.folder)) else {}),
        }
