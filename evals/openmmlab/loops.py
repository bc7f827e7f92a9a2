"""A dense evaluation's work, and the loops that mmengine's Runner drives: training by place in the run, scoring each image once.

Randomness is keyed by the place in the run (samples.py, and the seed of each step here), so a training state is model, optimiser and
iteration, kept by `harness.checkpoint.States` and not by mmengine (its file does not load with weights_only, and it forgets
the random generators and the sampler's position).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop
from torch import nn

from evals.openmmlab import pictures
from evals.openmmlab.samples import InOrder, batches
from harness.checkpoint import States
from harness.optim import apply_schedule, build_optimizer, clip_gradients, parameter_groups
from harness.plugins import Progress, Session
from harness.randomness import seed_all
from harness.spec import Interrupted, Recipe
from harness.train import Metrics, check_finite, choose_attention, count_flops

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
    facts: dict[str, Any] = field(default_factory=lambda: {"flops_per_step": None, "seconds": 0.0, "loss": None})

    @property
    def steps(self) -> int:
        """Training iterations of the recipe."""
        per_epoch = len(self.train) / self.recipe.batch
        return self.recipe.iterations if self.recipe.iterations is not None else max(1, round((self.recipe.epochs or 0) * per_epoch))

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
            JobFailed: the loss is not finite.
        """
        work, session, recipe, total = self.work, self.work.session, self.work.recipe, self.max_iters
        wrapper, facts = self.runner.optim_wrapper, self.work.facts
        states = States(session.dir / "checkpoint" / "train")
        if (found := states.latest()) is not None:
            self.iter, state = found
            work.model.load_state_dict(state["model"])
            wrapper.optimizer.load_state_dict(state["optimizer"])
            facts.update(state["facts"])
            session.skipped_images.update(state["skipped"])
            session.log(f"train: going on from iteration {self.iter} of {total}")
        metrics, log_every = Metrics(session.dir / "metrics.jsonl", "train", self.iter), max(1, total // 200)
        first, started = self.iter, time.monotonic()
        saved = shown = started

        def save() -> None:
            states.save(self.iter, {
                "model": work.model.state_dict(), "optimizer": wrapper.optimizer.state_dict(), "skipped": dict(session.skipped_images),
                "facts": {**facts, "seconds": facts["seconds"] + time.monotonic() - started},
            })

        stream = batches(work.train, session, recipe.batch, self.iter, total)
        work.model.train()
        self.runner.call_hook("before_train")
        while self.iter < total:
            data = next(stream)
            session.skipped_images.update({path: "cannot be read" for path in data.pop("bad") if path})
            apply_schedule(wrapper.optimizer, recipe, self.iter, total)
            seed_all(session.seed, "step", self.iter)
            self.runner.call_hook("before_train_iter", batch_idx=self.iter, data_batch=data)
            with count_flops(facts):
                losses = work.model.train_step(data, wrapper)
            self.runner.call_hook("after_train_iter", batch_idx=self.iter, data_batch=data, outputs=losses)
            self.iter += 1
            now, stop = time.monotonic(), session.should_stop()
            saves = stop or self.iter == total or now - saved > session.checkpoint_every_s
            if saves or self.iter % log_every == 0 or self.iter == 1:
                check_finite("train", self.iter, total, recipe, losses["loss"], wrapper.norm, states)
            if self.iter % log_every == 0 or self.iter in (1, total):
                values = {k: float(v.detach()) for k, v in losses.items()}
                facts["loss"] = values["loss"]
                metrics.add(self.iter, {**values, "lr": wrapper.optimizer.param_groups[0]["lr"]})
            if now - shown > LOG_EVERY_S or self.iter in (first + 1, total):
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


class TestInOrder(BaseLoop):  # type: ignore[misc]
    """Scores every image once, and draws some of them. Killed, it begins again: training is kept."""

    __test__ = False  # no test of pytest's

    def __init__(self, runner: Any, dataloader: InOrder, evaluator: Evaluator) -> None:
        self._runner, self.work, self.evaluator = runner, runner.work, evaluator
        self.evaluator.dataset_meta = runner.work.test.metainfo

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Metrics over all images."""
        work, session = self.work, self.work.session
        count = len(work.test)
        total = -(-count // work.test_batch)
        shown_at = set(pictures.places(count))
        work.model.eval()
        started = shown = time.monotonic()
        for i, data in enumerate(batches(work.test, session, work.test_batch, 0, total)):
            data.pop("bad")
            with work.autocast():
                outputs = work.model.test_step(data)
            for place, output in enumerate(outputs, i * work.test_batch):
                if place in shown_at:
                    info = work.test.source.get_data_info(int(work.test.indices[place]))
                    pictures.draw(output, info, work.test.metainfo["classes"], session.dir / "samples")
            self.evaluator.process(data_samples=outputs, data_batch=data)
            now, done = time.monotonic(), min((i + 1) * work.test_batch, count)
            if now - shown > LOG_EVERY_S or i in (0, total - 1):
                shown, speed = now, done / max(now - started, 1e-9)
                session.report(Progress("evaluate", done, count, speed, None, (count - done) / speed))
            if session.should_stop():
                raise Interrupted("evaluate: stopped; the training is saved")
        scores: dict[str, float] = self.evaluator.evaluate(count)
        return scores
