"""The one training loop: pre-training, fine-tuning, probing and tokenizers are all `fit`.

What is drawn at random is keyed by the place in the run (see `harness.randomness`), so a training state is weights, optimiser
and a step count. A job that is stopped or killed at any moment goes on from its last state to the same numbers.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from harness.batches import Early, any_of, couples, gathered, merge, parts_of, positions, processes, rank, weigh
from harness.checkpoint import States
from harness.data import ImageList
from harness.metrics import Metrics
from harness.optim import Ema, apply_schedule, build_optimizer, clip_gradients, local, lr_at, parameter_groups
from harness.plugins import Progress, Session
from harness.randomness import seed_all
from harness.restarts import NotFinite, go_back, past, remarks
from harness.samples import Samples, Transform, loader, stack, steps_of
from harness.sharding import shard, slices, stays_whole, whole_again
from harness.spec import Interrupted, JobFailed, Recipe
from harness.vit import compile_blocks

LOG_EVERY_S = 1.0
PREPARE_IMAGES = 256
SAVES_APART = 50  # times what one takes: 2 % of the time
OUT_OF_MEMORY = re.compile("OutOfMemory|can't allocate memory|out of memory")


@contextmanager
def count_flops(facts: dict[str, Any], share: float = 1.0) -> Iterator[None]:
    """Count the FLOPs of the first part (a `share` of a step) into facts (multiply and add = 2; matmuls, convolutions and attention), nothing later."""
    if facts["flops_per_step"] is not None:
        yield
        return
    from torch.utils.flop_counter import FlopCounterMode

    eager: Any = torch.compiler.set_stance("force_eager") if os.environ.get("HARNESS_COMPILE") else nullcontext()  # compiled kernels are not seen
    with eager, FlopCounterMode(display=False) as counter:
        yield
    facts["flops_per_step"] = float(counter.get_total_flops()) / share


def choose_attention(module: nn.Module, session: Session) -> None:
    """Explicit attention on a CPU where the fused kernel is slow: in bf16 its backward (1.45 times the images/s), and its many small oneDNN products."""
    if session.device.type == "cpu" and (session.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"):
        for part in module.modules():
            if hasattr(part, "fused_attn"):
                setattr(part, "fused_attn", False)  # noqa: B010  # a module's attributes are tensors to a type checker


def check_finite(stage: str, step: int, total: int, recipe: Recipe, loss: Tensor, norm: Tensor, states: States) -> None:
    """Raises NotFinite when the loss of a step, or the norm of its gradient, is not: the weights after it are no state to go on from."""
    if not (math.isfinite(last := float(loss.detach())) and math.isfinite(float(norm))):
        states.wait()
        numbers = f"gradient norm {float(norm):.3g}, lr {lr_at(recipe, step - 1, total):.3g}, at its peak {recipe.peak_lr:.3g}"
        remedy = "lower lr with --set, use fp32, or let it go back so many times with HARNESS_NAN_RESTARTS"
        raise NotFinite(f"{stage}: loss {last:.4g} at step {step} of {total} ({numbers}): {remedy}; {states.newest()}", step)


def fit(
    objective: nn.Module, images: ImageList, transform: Transform, recipe: Recipe, session: Session, *, stage: str = "train"
) -> dict[str, Any]:
    """Train `objective` on `images` by `recipe`, going on from the last state in session.dir if there is one.

    Args:
        objective: forward(batch, progress) -> {"loss": scalar mean, ...}, with "weight" if the mean is not over images: what it is over, e.g. the number
            of masked tokens. Holds the lent ViT as `vit`, for layer decay. `prepare(batch)`, if it has that, is called before the first step.
        transform: PIL RGB image, generator -> {"image": uint8 (3, H, W), ...}.
        stage: distinguishes several trainings of one job.

    Returns:
        steps, images_seen, flops, seconds and the last logged loss. The objective holds the trained weights (EMA's if the recipe has one).

    Raises:
        Interrupted: a signal came; the state is saved.
        JobFailed: an image cannot be read, the loss is not finite, memory or the disk is full.
    """
    folder = session.dir / "checkpoint" / stage
    while True:
        try:
            return _fit(objective, images, transform, recipe, session, stage)
        except NotFinite as failure:
            if len(past(folder)) >= session.nan_restarts:
                raise
            session.log(str(failure))
            restarts = go_back(folder, failure.step)
            session.log(f"{stage}: restart {len(restarts)} of at most {session.nan_restarts}, without the batches in between")


def _fit(objective: nn.Module, images: ImageList, transform: Transform, recipe: Recipe, session: Session, stage: str) -> dict[str, Any]:
    """`fit` up to a loss that is not finite (NotFinite)."""
    if len(images) == 0:
        raise JobFailed(f"{images.root}: no images to train on")
    per_epoch, total = steps_of(recipe, len(images))
    choose_attention(objective.train(), session)
    if backend := os.environ.get("HARNESS_COMPILE"):
        compile_blocks(objective, backend)
    vit: Any = getattr(objective, "vit", None)
    depth = 0 if vit is None else len(vit.blocks)
    groups, lent, reason = parameter_groups(objective, recipe, depth), objective, stays_whole(objective, recipe) if session.shard else ""
    masks = list[tuple[nn.Parameter, Tensor]]()
    if sharded := session.shard and not reason:
        objective, masks = shard(objective, session.device)
        groups = parameter_groups(objective, recipe, depth)
    else:
        objective.to(session.device)
    if session.shard:
        session.log(f"{stage}: {f'sharded among {processes()} processes' if sharded else f'not sharded: {reason}'}")
    optimizer = build_optimizer(groups, recipe)
    ema = Ema(objective, recipe.ema) if recipe.ema is not None else None
    states = States(session.dir / "checkpoint" / stage, total, session.milestones, slice_of=(rank(), processes()) if sharded else None)
    facts: dict[str, Any] = {"flops_per_step": None, "seconds": 0.0, "loss": None}
    step, skips = 0, sum(at - back for at, back in past(states.folder))
    if (found := states.latest()) is not None:
        step, state = found
        state = slices(state, objective, optimizer) if sharded else state
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        facts, session.skipped_images = state["facts"], {**session.skipped_images, **state["skipped"]}
        session.log(f"{stage}: going on from step {step} of {total}")
        if (before := facts.get("processes", 1)) != processes():
            session.log(f"{stage}: on {processes()} process{'es' * (processes() > 1)} now, {before} before: the batch stays {recipe.batch} images")
    else:
        session.log(f"{stage}: {total} steps of {recipe.batch} images, {per_epoch} an epoch, peak lr {recipe.peak_lr:.3g}, {session.dtype}")
    if len(set(steps := gathered(step))) > 1:
        raise JobFailed(f"{states.folder}: the processes find states of steps {steps}: is the runs folder one that all of them see?")
    parts = parts_of(recipe.batch, session, objective, facts.get("parts", 1))
    facts["parts"], facts["processes"], lead = parts, processes(), rank() == 0
    if lead:
        states.tidy(step)
    session.log(f"{stage}: a step is {parts} micro-batch{'es' * (parts > 1)} of {-(-recipe.batch // parts)} on {processes()} process{'es' * (processes() > 1)}")

    def save() -> None:
        for skipped in gathered(session.skipped_images):
            session.skipped_images |= skipped
        if not (lead or sharded):
            return
        states.save(step, {
            "objective": objective.state_dict(), "optimizer": optimizer.state_dict(), "ema": None if ema is None else ema.state_dict(),
            "facts": {**facts, "seconds": facts["seconds"] + time.monotonic() - started}, "skipped": dict(session.skipped_images),
        })

    samples = Samples(images, transform, session.seed, per_epoch * recipe.batch, session.on_bad_image == "skip", recipe.augment.repeats)
    metrics = Metrics(session.dir / "metrics.jsonl", stage, step) if lead else None
    cuda = session.device.type == "cuda"
    prepare: Any = getattr(objective, "prepare", None)
    if step == 0 and prepare is not None:
        some = stack([samples[i] for i in range(min(recipe.batch, PREPARE_IMAGES))])  # the same in every process, whatever the parts
        prepare({k: v.to(session.device) for k, v in some.items() if k != "bad"})
    if step == 0 and session.nan_restarts:
        started = time.monotonic()
        save()
    stream = loader(samples, positions(range(step + skips, total + skips), recipe.batch, parts), session.workers, cuda)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    after_step = getattr(objective, "after_step", None)
    log_every = max(1, total // 200)
    started = saved = shown = time.monotonic()
    first = step
    coupled = couples(objective)  # in more parts it would be another loss; and processes that meet inside a step would wait there for one that has left it
    halves = session.on_oom == "halve" and not (sharded or coupled)
    early = Early(parameters) if processes() > 1 and not (halves or sharded or coupled) else None
    while step < total:
        apply_schedule(optimizer, recipe, step, total)
        outputs = []
        try:
            for part in range(rank(), parts, processes()):
                bad = (drawn := next(stream)).pop("bad")  # stays here: looking at it must not wait for a GPU
                batch = {k: v.to(session.device, non_blocking=cuda) for k, v in drawn.items()}
                if session.on_bad_image == "skip":
                    for index in bad[bad >= 0].tolist():
                        session.skipped_images[str(images.files[index])] = "cannot be read"
                seed_all(session.seed, "step", step + skips, *((part,) if parts > 1 else ()))
                share = len(bad) / recipe.batch
                with count_flops(facts, share), torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32):
                    output, weight = weigh(objective(batch, step / total), len(bad))
                    loss: Any = output["loss"] if parts == 1 else output["loss"] * weight
                    if early is not None and part + processes() >= parts:
                        early.begin()
                    loss.backward()
                outputs.append((output, weight))
            short = ""
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not OUT_OF_MEMORY.search(short := f"{type(error).__name__} {error}"):
                raise
        if (halves and any_of(bool(short))[0]) or short:
            more = min(2 * parts, recipe.batch // processes() * processes())
            told, half = f"{stage}: out of memory at step {step} with {-(-recipe.batch // parts)} images at a time", -(-recipe.batch // more)
            if not halves or more == parts:
                session.log(short)
                remedy = f"set HARNESS_MICRO_BATCH={half}{'' if sharded else ' or --on-oom halve'}, which changes no key"
                larger = "it needs a larger device" + (": its loss couples the images of a batch" if coupled else "")
                raise JobFailed(f"{told}: {larger if coupled or more == parts else remedy}")
            output, loss, batch = {}, None, {}  # what they hold of this step is not to take memory from the next try
            parts = facts["parts"] = parts_of(recipe.batch, session, objective, more)
            facts["halved"] = [*facts.get("halved", ()), f"{told}: {half} from there on"]
            session.log(facts["halved"][-1])
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.empty_cache()
            stream = loader(samples, positions(range(step + skips, total + skips), recipe.batch, parts), session.workers, cuda)
            continue
        for parameter, mask in masks:
            if parameter.grad is not None:
                local(parameter.grad).mul_(mask)
        output = outputs[0][0] if parts == 1 else merge(outputs, parameters, early)
        norm = clip_gradients(parameters, recipe)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if after_step is not None:
            after_step(step / total)
        if ema is not None:
            ema.update(objective)
        now = time.monotonic()
        if step % log_every == 0 or step in (1, total):
            check_finite(stage, step, total, recipe, output["loss"], norm, states)
            facts["loss"] = float(output["loss"].detach())
            values = {k: float(v.detach()) for k, v in output.items()} | {"grad_norm": float(norm)}
            if metrics is not None:
                metrics.add(step, {**values, "lr": optimizer.param_groups[0]["lr"]})
        if lead and (now - shown > LOG_EVERY_S or step in (first + 1, total)):
            shown, speed = now, (step - first) * recipe.batch / max(now - started, 1e-9)
            session.report(Progress(stage, step, total, speed, facts["loss"], (total - step) * recipe.batch / speed))
        every = session.checkpoint_every_s and max(session.checkpoint_every_s, SAVES_APART * states.took)
        stop, due = any_of(session.should_stop(), lead and now - saved > every)
        if step < total and (stop or due):
            check_finite(stage, step, total, recipe, output["loss"], norm, states)
            save()
            saved = time.monotonic()
            if stop:
                states.wait()
                gathered(None)  # the others wait until it is saved
                raise Interrupted(f"{stage}: stopped at step {step} of {total}, saved")
    if first < total:
        save()
        states.wait()
        facts["seconds"] += time.monotonic() - started
    if ema is not None:
        ema.copy_to(objective)
    if sharded:
        whole_again(lent, objective)
    lent.to(session.device).eval()
    return {
        "steps": total, "images_seen": total * recipe.batch, "flops": total * (facts["flops_per_step"] or 0.0),
        "seconds": round(facts["seconds"], 3), "loss": facts["loss"], **({"out_of_memory": facts["halved"]} if "halved" in facts else {}),
        **({"deviations": remarks(restarts, total)} if (restarts := past(states.folder)) else {}),
    }
