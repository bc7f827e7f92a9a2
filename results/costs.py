"""What a row has cost, from the records: device-hours, FLOPs, images per second, peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.collect import Result
from results.ancestry import Archive, Step
from results.cells import Cell, Sheet
from results.grid import DASH, Entry, Grid

HEADINGS = ("pre-training h", "evaluations h", "total h", "pre-training FLOPs", "images/s", "peak GiB")
LEGEND = ("Cost of one seed (mean over seeds), from the records: device-hours of pre-training with what it is built from (tokenizer, parent), of the shown "
          "evaluations (over the seeds with most of them), and together; FLOPs of the training steps (multiply and add = 2); images per second of the "
          "pre-training; highest memory of any job.")


@dataclass(frozen=True)
class Cost:
    """Cost of one score (one pair of seeds). Hours are device-hours, None where a record is gone, does not say, or loads
    weights that were trained elsewhere.

    `shared_hours` is the evaluation's own plus its part of the pre-training, which `evaluations` scores of the table share.
    """

    pretrain_hours: float | None
    eval_hours: float | None
    evaluations: int
    flops: float | None
    pretrain_flops: float | None
    images_per_s: float | None
    peak_memory_bytes: int | None

    @property
    def total_hours(self) -> float | None:
        """Pre-training and evaluation."""
        return None if self.pretrain_hours is None or self.eval_hours is None else self.pretrain_hours + self.eval_hours

    @property
    def shared_hours(self) -> float | None:
        """This evaluation and its part of the pre-training."""
        return None if self.pretrain_hours is None or self.eval_hours is None else self.pretrain_hours / self.evaluations + self.eval_hours

    def as_row(self) -> dict[str, Any]:
        """Fields of `table --cost --format json`."""
        return {f"cost_{k}": v for k, v in {**asdict(self), "total_hours": self.total_hours, "shared_hours": self.shared_hours}.items()}


def cost_of(result: Result, archive: Archive, evaluations: int = 1) -> Cost:
    """Cost of one score. Fine-tuning that it goes on from (ImageNet's, for ImageNet-A) is part of its evaluation."""
    return cost_of_steps(archive.steps(result) or (Step("evaluation", result.key, None, None),), evaluations)


def cost_of_steps(steps: Sequence[Step], evaluations: int = 1) -> Cost:
    """Cost of nodes, each counted once."""
    after, before = ([s for s in steps if (s.kind == "evaluate" or s.role == "evaluation") is wanted] for wanted in (True, False))
    pretraining = next((s.record for s in before if s.kind == "pretrain" and s.record), None) or {}
    seen, seconds = pretraining.get("images_seen"), pretraining.get("wall_s")
    known = bool(before) and not any(s.foreign for s in before)
    return Cost(
        _sum(before, "device_hours") if known else None, _sum(after, "device_hours"), max(1, evaluations), _sum(steps, "flops") if known else None,
        _sum(before, "flops") if known else None, seen / seconds if seen and seconds else None,
        max((s.record["peak_memory_bytes"] for s in steps if s.record and s.record["peak_memory_bytes"]), default=None),
    )


def _sum(steps: Sequence[Step], name: str) -> float | None:
    """Sum of a field over records; None where one of them is gone or does not say."""
    values = [s.record.get(name) if s.record else None for s in steps]
    return None if any(v is None for v in values) else float(sum(v for v in values if v is not None))


def sharing(sheet: Sheet, result: Result) -> int:
    """How many evaluators of a sheet stand on the same method and pre-training seed."""
    return len({c.eval for c in sheet.cells.values() if c.method == result.method and any(r.seed == result.seed for r in c.results)})


def cell_cost(cell: Cell, sheet: Sheet, archive: Archive) -> dict[str, Any]:
    """Cost of a cell: means over its scores, highest memory."""
    costs = [cost_of(r, archive, sharing(sheet, r)).as_row() for r in cell.results]
    names = Cost(None, None, 1, None, None, None, None).as_row()
    found: dict[str, Any] = {}
    for name in names:
        values = [c[name] for c in costs if c[name] is not None]
        whole = len(values) == len(costs) and values
        found[name] = (max(values) if name == "cost_peak_memory_bytes" else statistics.fmean(values)) if whole else None
    return found


def row_entries(method: str, sheet: Sheet, archive: Archive) -> tuple[Entry, ...]:
    """The cost columns of a method's row: means over pre-training seeds of what each has cost with all its evaluations, highest memory. A seed that lacks
    scores that another has does not count for the evaluations' hours: it would make the row cheap."""
    by_seed: dict[int, dict[str, Step]] = {}
    scores: dict[int, set[str]] = {}
    for cell in sheet.cells.values():
        for result in cell.results if cell.method == method else ():
            by_seed.setdefault(result.seed, {}).update((s.key, s) for s in archive.steps(result))
            scores.setdefault(result.seed, set()).add(result.key)
    most = max(map(len, scores.values()), default=0)
    costs = {seed: cost_of_steps(tuple(steps.values())) for seed, steps in by_seed.items()}

    def mean(values: Sequence[float | None]) -> float | None:
        return None if not values or None in values else statistics.fmean(v for v in values if v is not None)

    before = mean([c.pretrain_hours for c in costs.values()])
    after = mean([c.eval_hours for seed, c in costs.items() if len(scores[seed]) == most])
    flops, speed = mean([c.pretrain_flops for c in costs.values()]), mean([c.images_per_s for c in costs.values()])
    memory = max((c.peak_memory_bytes for c in costs.values() if c.peak_memory_bytes), default=None)
    texts = [hours(before), hours(after), hours(None if before is None or after is None else before + after)]
    texts += [DASH if flops is None else f"{flops:.2e}" if flops else "0", DASH if speed is None else f"{speed:.0f}",
              DASH if memory is None else f"{memory / 2**30:.1f}"]
    return tuple(map(Entry, texts))


def with_costs(table: Grid, sheet: Sheet, archive: Archive) -> Grid:
    """A sheet's grid with the cost columns."""
    rows = tuple((*row, *row_entries(method, sheet, archive)) for method, row in zip(sheet.methods, table.rows, strict=True))
    return replace(table, header=(*table.header, *HEADINGS), rows=rows, below=(*table.below, LEGEND))


def cost_grid(sheet: Sheet, archive: Archive) -> Grid:
    """The cost columns as a table of their own."""
    return Grid("", ("method", *HEADINGS), tuple((Entry(m), *row_entries(m, sheet, archive)) for m in sheet.methods), ())


def hours(value: float | None) -> str:
    """Device-hours for reading: two decimals, three below a tenth."""
    return DASH if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
