"""What a row has cost, from the records: device-hours, FLOPs, images per second, peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.store import Result
from results.ancestry import Archive, Step
from results.cells import Cell, Sheet
from results.grid import DASH, Entry, Grid

HEADINGS = ("pre-training h", "evaluations h", "total h", "pre-training FLOPs", "images/s", "peak GiB")
LEGEND = ("Cost of one seed (mean over seeds), from the records: device-hours of pre-training with what it is built from (tokenizer, parent), of the shown "
          "evaluations, and together; FLOPs of the training steps (multiply and add = 2); images per second of the pre-training; highest memory of any job.")


@dataclass(frozen=True)
class Cost:
    """Cost of one score (one pair of seeds). Hours are device-hours, None where a record is gone or does not say.

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
        """Pre-training and this evaluation."""
        return None if self.pretrain_hours is None or self.eval_hours is None else self.pretrain_hours + self.eval_hours

    @property
    def shared_hours(self) -> float | None:
        """This evaluation and its part of the pre-training."""
        return None if self.pretrain_hours is None or self.eval_hours is None else self.pretrain_hours / self.evaluations + self.eval_hours

    def as_row(self) -> dict[str, Any]:
        """Fields of `table --cost --format json`."""
        return {f"cost_{k}": v for k, v in {**asdict(self), "total_hours": self.total_hours, "shared_hours": self.shared_hours}.items()}


def cost_of(result: Result, archive: Archive, evaluations: int = 1) -> Cost:
    """Cost of one score."""
    evaluation, *before = archive.steps(result) or (Step("evaluation", result.key, None, None),)
    pretraining = next((s for s in before if s.role == "checkpoint" and s.record), None)
    seen, seconds = ((pretraining.record or {}).get("images_seen"), (pretraining.record or {}).get("wall_s")) if pretraining else (None, None)
    known = bool(before)
    return Cost(
        _sum(before, "device_hours") if known else None, _sum([evaluation], "device_hours"), max(1, evaluations), _sum([evaluation, *before], "flops"),
        _sum(before, "flops") if known else None, seen / seconds if seen and seconds else None,
        max((s.record["peak_memory_bytes"] for s in (evaluation, *before) if s.record and s.record["peak_memory_bytes"]), default=None),
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
    """The cost columns of a method's row."""
    by_eval = {c.eval: cell_cost(c, sheet, archive) for c in sheet.cells.values() if c.method == method and c.results}
    if not by_eval:
        return tuple(Entry(DASH) for _ in HEADINGS)

    def column(name: str) -> list[Any]:
        return [cost[f"cost_{name}"] for cost in by_eval.values()]

    def mean(name: str) -> float | None:
        values = column(name)
        return None if any(v is None for v in values) else statistics.fmean(values)

    before, after, memory = mean("pretrain_hours"), column("eval_hours"), [v for v in column("peak_memory_bytes") if v is not None]
    evaluated = None if any(v is None for v in after) else sum(after)
    total = None if before is None or evaluated is None else before + evaluated
    flops, speed = mean("pretrain_flops"), mean("images_per_s")
    texts = [hours(before), hours(evaluated), hours(total), DASH if flops is None else f"{flops:.2e}" if flops else "0",
             DASH if speed is None else f"{speed:.0f}", f"{max(memory) / 2**30:.1f}" if memory else DASH]
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
