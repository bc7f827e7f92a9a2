"""Training curves for the report, from the metrics.jsonl of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from results.ancestry import Archive
from results.cells import Sheet

POINTS = 60  # of a curve: means over equal stretches of steps
FEW = 30  # where many curves share a chart
MOST = 12  # methods whose pre-training gets a chart of its own

Curve = tuple[Sequence[float], Sequence[float]]  # steps, losses
Chart = tuple[str, dict[str, list[Curve]]]  # title, method -> one curve for each seed


def curve(path: Path, most: int = POINTS) -> Curve:
    """Steps and losses of a training, thinned; empty where there is no file. Lines that are damaged or have no finite loss are left out."""
    points = []
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return (), ()
    for text in lines:
        try:
            line = json.loads(text)
            step, loss = float(line["step"]), float(line["loss"])
        except (ValueError, KeyError, TypeError):
            continue
        if math.isfinite(loss):
            points.append((step, loss))
    width = max(1, math.ceil(len(points) / most))
    stretches = [points[i : i + width] for i in range(0, len(points), width)]
    return [sum(s for s, _ in p) / len(p) for p in stretches], [sum(v for _, v in p) / len(p) for p in stretches]


def curves_of(sheet: Sheet, archive: Archive) -> tuple[list[Chart], list[Chart]]:
    """Pre-training, a chart for each method and one for what it goes on from; evaluations, a chart for each evaluator with all methods."""
    pretraining: dict[tuple[str, str], list[Curve]] = {}
    evaluations: dict[str, dict[str, list[Curve]]] = {}
    seen: set[tuple[str, str]] = set()
    for cell in sheet.cells.values():
        for result in cell.results:
            for step in archive.steps(result):
                wanted = step.role == "evaluation" or step.kind == "pretrain"  # not the fine-tuning that another evaluation goes on from
                if step.folder is None or (cell.method, step.key) in seen or not wanted:
                    continue
                seen.add((cell.method, step.key))
                found = curve(step.folder / "metrics.jsonl", FEW if step.role == "evaluation" else POINTS)
                if len(found[0]) > 1 and step.role == "evaluation":
                    evaluations.setdefault(cell.eval, {}).setdefault(cell.method, []).append(found)
                elif len(found[0]) > 1:
                    pretraining.setdefault((cell.method, "" if step.role == "checkpoint" else f", its {step.role}"), []).append(found)
    before = [(f"pre-training: {method}{of}", {method: curves}) for (method, of), curves in list(pretraining.items())[:MOST]]
    return before, [(f"{name}: training on each pre-training", series) for name, series in evaluations.items()]
