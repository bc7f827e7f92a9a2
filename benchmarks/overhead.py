"""What the harness itself takes, besides training: commands, planning, the start of a job. How these grow is in growth.py.

The rival is the budget of each (design, issue 7): no other harness does the same. Seconds are wall-clock, with processor seconds beside them; peak memory is
the process's own. Records are made up: a smoke plan of real nodes, each with a record of the full schema and drawn scores; jobs are real. Rounds are
interleaved. The smoke protocol's data is made first where it is not there.

    .venv/bin/python benchmarks/overhead.py [benchmarks/results] [--rounds 7] [--records 10000] [--only commands,keys,start]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jsonschema
from report import keep

from harness.jobs import Node
from harness.plan import Planner
from harness.provenance import versions
from harness.request import Request
from harness.store import RECORD_SCHEMA, Store, record_schema

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("scratch", "supervised", "supervised@mean", "beit", "beit@random", "beit-pixel", "mae", "mae@pixels", "mae@dec-depth-1", "mae@mask-ratio-50")
EVALS = ("imagenet", "inat2018", "places365", "linear", "linear@beit", "partial", "partial@0.5", "partial@1", "ade20k", "coco")
PARTS = ("commands", "keys", "start")


def spent(words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, first_on_path: Path | None = None) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, peak MB) of a Python process with its children; its exit code must be 0 or 3. It runs the tree that this file is in."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.pathsep.join(filter(None, [str(first_on_path or ""), os.environ["PATH"]])), **(environment or {})}
    start = time.perf_counter()
    with open(folder / "said.txt", "w+") as said:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        if process.returncode not in (0, 3):
            said.seek(0)
            sys.exit(f"{' '.join(words)[:200]}: exit code {process.returncode}: {said.read()[-500:]}")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def interleaved(rounds: int, measured: Mapping[str, Callable[[], tuple[float, float, float]]]) -> dict[str, dict[str, Any]]:
    """Rows of several things, each measured in every round."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, measure in measured.items():
            found[name].append(measure())
    out = {}
    for name, all_rounds in found.items():
        walls, cpus, memory = zip(*all_rounds, strict=True)
        out[name] = {"name": name, "value": statistics.median(walls), "unit": "s", "spread": [min(walls), max(walls)], "rounds": rounds,
                     "processor_s": statistics.median(cpus), "peak_MB": max(memory)}
        print(f"{name}: {out[name]['value']:.2f} s ({out[name]['processor_s']:.2f} s of processor), {out[name]['peak_MB']:.0f} MB", flush=True)
    return out


