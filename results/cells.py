"""From results of single seeds to the cells of tables: which results count, their mean, spread and confidence interval.

A sheet is what may stand in one table: one protocol, backbone, data and tuning. Within a sheet there is a cell for every method and
every metric of every evaluator, also for those that were never run, so that a missing number always says why it is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.collect import Result
from harness.spec import Metric
from results.reference.published import Published
from results.statistics import compare, summarise, undecided

SheetKey = tuple[str, str, str, str]
WORST_FIRST = ("failed", "running", "interrupted", "missing", "skipped", "done")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Cell:
    """One (method, evaluator, metric) over its seeds.

    `value` is the mean over pre-training seeds of the means over fine-tuning seeds, None when there is no score; `seeds` has these means. `std`
    (divisor n - 1) and `ci95` are over pre-training seeds, None below two; `std_eval` is the spread of fine-tuning seeds on one pre-training.
    `n` counts results, `n_pretrain` and `n_eval` the distinct seeds of each layer. `p_best` is the Holm-corrected p of the paired comparison with the
    best of the column, `undecided` whether the two cannot be told apart (None: the best itself, or one of them has one seed); `detectable` is the gap
    that the column's seeds would find. `status` is that of the worst seed, so that "done" means complete; `reason` says why something is missing.
    `remarks` is what a reader must know besides, `stale` what has changed since it was measured. `results` are the scores behind it, `published` the
    published number of the same protocol.
    """

    method: str
    eval: str
    metric: Metric
    protocol: str
    backbone: str
    data: str
    tuning: str
    value: float | None = None
    n: int = 0
    n_pretrain: int = 0
    n_eval: int = 0
    std: float | None = None
    ci95: tuple[float, float] | None = None
    std_eval: float | None = None
    seeds: Mapping[int, float] = field(default_factory=dict, repr=False)
    p_best: float | None = None
    undecided: bool | None = None
    detectable: float | None = None
    deviations: tuple[str, ...] = ()
    status: str = "missing"
    reason: str = NOT_RUN
    remarks: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    results: tuple[Result, ...] = field(default=(), repr=False)
    published: Published | None = None

    @property
    def example(self) -> Result | None:
        """One of the scores behind it: the last seed's."""
        return self.results[-1] if self.results else None

    def as_row(self) -> dict[str, Any]:
        """The object of `table --format json`. `published` is null where no published number has the same protocol."""
        return {
            "method": self.method, "eval": self.eval, "metric": self.metric.name, "unit": self.metric.unit, "value": self.value,
            "n": self.n, "n_pretrain": self.n_pretrain, "n_eval": self.n_eval, "std": self.std, "ci95": list(self.ci95) if self.ci95 else None,
            "std_eval": self.std_eval, "p_best": self.p_best, "undecided": self.undecided, "detectable": self.detectable,
            "protocol": self.protocol, "backbone": self.backbone, "data": self.data, "tuning": self.tuning,
            "published": self.published.value if self.published else None, "published_source": self.published.source if self.published else None,
            "deviations": list(self.deviations), "status": self.status, "reason": self.reason,
            "remarks": list(self.remarks), "stale": list(self.stale),
        }


@dataclass(frozen=True)
class Sheet:
    """One table: methods in rows, (evaluator, metric) in columns, all cells present. `captions` are those of the protocol."""

    protocol: str
    backbone: str
    data: str
    tuning: str
    methods: tuple[str, ...]
    columns: tuple[tuple[str, Metric], ...]
    cells: Mapping[tuple[str, str, str], Cell] = field(repr=False)
    captions: tuple[str, ...] = ()

    def cell(self, method: str, evaluator: str, metric: Metric) -> Cell:
        """The cell of a row and a column."""
        return self.cells[method, evaluator, metric.name]


