"""How seconds and memory grow: with images, epochs, nodes of the graph, records, and processes of a job. One plot each.

The rival is a straight line: none of these may grow faster. `rows` of the JSON have for each curve what one more costs (the line that fits best), what is there
without any, and how far a point lies from the line, in percent of it; `growth` has the points. Processor seconds are what counts, as the machine may be
busy; memory is the peak of the largest process. Images are hard links to a few small files, so that a folder of many costs no disk; jobs are real
(mae, smoke), records are made up as in overhead.py.

    .venv/bin/python benchmarks/growth.py [benchmarks/results] [--rounds 3] [--share 1.0] [--only images,epochs,nodes,records,processes]
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from overhead import EVALS, METHODS, apart, filled, nodes_of, spent, trained, write_job
from report import keep

PARTS = ("images", "epochs", "nodes", "records", "processes")
DOUBLED, NODES, FILES, PER_EPOCH = (1, 2, 4, 8), 209, 16, 31  # nodes of a seed; different files; steps of 32 images in an epoch of 1,000
PLAN = "from harness.plan import Planner; from harness.request import Request; import sys; " \
    "Planner(Request({m!r}, {e!r}, 'smoke', seeds=tuple(range({s})), eval_seeds=(0, 1), precision='fp32')).plan()"
PLAN_FOLDER = "from harness.plan import Planner; from harness.request import Request; " \
    "Planner(Request(('mae',), ('knn',), 'smoke', precision='fp32', pretrain_data={f!r})).plan()"
Measure = Callable[[int], tuple[float, float, float]]


def draw(folder: Path) -> None:
    """The different files. In a process of its own, as all that needs memory here: the kernel counts what this one has as that of each that it starts."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for kind, values in enumerate(np.random.default_rng(0).integers(0, 256, (FILES, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(values).save(folder / f"{kind}.jpg")


def images_below(folder: Path, count: int) -> Path:
    """A folder of so many images of 64 x 64, a hundred in each of its own."""
    root = folder / f"images-{count}"
    if root.exists():
        return root
    if not (kinds := folder / "kinds").exists():
        apart(draw, kinds)
    for number in range(count):
        if number % 100 == 0:
            (root / f"{number // 100:05}").mkdir(parents=True)
        os.link(kinds / f"{number % FILES}.jpg", root / f"{number // 100:05}" / f"{number:07}.jpg")
    return root


def plan_of_images(folder: Path, count: int) -> tuple[float, float, float]:
    """A plan on a folder that was not seen before: its fingerprint is taken."""
    seen = images_below(folder, count)
    new = seen.rename(Path(tempfile.mkdtemp(dir=folder)) / "images")  # fingerprints are kept by the place
    taken = spent(["-c", PLAN_FOLDER.format(f=str(new))], folder)
    new.rename(seen)
    return taken


def job_of(folder: Path, steps: int = 1, images: int | None = None, processes: int = 1) -> tuple[float, float, float]:
    """A job of so many steps on so many images."""
    where = None if images is None else str(images_below(folder, images))
    return trained(folder, apart(write_job, folder, steps, where), processes)


def curves_of(folder: Path, share: float) -> dict[str, tuple[str, Sequence[int], dict[str, Measure]]]:
    """Part -> (what grows, its values, what is measured at each)."""
    def size(whole: int) -> list[int]:
        return [max(1, round(whole * share / 8)) * part for part in DOUBLED]

    def nodes(n: int) -> tuple[float, float, float]:
        return spent(["-c", PLAN.format(m=METHODS, e=EVALS, s=n // NODES)], folder)

    def command(word: str, n: int) -> tuple[float, float, float]:
        return spent(["-m", "harness", word, "--runs", str(filled(folder, n)[0])], folder)

    return {
        "images": ("images", size(100_000), {
            "plan, with the folder's fingerprint": partial(plan_of_images, folder), "a job of one step": lambda n: job_of(folder, images=n)}),
        "epochs": ("epochs of 1,000 images", size(32), {"a job": lambda n: job_of(folder, PER_EPOCH * n, 1000)}),
        "nodes": ("nodes of the graph", [NODES * n for n in size(40)], {"plan": nodes}),
        "records": ("records", [200 * n for n in size(48)], {word: partial(command, word) for word in ("table", "status")}),
        "processes": ("processes of a job (gloo)", (1, 2, 4), {"a job of one step": lambda n: job_of(folder, processes=n)}),
    }


def points_of(values: Sequence[int], measures: Mapping[str, Measure], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Points of some curves: at each value the median of the rounds, which are interleaved."""
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for _ in range(rounds):
        for value in values:
            for name, measure in measures.items():
                found.setdefault((name, value), []).append(measure(value))
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    for (name, value), taken in found.items():
        wall, cpu, memory = (round(statistics.median(column), 3) for column in zip(*taken, strict=True))
        curves[name].append({"at": value, "wall_s": wall, "processor_s": cpu, "peak_MB": memory})
        print(f"{name}, {value}: {wall:.2f} s, {cpu:.2f} s of processor, {memory:.0f} MB", flush=True)
    return curves


def line(points: Sequence[Mapping[str, float]], what: str) -> tuple[float, float, float]:
    """(what one more costs, what is there without any, how far a point lies from that line in percent of it)."""
    slope, start = statistics.linear_regression([p["at"] for p in points], [p[what] for p in points])
    return slope, start, max(100 * abs(p[what] / (start + slope * p["at"]) - 1) for p in points)


def row(grows: str, name: str, points: Sequence[Mapping[str, float]], rounds: int) -> dict[str, Any]:
    """A curve in figures."""
    each, start, off = line(points, "processor_s")
    each_mb, start_mb, off_mb = line(points, "peak_MB")
    return {"name": f"{grows}: {name}", "value": 1000 * each, "unit": "ms each", "rounds": rounds, "goal_is": "a straight line",
            "seconds_without_any": start, "percent_off_the_line": off,
            "memory": {"kB_each": 1000 * each_mb, "MB_without_any": start_mb, "percent_off_the_line": off_mb}}


def plot(grows: str, curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Processor seconds and memory of some curves against what grows, as a small PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    for label, points in curves.items():
        for axis, what in zip(axes, ("processor_s", "peak_MB"), strict=True):
            axis.plot([p["at"] for p in points], [p[what] for p in points], marker="o", label=label)
            axis.set(xlabel=grows, ylabel={"processor_s": "processor seconds", "peak_MB": "peak MB"}[what], xlim=(0, None), ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, plot and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder for the dated JSON and its plots")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the sizes")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--note", help="what is to be said of the machine")
    args = parser.parse_args()
    rows, growth, load = list[dict[str, Any]](), dict[str, Any](), round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        apart(nodes_of, 1)  # data, caches
        parts = curves_of(folder, args.share)
        for part in args.only.split(","):
            grows, values, measures = parts[part]
            growth[grows] = points_of(values, measures, args.rounds)
            rows += [row(grows, name, points, args.rounds) for name, points in growth[grows].items()]
    if args.out:
        for part in args.only.split(","):
            apart(plot, parts[part][0], growth[parts[part][0]], args.out / f"growth-{datetime.date.today().isoformat()}-{part}.png")
        keep("growth", rows, args.out, growth=growth, load_before=load, **({"note": args.note} if args.note else {}))


if __name__ == "__main__":
    main()
