"""`harness doctor --cluster FILE --drill`: a tiny job is preempted, goes on, and must end like one that was left alone.

A pre-training of seconds (MAE under the protocol smoke) is submitted twice by the profile. One is put back into the queue (`scontrol requeue`, which is
what SLURM does to a preempted job) once it has saved its first state. Both use runs/.slurm/drill-<time>/, which is removed when all went well.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.checkpoint import Backbone
from harness.jobs import Node
from harness.launch import cores, write_job
from harness.plan import Planner
from harness.request import Request
from harness.spec import UserError
from harness.store import Store, read_json, read_record
from slurm.launcher import Slurm
from slurm.queue import FOLDER, ask, jobs_of
from slurm.submit import warn

STEPS = (400, 3200, 25_600)  # of the first try; of the next ones, where the job was done before it could be preempted
LIMIT_S = 1800.0  # for all that a try waits for
POLL_S = 0.3
INEXACT = "resume is not exact here: compare the two folders"
SAME = ("key", "metrics", "images_seen", "flops", "precision", "deviations", "deviations_found", "facts")
Line = tuple[bool | None, str, str]


def drill(launcher: Slurm, store: Store) -> Iterator[Line]:
    """The lines of the drill. What is in the queue at its end is cancelled."""
    place = store.root.resolve() / FOLDER / f"drill-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}"
    profile = launcher.profile
    often = (*profile.resources.environment, ("HARNESS_CHECKPOINT_S", "1"))
    launcher.profile = dataclasses.replace(profile, resources=dataclasses.replace(profile.resources, environment=often))
    good = True
    try:
        for steps in STEPS:
            node, tried = plan(steps, place / "data", launcher.precision), place / str(steps)
            whole, put_back = Store(tried / "whole"), Store(tried / "preempted")
            lines = attempt(launcher, node, whole, put_back)
            first = next(lines)
            if first[0] is None and steps != STEPS[-1]:
                warn(f"{first[1]}: once more, with more steps")
                continue
            good = first[0] is True
            yield first
            for line in lines:
                good &= line[0] is not False
                yield line
            break
        if good:
            shutil.rmtree(place, ignore_errors=True)
        else:
            yield None, f"what is left of the drill: {place}", ""
    finally:
        for one in place.glob("*/*/.slurm"):
            with suppress(UserError):
                if ids := [job.id for job in jobs_of(Store(one.parent))[0].values()]:
                    ask("scancel", *ids)


def plan(steps: int, data: Path, precision: str | None) -> Node:
    """The pre-training, its data made below `data`."""
    request = Request(("mae",), ("knn",), "smoke", settings=(f"mae.recipe.iterations={steps}", "mae.recipe.warmup=6"), precision=precision)
    with generated_below(data):
        planner = Planner(request)
        found = planner.plan()
        if planner.pending:
            planner.generate(cores())
            found = Planner(request).plan()
    return next(n for n in found.nodes if n.kind == "pretrain")


@contextmanager
def generated_below(folder: Path) -> Iterator[None]:
    """Data of protocols lies below a folder that the nodes see; the user's cache may not be one."""
    import os

    before = os.environ.get("HARNESS_DATA")
    os.environ["HARNESS_DATA"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("HARNESS_DATA")
        os.environ.update({} if before is None else {"HARNESS_DATA": before})


def attempt(launcher: Slurm, node: Node, whole: Store, put_back: Store) -> Iterator[Line]:
    """One try. The first line has None in front when the job had ended before it could be preempted."""
    ids = {}
    for store in (put_back, whole):
        store.prepare()
        write_job(node, store)
        ids[store] = launcher.submit([node], store).ids[node.key]
    folder, deadline = put_back.folder(node), time.monotonic() + LIMIT_S
    warn(f"jobs {ids[put_back]} (to be preempted) and {ids[whole]} submitted")
    while not (saved := states(folder)):
        if end := over(node, put_back, deadline):
            yield (None, "the job was done before it could be preempted", "") if end == "done" else (False, f"the job to be preempted: {end}", "")
            return
        time.sleep(POLL_S)
    try:
        ask("scontrol", "requeue", ids[put_back])
    except UserError as error:
        finished = read_record(folder) is not None
        yield None if finished else False, f"job {ids[put_back]} cannot be preempted: {error}", "ask whether users may requeue their jobs here (JobRequeue)"
        return
    yield True, f"job {ids[put_back]} preempted (scontrol requeue) when it had saved step {saved[-1]}", ""
    for store, what in ((put_back, "the preempted job"), (whole, "the job left alone")):
        while not (end := over(node, store, deadline)):
            time.sleep(POLL_S)
        if end != "done":
            yield False, f"{what}: {end}", f"see {store.folder(node) / 'log.txt'}"
            return
    yield from tell(folder, ids[put_back], node.recipe.iterations)
    yield from compare(whole.folder(node), folder)


def states(folder: Path) -> list[int]:
    """Steps of the training states that a job has saved."""
    return sorted(int(p.stem.split("-")[1]) for p in (folder / "checkpoint").glob("*/state-*.pt"))


def over(node: Node, store: Store, deadline: float) -> str:
    """"done", or how else a job has ended or why it waits when the time is up; "" while it goes on."""
    job = jobs_of(store)[0].get(node.folder)  # first: what leaves the queue meanwhile has its record
    if job is not None:
        return f"not done in {LIMIT_S / 60:.0f} minutes: {job.shown(store.folder(node)).reason}" if time.monotonic() > deadline else ""
    state = store.state(store.folder(node))
    return {"done": "done", "failed": state.reason}.get(state.status, "left the queue without a result")


def tell(folder: Path, job: str, steps: int) -> Iterator[Line]:
    """How the preempted job went on, of so many steps."""
    attempts: list[Mapping[str, Any]] = (read_json(folder / "slurm.json") or {}).get("attempts", [])
    log = (folder / "log.txt").read_text(errors="replace")
    from_steps, told = re.findall(r"going on from step (\d+) of", log), [a.get("how") for a in attempts]
    if told[:1] == ["done"]:
        yield False, "the job ended before SLURM stopped it: nothing was tested", "call it again"
        return
    hosts = " then ".join(str(a["host"]) for a in attempts)
    yield told == ["stopped", "done"] and {a["job"] for a in attempts} == {job} if told[0] else None, (
        f"it was told to stop and {'saved' if told[0] else 'killed before it had ended'}; {len(attempts)} attempts under the same job id, on {hosts}"
    ), "the cluster's KillWait and GraceTime leave it too little time" if not told[0] else f"its attempts ended as {told}: see {folder / 'slurm.json'}"
    yield bool(from_steps), f"survived: the state of step {from_steps[-1] if from_steps else 0} of {steps}", "it began anew: see log.txt"


def compare(whole: Path, folder: Path) -> Iterator[Line]:
    """The record and the weights beside those of the job that was left alone."""
    import torch

    one, other = ({k: v for k, v in (read_record(f) or {}).items() if k in SAME} for f in (whole, folder))
    for record in (one, other):
        record["facts"] = {k: v for k, v in record["facts"].items() if k != "seconds"}
    differ = [f"{k} {other[k]}, not {one[k]}" for k in SAME if one[k] != other[k]]
    shown = f"loss {other['facts']['loss']:.6f}, {other['images_seen']} images, {other['flops']:.3g} FLOPs"
    yield not differ, f"its record {'; '.join(differ) or f'equals that of the uninterrupted job ({shown})'}", INEXACT
    a, b = (Backbone.load(f / "checkpoint" / "backbone.pt").state for f in (whole, folder))
    worst = max(float((a[k].float() - b[k].float()).abs().max()) for k in a)
    equal = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    yield equal, f"its weights are {'the same to the last bit' if equal else f'others, by up to {worst:.2g}'}", INEXACT