def sheets(results: Iterable[Result], methods: Sequence[str] = (), evals: Sequence[str] = ()) -> list[Sheet]:
    """Sort results into sheets. Rows and columns come in the order of `methods` and `evals`, then as they first appear; so do sheets."""
    grouped: dict[SheetKey, list[Result]] = {}
    for result in results:
        grouped.setdefault((result.protocol, result.backbone, result.data, result.tuning), []).append(result)
    return [_sheet(key, members, methods, evals) for key, members in grouped.items()]


def _sheet(key: SheetKey, results: Sequence[Result], first_methods: Sequence[str], first_evals: Sequence[str]) -> Sheet:
    protocol, backbone, data, tuning = key
    methods = _ordered((r.method for r in results), first_methods)
    evals = _ordered((r.eval for r in results), first_evals)
    columns = tuple((name, metric) for name in evals for metric in _metrics(r for r in results if r.eval == name))
    cells, counted_by, by_cell = {}, dict[tuple[str, str], list[Result]](), dict[tuple[str, str], list[Result]]()
    for result in results:
        by_cell.setdefault((result.method, result.eval), []).append(result)
    for method in methods:
        for name in evals:
            counted, remarks = select(by_cell.get((method, name), ()))
            counted_by[method, name] = counted
            for metric in (m for e, m in columns if e == name):
                blank = Cell(method, name, metric, protocol, backbone, data, tuning, remarks=remarks)
                cells[method, name, metric.name] = _filled(blank, counted) if counted else blank
    for name in evals:  # rows of a column must stand on the same evaluator and data
        column = [r for method in methods for r in counted_by[method, name] if r.status == "done"]
        newest = max(column, key=_precedence, default=None)
        other = {r.method for r in column if newest is not None and r.ground != newest.ground}
        for (method, evaluator, metric), cell in list(cells.items()):
            if evaluator == name and method in other:
                cells[method, evaluator, metric] = replace(cell, remarks=(*cell.remarks, "another evaluator setting or data than the rest of the column"))
    for name, metric in columns:
        cells |= _compared([cells[method, name, metric.name] for method in methods])
    return Sheet(protocol, backbone, data, tuning, methods, columns, cells, tuple(dict.fromkeys(r.caption for r in results if r.caption)))


def _ordered(found: Iterable[str], first: Sequence[str]) -> tuple[str, ...]:
    """Distinct names that were found: those of `first` in its order, then the others as they came."""
    names = dict.fromkeys(found)
    return tuple(dict.fromkeys([*(n for n in first if n in names), *names]))


def _metrics(results: Iterable[Result]) -> tuple[Metric, ...]:
    """Columns of an evaluator: as declared; metrics of records that no declaration covers come after them."""
    found: dict[str, Metric] = {}
    scored: list[str] = []
    for result in results:
        for metric in result.columns:
            found.setdefault(metric.name, metric)
        scored.extend(result.metrics)
    for name in scored:
        found.setdefault(name, Metric(name))
    return tuple(found.values()) or (Metric("score"),)


def select(results: Sequence[Result]) -> tuple[list[Result], tuple[str, ...]]:
    """The results of one method and evaluator that count, one for each pair of seeds, and remarks on those that were left out.

    The same job found in several runs folders (equal key) counts once. Seeds are averaged over equal settings only: those of the newest job
    that has a record (without any record, of the newest job); what was made with other settings is left out.
    """
    by_job: dict[tuple[str, ...], Result] = {}
    for index, result in enumerate(results):
        job = (result.key,) if result.key else ("no key", str(index))
        by_job[job] = max(by_job.get(job, result), result, key=_precedence)
    by_seeds: dict[tuple[int, int], list[Result]] = {}
    newest = max(by_job.values(), key=_precedence, default=None)
    counted, left_out = [], [r for r in by_job.values() if newest is not None and r.settings != newest.settings]
    for result in by_job.values():
        if newest is not None and result.settings == newest.settings:
            by_seeds.setdefault((result.seed, result.eval_seed), []).append(result)
    for _, rivals in sorted(by_seeds.items()):
        best = max(rivals, key=_precedence)
        counted.append(best)
        left_out += [r for r in rivals if r is not best]
    remarks = []
    if any(r.status == "done" for r in left_out):
        remarks.append("older results of other settings left out")
    remarks += dict.fromkeys(f"left out, other settings: {r.status}{': ' + r.reason if r.reason else ''}" for r in left_out if r.status == "failed")
    return counted, tuple(remarks)


