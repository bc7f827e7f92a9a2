"""A plan of 2,090 nodes into a fake SLURM, and `status` on it; the rival is a call of sbatch for each node (max_array = 1).

Wall-clock seconds of the command line, imports and planning included, and processor seconds of it and its children. The fake's commands are
small shell scripts (tests/slurm/fake_slurm.py); nothing is trained. The smoke protocol's data is made first if it is not there. The rival gets a
tenth of the plan. With a folder as argument, a dated JSON is written there.

    .venv/bin/python benchmarks/slurm_scale.py [benchmarks/results]
"""

from __future__ import annotations

import datetime
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "slurm"))

from fake_slurm import FakeSlurm

from harness.provenance import processor, versions
from harness.store import write_json

ROOT = Path(__file__).resolve().parents[1]
METHODS = "scratch,supervised,supervised@mean,beit,beit@random,beit-pixel,mae,mae@pixels,mae@dec-depth-1,mae@mask-ratio-50"
EVALS = "imagenet,inat2018,places365,linear,linear@beit,partial,partial@0.5,partial@1,ade20k,coco"


def measure(words: list[str], folder: Path, fake: FakeSlurm) -> tuple[float, float]:
    """(wall, processor) seconds of a command; its exit code must be 0 or 3."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PATH": f"{fake.folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "harness", *words], cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(folder: Path, seeds: int, max_array: int) -> dict[str, dict[str, Any]]:
    """Submit, submit again (everything is in the queue), and status, in a folder of their own."""
    folder.mkdir()
    fake = FakeSlurm(folder / "bin")
    (fake.folder / "scontrol").write_text("#!/bin/sh\necho MaxArraySize = 1001\n")
    (folder / "c.toml").write_text(f"max_array = {max_array}\n")
    line = ["run", "--protocol", "smoke", "--methods", METHODS, "--evals", EVALS, "--seeds", ",".join(map(str, range(seeds))), "--eval-seeds", "0,1",
            "--launcher", "slurm", "--cluster", "c.toml"]
    out = {}
    for name, words in (("run", line), ("run again", line), ("status", ["status"])):
        wall, cpu = measure(words, folder, fake)
        out[name] = {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "nodes": len(fake.queue), "calls_of_sbatch": len(fake.scripts)}
        print(f"{seeds:3} seeds, max_array {max_array:4}, {name:9}: {wall:6.2f} s ({cpu:.2f} s of processor), {len(fake.queue)} nodes, "
              f"{len(fake.scripts)} calls of sbatch", flush=True)
    return out


def main() -> None:
    """Print the lines."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows(folder / "warm", 1, 1000)  # data, caches
        result = {"arrays": rows(folder / "arrays", 10, 1000), "rival, a tenth": rows(folder / "rival", 1, 1)}
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {processor()}")
    if len(sys.argv) > 1:
        day = datetime.date.today().isoformat()
        body = {"date": day, "processor": processor(), "load": os.getloadavg()[0], "versions": versions(), **result}
        write_json(Path(sys.argv[1]) / f"slurm-scale-{day}.json", body)


if __name__ == "__main__":
    main()