def nodes_of(seeds: int) -> list[Node]:
    """A smoke plan: 10 methods x 10 evaluators x seeds x 2 fine-tuning seeds, and what they stand on."""
    request = Request(METHODS, EVALS, "smoke", seeds=tuple(range(seeds)), eval_seeds=(0, 1), precision="fp32")
    planner = Planner(request)
    plan = planner.plan()
    if planner.pending:
        planner.generate(os.cpu_count() or 1)
        plan = Planner(request).plan()
    return list(plan.nodes)


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """What a function returns, called in a process of its own: the kernel counts the memory of a process as its children's, so this one has to stay small."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def filled(folder: Path, records: int) -> tuple[Path, int, int, str]:
    """(a runs folder as if a plan of about so many evaluations were done, its number of nodes, of evaluations, the name of a node's folder)."""
    runs = folder / f"runs-{records}"
    if not runs.exists():
        apart(fill, runs, max(1, records // 200))
    names = sorted(p.name for p in runs.iterdir() if p.is_dir())
    return runs, len(names), sum(n.startswith("evaluate-") for n in names), names[0]


def fill(runs: Path, seeds: int) -> None:
    """Folders as if all nodes of a plan were done."""
    nodes = nodes_of(seeds)
    runs.mkdir(parents=True)
    (runs / ".harness.json").write_text('{"layout": 1}')
    store, draw, packages = Store(runs), random.Random(0), versions()
    noon = datetime.datetime(2026, 11, 21, 12)
    for number, node in enumerate(nodes):
        folder, job = store.folder(node), node.job(runs)
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job, indent=1))
        start = (noon + datetime.timedelta(seconds=number)).isoformat() + "+00:00"
        record = {
            "schema": RECORD_SCHEMA, **{k: job[k] for k in ("kind", "name", "key", "identity", "about", "parents")},
            "metrics": {m["name"]: draw.uniform(20, 60) for m in job["about"].get("columns", ())}, "outcomes": None, "seed": job["identity"]["seed"],
            "plugin_version": job["identity"]["version"], "git": {"commit": None, "dirty": None}, "packages": packages,
            "hardware": {"device": "cpu", "cpu": "made up", "cores": 2, "threads": 1, "gemm": "highest", "processes": 1}, "precision": "fp32",
            "start": start, "end": start, "wall_s": 1.0, "device_hours": 1 / 3600, "images_seen": 1, "flops": 1.0, "peak_memory_bytes": 1,
            "deviations": list(job["about"]["deviations"]), "deviations_found": [], "facts": {},
        }
        if number == len(nodes) - 1:
            jsonschema.Draft202012Validator(record_schema()).validate(record)
        (folder / "record.json").write_text(json.dumps(record, indent=1))
        (folder / "usage.json").write_text(json.dumps({"seconds": 1.0, "device_seconds": 1.0, "start": start}))


def commands(folder: Path, rounds: int, records: int) -> list[dict[str, Any]]:
    """--help, import harness, status and table over so many records."""
    runs, nodes, scores, name = filled(folder, records)
    where = ["--runs", str(runs)]
    found = interleaved(rounds, {
        "--help": lambda: spent(["-m", "harness", "--help"], folder),
        "import harness, its command line": lambda: spent(["-c", "import harness.cli"], folder),
        "status RUN": lambda: spent(["-m", "harness", "status", name, *where], folder),
        f"table over {scores} records": lambda: spent(["-m", "harness", "table", *where], folder),
        f"status over {nodes} nodes": lambda: spent(["-m", "harness", "status", *where], folder),
        "python, nothing else": lambda: spent(["-c", ""], folder),
    })
    goals = {"--help": 1.5, f"table over {scores} records": 5.0}
    return [{**row, **({"goal": f"< {goals[name]} s"} if name in goals else {})} for name, row in found.items()]


def keys(rounds: int) -> list[dict[str, Any]]:
    """The key of a node, and planning of one, in processor milliseconds."""
    nodes = nodes_of(1)
    makers = {
        "key of a node": (lambda: [Node(n.kind, n.name, {k: v for k, v in n.identity.items() if k not in ("schema", "kind", "parents")}, n.parents)
                                   for n in nodes], "< 1 ms"),
        "planning of a node, its recipe, checks and key included": (lambda: nodes_of(1), ""),
    }
    rows = []
    for name, (make, goal) in makers.items():
        each = []
        for _ in range(rounds):
            start = time.process_time()
            made = make()
            each.append(1000 * (time.process_time() - start) / len(made))
        rows.append({"name": name, "value": statistics.median(each), "unit": "ms", "spread": [min(each), max(each)], "rounds": rounds,
                     **({"goal": goal} if goal else {})})
        print(f"{name}: {rows[-1]['value']:.3f} ms", flush=True)
    return rows


def write_job(folder: Path, steps: int = 1, images: str | None = None) -> Path:
    """job.json of a pre-training of so many steps, on the protocol's images or a folder of others, alone in a runs folder."""
    settings = (f"mae.recipe.iterations={steps}", "mae.recipe.warmup=0")
    request = Request(("mae",), ("knn",), "smoke", settings=settings, precision="fp32", pretrain_data=images)
    node = next(n for n in Planner(request).plan().nodes if n.kind == "pretrain")
    store = Store(Path(tempfile.mkdtemp(dir=folder)))
    job = store.folder(node) / "job.json"
    job.parent.mkdir()
    job.write_text(json.dumps(node.job(store.root)))
    return job


def trained(folder: Path, job: Path, processes: int = 1) -> tuple[float, float, float]:
    """`spent` of a job with one thread for each of its processes."""
    return spent(["-m", "harness.run", str(job)], folder, {"HARNESS_PROCESSES": str(processes), "HARNESS_THREADS": "1"})


def started(folder: Path) -> tuple[float, float, float]:
    """(seconds from the start of a job's process to its first step in metrics.jsonl, processor seconds of all the job, which has one step, its peak MB)."""
    job = apart(write_job, folder)
    start = time.time()
    _, cpu, memory = trained(folder, job)
    return (job.parent / "metrics.jsonl").stat().st_mtime - start, cpu, memory


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder for the dated JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--only", default=",".join(PARTS))
    args = parser.parse_args()
    wanted, rows = args.only.split(","), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        apart(nodes_of, 1)  # data, caches
        if "commands" in wanted:
            rows += commands(folder, args.rounds, args.records)
        if "keys" in wanted:
            rows += apart(keys, args.rounds)
        if "start" in wanted:
            rows += interleaved(args.rounds, {
                "start of a job to its first step (mae, smoke)": lambda: started(folder),
                "import torch, timm, as python does it (a job looks for no garbage meanwhile)": lambda: spent(["-c", "import torch, timm"], folder),
            }).values()
        if args.out:
            keep("overhead", rows, args.out)


if __name__ == "__main__":
    main()