def _precedence(result: Result) -> tuple[bool, str]:
    return result.status == "done", result.start


def _filled(blank: Cell, results: Sequence[Result]) -> Cell:
    """A cell with the mean and spread of its seeds, the worst status, and what is missing."""
    scores: dict[tuple[int, int], float] = {}
    problems: dict[tuple[str, str], list[Result]] = {}
    scored = []
    for result in results:
        score = result.metrics.get(blank.metric.name)
        if result.status == "done" and score is not None and math.isfinite(score):
            scores[result.seed, result.eval_seed] = float(score)
            scored.append(result)
        else:
            problems.setdefault(_problem(result, score), []).append(result)
    over = summarise(scores)
    status = min((s for s, _ in problems), key=_badness, default="done")
    parts = [text if not scores and len(problems) == 1 else f"{_seeds(hit, results)}: {text}" for (_, text), hit in problems.items()]
    deviating: dict[str, list[Result]] = {}
    for result in results:
        for text in dict.fromkeys(result.deviations):
            deviating.setdefault(text, []).append(result)
    deviations = tuple(t if len(hit) == len(results) else f"{t} ({_seeds(hit, results)})" for t, hit in deviating.items())
    return Cell(
        blank.method, blank.eval, blank.metric, blank.protocol, blank.backbone, blank.data, blank.tuning,
        value=over.mean, n=over.n, n_pretrain=len(over.by_seed), n_eval=over.n_eval, std=over.std, ci95=over.ci95, std_eval=over.std_eval,
        seeds=over.by_seed, deviations=deviations, status=status, reason="; ".join(parts), remarks=blank.remarks, results=tuple(scored),
    )


def _compared(column: Sequence[Cell]) -> dict[tuple[str, str, str], Cell]:
    """The cells of a column, each compared with the best."""
    found = compare({c.method: c.seeds for c in column}, column[0].metric.higher_is_better)
    by_method = {c.method: c for c in column}
    if found is None or by_method[found.best].n_pretrain < 2:
        return {}
    told = {m: p for m, p in found.p.items() if by_method[m].n_pretrain > 1}
    return {(c.method, c.eval, c.metric.name): replace(
        c, detectable=found.detectable, p_best=told.get(c.method), undecided=undecided(told[c.method]) if c.method in told else None) for c in column}


def _problem(result: Result, score: float | None) -> tuple[str, str]:
    """Status and reason of a result that gives no score."""
    if result.status != "done":
        return result.status, " ".join((result.reason or (NOT_RUN if result.status == "missing" else result.status)).split())
    return "failed", "the record has no such metric" if score is None else f"the score is not finite ({score})"


def _badness(status: str) -> int:
    return WORST_FIRST.index(status) if status in WORST_FIRST else 0


def seeds_of(sheet: Sheet) -> dict[str, str]:
    """Seeds with a score: the smallest and largest number over a method's cells."""
    counts: dict[str, set[int]] = {m: set() for m in sheet.methods}
    for cell in sheet.cells.values():
        if cell.results:
            counts[cell.method].add(cell.n)
    return {m: "none" if not n else str(min(n)) if len(n) == 1 else f"{min(n)} to {max(n)}" for m, n in counts.items()}


def _seeds(results: Sequence[Result], among: Sequence[Result]) -> str:
    """"seed 2", or "seeds 0/0, 0/1" (pre-training/fine-tuning) where fine-tuning seeds vary."""
    layers = len({r.eval_seed for r in among}) > 1
    names = [f"{r.seed}/{r.eval_seed}" if layers else str(r.seed) for r in results]
    return f"seed{'s' if len(names) > 1 else ''} {', '.join(names)}"
