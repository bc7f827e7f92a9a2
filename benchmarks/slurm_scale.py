"""A plan of 10 methods x 20 evaluators x 10 seeds (2,110 nodes) into a fake SLURM, and `status` on it.

The rival is a call of sbatch for each node (max_array = 1).

Wall-clock seconds of the command line, imports and planning included, and processor seconds of it and its children. The fake's commands are
small shell scripts (tests/slurm/fake_slurm.py); nothing is trained. The smoke protocol's data is made first if it is not there. The rival gets a
tenth of the plan.

What grows how: planning and writing jobs linearly with nodes (0.3 ms and a file each); calls of sbatch with the number of groups of equal shape and equal
dependency, one for each pre-training and method here, not with nodes; squeue is called once. Two to three seconds of imports do not grow.

    .venv/bin/python benchmarks/slurm_scale.py [benchmarks/results] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "slurm"))

from fake_slurm import FakeSlurm
from overhead import METHODS, spent
from report import keep

EVALS = (
    "ade20k", "ade20k@beit", "ade20k@mae", "ade20k@setr", "coco", "coco@vitdet", "imagenet", "inat2018", "places365", "knn",
    "linear", "linear@beit", "linear@beit-repo", "linear@dino", "linear@mocov3", "partial", "partial@0.5", "partial@1", "partial@2", "partial@4",
)
GOALS = {"run": "< 10 s", "status": "< 3 s"}


def measure(folder: Path, seeds: int, max_array: int) -> dict[str, tuple[float, float, int, int]]:
    """(wall seconds, processor seconds, nodes in the queue, calls of sbatch) of submitting, submitting again (all is in the queue), and status."""
    folder.mkdir()
    fake = FakeSlurm(folder / "bin")
    (fake.folder / "scontrol").write_text("#!/bin/sh\necho MaxArraySize = 1001\n")
    (folder / "c.toml").write_text(f"max_array = {max_array}\n")
    line = ["run", "--protocol", "smoke", "--methods", ",".join(METHODS), "--evals", ",".join(EVALS), "--seeds", ",".join(map(str, range(seeds))),
            "--launcher", "slurm", "--cluster", "c.toml"]
    out = {}
    for name, words in (("run", line), ("run again", line), ("status", ["status"])):
        wall, cpu, _ = spent(["-m", "harness", *words], folder, first_on_path=fake.folder)
        out[name] = wall, cpu, len(fake.queue), len(fake.scripts)
    return out


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder for the dated JSON")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds, rows = args.rounds, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        measure(folder / "warm", 1, 1000)  # data, caches
        kinds = {"": (10, 1000), "rival, a tenth of the plan: ": (1, 1)}
        found = [{kind: measure(folder / f"{number}{bool(kind)}", *size) for kind, size in kinds.items()} for number in range(rounds)]
    for kind in kinds:
        for name in ("run", "run again", "status"):
            walls, cpus, nodes, calls = zip(*(one[kind][name] for one in found), strict=True)
            rows.append({"name": f"{kind}{name}", "value": statistics.median(walls), "unit": "s", "spread": [min(walls), max(walls)], "rounds": rounds,
                         **({"goal": GOALS[name]} if not kind and name in GOALS else {}), "processor_s": statistics.median(cpus), "nodes": nodes[0],
                         "calls_of_sbatch": calls[0]})
            print(f"{kind}{name}: {rows[-1]['value']:.2f} s ({rows[-1]['processor_s']:.2f} s of processor), {nodes[0]} nodes, {calls[0]} calls of sbatch")
    if args.out is not None:
        keep("slurm-scale", rows, args.out)


if __name__ == "__main__":
    main()
