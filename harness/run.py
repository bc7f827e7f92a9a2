"""The process that does one job: `python -m harness.run JOB.json`, the same under every launcher.

Exit codes: 0 done, 1 failed (failure.json says why), 2 bad job file, 75 another process has the job, 130 stopped and resumable.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.jobs import read_job
from harness.metrics import loggers
from harness.provenance import Usage, gemm_mode, make_record, set_up
from harness.ranks import BUSY, check_variables, failure_name, join, log_name, number_from, own_rank, processes_here, spreads, supervise
from harness.spec import Interrupted, JobFailed, UserError
from harness.store import Locked, lock, read_record, record_schema, write_json


def make_session(folder: Path, job: dict[str, Any], should_stop: Callable[[], bool], log: Callable[[str], None], usage: Usage) -> Any:
    """The Session that trainables and evaluators get."""
    import torch

    from harness.plugins import Progress, Session

    identity, where = job["identity"], job["where"]
    device = torch.device("cuda" if torch.cuda.is_available() and not os.environ.get("HARNESS_CPU") else "cpu")
    precision = (identity.get("recipe") or {}).get("precision", "fp32")
    last, threads = [0.0], number_from("HARNESS_THREADS", default=1)  # on a GPU the cores are free to load, on a CPU a loader process takes them from the step

    def report(progress: Progress) -> None:
        if own_rank():
            return
        write_json(folder / "progress.json", {**asdict(progress), "time": time.time()})
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            usage.save()
            loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
            log(f"{progress.stage}: step {progress.step}/{progress.steps}{loss}, {progress.images_per_s:.0f} images/s")

    seed = identity["seed"] if "eval_seed" not in identity else identity["seed"] * 1_000_003 + identity["eval_seed"]
    return Session(
        dir=folder, seed=seed, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, report=report,
        folders={k: Path(v) for k, v in where["folders"].items()}, workers=number_from("HARNESS_WORKERS", 0, threads if device.type == "cuda" else 0),
        on_bad_image=where["on_bad_image"], on_oom=where.get("on_oom", "fail"), checkpoint_every_s=number_from("HARNESS_CHECKPOINT_S", 0, 30),
        should_stop=should_stop, log=log, micro_batch=number_from("HARNESS_MICRO_BATCH"),
        force_accumulation=os.environ.get("HARNESS_FORCE_ACCUMULATION", "") not in ("", "0"),
        recompute=os.environ.get("HARNESS_RECOMPUTE", "") not in ("", "0"), milestones=number_from("HARNESS_MILESTONES", 1, 4),
        nan_restarts=number_from("HARNESS_NAN_RESTARTS", 0, 0), shard=os.environ.get("HARNESS_SHARD", "") not in ("", "0"),
    )


def check_environment() -> None:
    """Look at the variables that jobs will read. Raises UserError."""
    check_variables()
    loggers()
    gemm_mode()


def run_training(job: dict[str, Any], folder: Path, session: Any) -> dict[str, Any]:
    """Do an asset or pretrain job: leaves checkpoint/asset.pt or checkpoint/backbone.pt. Returns parts of the record."""
    from harness.canonical import restore
    from harness.checkpoint import Backbone
    from harness.data import read_images
    from harness.plugins import TrainContext
    from harness.randomness import seed_all
    from harness.samples import Samples, loader, steps_of
    from harness.train import fit
    from harness.vit import ViT

    identity = job["identity"]
    plugin, recipe = restore(identity["plugin"]), restore(identity["recipe"])
    parents = {role: folder.parent / p["folder"] for role, p in job["parents"].items()}
    sets = list(job["where"]["folders"])
    images = read_images(sets[0].partition(":")[0], "train", session.folders[sets[0]]) if sets else None
    held_out = None
    if images is not None and getattr(plugin, "holdout", None):
        images, held_out = images.split(plugin.holdout)
    config: Any = restore(identity["vit"]) if "vit" in identity else None
    seed_all(session.seed, "init")
    vit = ViT(config, recipe.drop_path if recipe is not None else 0.0) if config is not None else None
    if "parent" in parents:
        vit = Backbone.load(parents["parent"] / "checkpoint" / "backbone.pt").build(config, recipe.drop_path if recipe is not None else 0.0)
    assets = {role: path / "checkpoint" / "asset.pt" for role, path in parents.items() if role != "parent"}
    assets |= {role: check_file(Path(path), identity["files"][role]) for role, path in job["where"].get("files", {}).items()}
    total = steps_of(recipe, len(images))[1] if recipe is not None and images is not None else 0
    context = TrainContext(config, recipe, total, assets, images.classes if images is not None and images.labels is not None else ())
    objective = plugin.objective(vit, context)
    facts: dict[str, Any] = {"images_seen": 0, "flops": 0.0}
    metrics: dict[str, float] = {}
    if hasattr(plugin, "facts"):
        facts |= plugin.facts(vit, context)
    if objective is not None:
        assert images is not None and recipe is not None
        transform = plugin.transform(config, recipe)
        facts |= fit(objective, images, transform, recipe, session)
        if own_rank():
            return {}  # what is left is rank 0's
        if held_out is not None and hasattr(objective, "check"):
            usable = min(len(held_out), 512)
            samples = Samples(held_out, transform, session.seed, len(held_out), session.on_bad_image == "skip")
            batches = [range(i, min(i + recipe.batch, usable)) for i in range(0, usable, recipe.batch)]
            metrics = objective.check({k: v.to(session.device) for k, v in b.items()} for b in loader(samples, batches, 0, False))
        if hasattr(objective, "pictures"):
            shown = images if held_out is None else held_out
            samples = Samples(shown, transform, session.seed, len(shown), session.on_bad_image == "skip")
            first = next(iter(loader(samples, [range(min(12, len(shown)))], 0, False)))
            facts |= save_picture(folder / "pictures.png", objective.pictures({k: v.to(session.device) for k, v in first.items()}))
    if vit is None:
        objective.cpu().save_asset(folder / "checkpoint" / "asset.pt")
    else:
        exported = objective.export() if objective is not None and hasattr(objective, "export") else vit
        state = {k: v.detach().cpu().contiguous() for k, v in exported.state_dict().items()}
        if set(state) != set(ViT(exported.config).state_dict()):
            raise JobFailed(f"{job['name']}: exports other keys than the lent ViT's")
        classifier = objective.classifier() if hasattr(objective, "classifier") else None
        if objective is None and hasattr(plugin, "classifier"):
            classifier = plugin.classifier(context)
        Backbone(exported.config, plugin.mean, plugin.std, state, classifier, {"method": job["name"]}).save(folder / "checkpoint" / "backbone.pt")
    return {"metrics": metrics, "outcomes": None, "facts": facts}


def check_file(path: Path, sha256: str) -> Path:
    """A file asset, if it is the one that the method names. Raises JobFailed."""
    import hashlib

    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise JobFailed(f"{path}: cannot be read ({error.strerror}): put the file there") from error
    if found != sha256:
        raise JobFailed(f"{path}: its sha256 is {found[:12]}..., expected {sha256[:12]}...: download it again")
    return path


def save_picture(path: Path, pixels: Any) -> dict[str, str]:
    """Write uint8 (H, W, 3) pixels as PNG, atomically. Words in their place say why there are none: a fact for the record, and no file."""
    from PIL import Image

    from harness.checkpoint import write_atomically

    if not isinstance(pixels, str):
        write_atomically(path, lambda stream: Image.fromarray(pixels).save(stream, format="PNG"))
    return {"no_pictures": pixels} if isinstance(pixels, str) else {}


def run_evaluation(job: dict[str, Any], folder: Path, session: Any) -> dict[str, Any]:
    """Do an evaluate job. Returns parts of the record."""
    from harness.canonical import restore
    from harness.checkpoint import Backbone
    from harness.plugins import EvalContext, load
    from harness.spec import Overrides

    identity = job["identity"]
    evaluator = restore(identity["plugin"])
    checkpoint = Backbone.load(folder.parent / job["parents"]["checkpoint"]["folder"] / "checkpoint" / "backbone.pt")
    setting = load("protocols", job["about"]["protocol"])
    context = EvalContext(session, setting, restore(identity["recipe"]), Overrides(use_head=identity["use_head"]))
    outcome = evaluator.run(checkpoint, context)
    declared = {m.name for m in evaluator.columns}
    if set(outcome.metrics) != declared:
        raise JobFailed(f"{job['name']}: returned the metrics {sorted(outcome.metrics)}, declared are {sorted(declared)}")
    if wrong := [k for k, v in outcome.metrics.items() if not math.isfinite(v)]:
        raise JobFailed(f"{job['name']}: {wrong[0]} is {outcome.metrics[wrong[0]]}, not a score")
    return {
        "metrics": {k: float(v) for k, v in outcome.metrics.items()}, "facts": dict(outcome.facts),
        "outcomes": None if outcome.outcomes is None else outcome.outcomes.relative_to(folder).as_posix(),
    }


def execute(path: Path, should_stop: Callable[[], bool] = lambda: False) -> int:
    """Do the job in this process, or this process's part of it; a job that is done already is left alone. Returns the exit code."""
    folder, job, rank = path.parent, read_job(path), own_rank()
    try:
        with contextlib.nullcontext() if rank else lock(folder):
            if read_record(folder) is not None:
                return 0
            if rank == 0:
                (folder / "failure.json").unlink(missing_ok=True)
            usage = Usage(folder, rank)
            with open(folder / log_name(rank), "a", buffering=1) as stream:
                def log(line: str) -> None:
                    stream.write(f"{datetime.datetime.now().strftime('%H:%M:%S')} {line}\n")

                log(f"start {job['kind']} {job['name']} {job['key']} in process {os.getpid()}")
                return attempt(job, folder, usage, should_stop, log)
    except Locked as error:
        print(f"{folder.name}: {error.owner} is at work on it", file=sys.stderr)
        return BUSY


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """For what makes many objects that stay, as imports do: torch and timm are a million. Looking for garbage took 0.85 of 3.6 s of processor (LOG.md)."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def attempt(job: dict[str, Any], folder: Path, usage: Usage, should_stop: Callable[[], bool], log: Callable[[str], None]) -> int:
    """One try at a job whose lock is held: record.json, or failure.json, or a saved state."""
    try:
        with no_collections():
            machine = set_up(folder)
            importlib.import_module("harness.vit")
        if "HARNESS_RANK" in os.environ and not spreads(job):
            log("this job is done by one process: its plugin cannot use more")
            if own_rank():
                return 0
        else:
            machine = join(machine)
            usage.processes = int(os.environ.get("HARNESS_WORLD", "1"))
        session = make_session(folder, job, should_stop, log, usage)
        parts = (run_evaluation if job["kind"] == "evaluate" else run_training)(job, folder, session)
        if own_rank():
            return 0
        usage.save()
        record = make_record(job, session, machine, usage, parts)
        import jsonschema

        jsonschema.Draft202012Validator(record_schema()).validate(record)
        write_json(folder / "record.json", record)
        (folder / "progress.json").unlink(missing_ok=True)
        for states in (folder / "checkpoint").glob("*/"):  # the result is safe: training states are not needed any more
            shutil.rmtree(states, ignore_errors=True)
        log(f"done: {record['metrics']}")
        return 0
    except (Interrupted, KeyboardInterrupt) as error:
        usage.save()
        log(f"interrupted: {error}")
        return 130
    except Exception as error:
        usage.save()
        expected = isinstance(error, (JobFailed, UserError))
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        where = "" if expected else traceback.format_exc()
        if failure_name() != "failure-rank0.json":  # log.txt is told by the watcher, which knows whose failure came first
            log(f"failed: {message}\n{where}")
        write_json(folder / failure_name(), {"message": " ".join(message.split()), "type": type(error).__name__, "traceback": where, "time": time.time()})
        return 1


def start(path: Path, should_stop: Callable[[], bool]) -> int:
    """Do the job, on as many processes as HARNESS_PROCESSES says. Returns the exit code, negative when a signal ended one of several."""
    several = "HARNESS_RANK" not in os.environ and processes_here() * number_from("HARNESS_NODES", default=1) > 1
    return supervise(path, should_stop) if several else execute(path, should_stop)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """A flag that SIGTERM, SIGINT, SIGUSR2 or the death of the launcher set; the training loop saves when it sees it."""
    asked: list[int] = []
    parent = os.getppid()
    watched = bool(os.environ.get("HARNESS_LAUNCHER_PID"))
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        yield lambda: bool(asked) or (watched and os.getppid() != parent)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """`python -m harness.run JOB.json`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m harness.run JOB.json", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        with stop_on_signal() as should_stop:
            code = start(Path(arguments[0]).resolve(), should_stop)
        if code < 0:  # one of several was killed: end as it did, so that a launcher sees what it would see of one process
            if -code != signal.SIGKILL:
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        return code
    except UserError as error:
        print(f"harness.run: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
