"""What a table says before any format: numbers, marks, captions and footnotes of a sheet, decided once.

`results.beside` makes the same of a paper's table; `results.formats` only spells it.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from harness.spec import Metric
from results.cells import Cell, Sheet
from results.ranks import ranks_of, sentence
from results.reference.remarks import remarks_on
from results.statistics import BOOTSTRAP_FROM

DASH = "–"


@dataclass(frozen=True)
class Entry:
    """Text of one field of a table, with the marks of its footnotes; `bold` for the best of a column, `beside` is a published number.

    `signs`: † for not distinguishable from the best, * for stale; `faint`: a single seed, shown grey where a format has grey; `hint` is what lies
    behind the text, `link` the place on the same page that says more.
    """

    text: str
    marks: tuple[str, ...] = ()
    bold: bool = False
    beside: str = ""
    signs: tuple[str, ...] = ()
    faint: bool = False
    hint: str = ""
    link: str = ""


@dataclass(frozen=True)
class Grid:
    """What a table says, before any format: the first `stub` fields of a row say what the row is, numbers follow. `below`: remarks on the whole."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[tuple[str, str], ...]
    stub: int = 1
    below: tuple[str, ...] = ()


class Notes:
    """Footnotes of a table: equal texts share a mark (a, b, ... z, aa, ab, ...)."""

    def __init__(self) -> None:
        self.marks: dict[str, str] = {}

    def mark(self, text: str) -> str:
        """The mark of a text, a new one when it is new."""
        if text not in self.marks:
            number, name = len(self.marks) + 1, ""
            while number:
                number, digit = divmod(number - 1, 26)
                name = string.ascii_lowercase[digit] + name
            self.marks[text] = name
        return self.marks[text]

    def listed(self) -> tuple[tuple[str, str], ...]:
        """(mark, text) of all notes in the order of their marks."""
        return tuple((mark, text) for text, mark in self.marks.items())


def grid(sheet: Sheet, spread: str = "std") -> Grid:
    """Decide captions, numbers, marks and bold type of a sheet. `spread`: std or ci95, what stands behind a mean."""
    one_unit = len({metric.unit for _, metric in sheet.columns}) == 1
    scored = [c for c in sheet.cells.values() if c.value is not None]
    show_n = any(c.n > 1 for c in scored)
    notes, rows = Notes(), []
    bold = [cell for name, metric in sheet.columns for cell in _best([sheet.cell(m, name, metric) for m in sheet.methods], metric)]
    for method in sheet.methods:
        cells = [sheet.cell(method, name, metric) for name, metric in sheet.columns]
        # What deviates in the whole row is marked at its name.
        everywhere = [d for d in cells[0].deviations if all(d in c.deviations for c in cells)]
        row = [Entry(method, tuple(notes.mark(_deviates(d)) for d in everywhere))]
        for cell in cells:
            texts = [_deviates(d) for d in cell.deviations if d not in everywhere] + list(cell.remarks)
            if cell.reason:
                texts.insert(0, _missing(cell))
            beside = ""
            if cell.published is not None:
                beside = f"published {cell.published.text}"
                texts += [f"published: {cell.published.source}", *remarks_on(cell.published)]
            best = any(cell is b for b in bold)
            texts += [f"stale: {s}" for s in cell.stale]
            signs = (*(("†",) if cell.undecided and not best else ()), *(("*",) if cell.stale else ()))
            row.append(Entry(number(cell, show_n, 1, spread), tuple(notes.mark(t) for t in texts), best, beside, signs, cell.n_pretrain == 1, hint(cell)))
        rows.append(tuple(row))
    header = ("method", *(_heading(name, metric, one_unit) for name, metric in sheet.columns))
    return Grid(caption(sheet, scored, one_unit, spread), header, tuple(rows), notes.listed(), below=remarks(sheet))


def number(cell: Cell, show_n: bool, digits: int = 1, spread: str = "std") -> str:
    """"16.1 ± 0.4 (n=3)" or "16.1 (15.1 to 17.1) (n=3)"; with several fine-tuning seeds "(n=3×2)"; a dash when there is no score."""
    if cell.value is None:
        return DASH
    if abs(cell.value) >= 1e9:  # no score: hundreds of digits would bury the table
        return f"{cell.value:.3g}" + (f" (n={cell.n})" if show_n else "")
    shown = f" ± {cell.std:.{digits}f}" if cell.std is not None else ""
    if spread == "ci95":
        shown = f" ({cell.ci95[0]:.{digits}f} to {cell.ci95[1]:.{digits}f})" if cell.ci95 else ""
    balanced = cell.n == cell.n_pretrain * cell.n_eval
    count = str(cell.n) if cell.n_eval == 1 else f"{cell.n_pretrain}×{cell.n_eval}" if balanced else f"{cell.n} of {cell.n_pretrain}×{cell.n_eval}"
    return f"{cell.value:.{digits}f}{shown}" + (f" (n={count})" if show_n else "")


def hint(cell: Cell) -> str:
    """What lies behind a number, in one line: its interval, its seeds, its comparison with the best, the keys of its records."""
    if cell.value is None:
        return ""
    said = [f"95 % CI {cell.ci95[0]:.2f} to {cell.ci95[1]:.2f}"] if cell.ci95 else []
    said.append(("seeds " if len(cell.seeds) > 1 else "seed ") + ", ".join(f"{seed}: {score:.2f}" for seed, score in cell.seeds.items()))
    said += [f"against the best p = {cell.p_best:.2g} after Holm"] if cell.p_best is not None else []
    said += [f"records {', '.join(r.key for r in cell.results)}"] if any(r.key for r in cell.results) else []
    return "; ".join(said)


def remarks(sheet: Sheet) -> tuple[str, ...]:
    """What the seeds of a sheet allow to say, each as a line under the table: interval, layers of seeds, dagger, power."""
    stale = ["Starred: stale, may not come out again, since what it was measured with has changed."] if any(c.stale for c in sheet.cells.values()) else []
    cells = [c for c in sheet.cells.values() if c.n_pretrain > 1]
    if not cells:
        layers = fine_tuning_spread(sheet)
        return (*stale, *([f"Standard deviation between fine-tuning seeds on this pre-training: {layers}."] if layers else []))
    found = [*stale, _intervals(sorted({c.n_pretrain for c in cells if c.ci95}))]
    if any(c.n_eval == 1 for c in cells):
        found.append("With one fine-tuning seed on each pre-training, the spread holds the noise of both.")
    layers = fine_tuning_spread(sheet)
    if layers:
        found.append(f"Standard deviation between fine-tuning seeds on one pre-training, pooled over methods: {layers}.")
    tested = [c for c in sheet.cells.values() if c.undecided is not None]
    if any(c.undecided for c in tested):
        found.append("†: not distinguishable from the best of its column (paired t-test by pre-training seed, Holm's correction over all its pairs, 5 %).")
    found += power([c for c in sheet.cells.values() if (c.eval, c.metric) in {(t.eval, t.metric) for t in tested}])
    ranks = ranks_of(sheet)
    if ranks is not None and len(ranks.evaluators) > 2:
        found.append(sentence(ranks))
    return tuple(found)


def power(tested: Sequence[Cell]) -> list[str]:
    """Which gap the tests of these columns would find. Where it is above 100 %, or cannot be computed: that they would find none."""
    gaps = {f"{c.eval} {c.metric.name}": c.detectable for c in tested if c.detectable is not None and not (c.metric.unit == "%" and c.detectable > 100)}
    never = [n for n in dict.fromkeys(f"{c.eval} {c.metric.name}" for c in tested) if n not in gaps]
    listed = ", ".join(f"{name} {gap:.1f}" for name, gap in gaps.items())
    said = [f"Power: the gap that this test would find in 4 of 5 repetitions with these seeds, at Holm's strictest step: {listed}."] if gaps else []
    return [*said, *([f"Power: no gap that there can be would this test find in 4 of 5 repetitions with these seeds: {', '.join(never)}."] if never else [])]


def fine_tuning_spread(sheet: Sheet) -> str:
    """The other layer of seeds, column by column: the root mean square of the methods' spreads; "" with single fine-tuning seeds."""
    found = []
    for name, metric in sheet.columns:
        spreads = [c.std_eval for m in sheet.methods if (c := sheet.cell(m, name, metric)).std_eval is not None]
        if spreads:
            found.append(f"{name} {metric.name} {(sum(s * s for s in spreads) / len(spreads)) ** 0.5:.1f}")
    return ", ".join(found)


def _intervals(counts: Sequence[int]) -> str:
    """How to get the 95 % interval from mean and standard deviation, for each n."""
    from scipy.stats import t

    factors = ", ".join(f"{float(t.ppf(0.975, n - 1)) / n**0.5:.2f} at n = {n}" for n in counts if n < BOOTSTRAP_FROM)
    said = [f"mean ± standard deviation × {factors} (Student's t)"] if factors else []
    said += [f"BCa bootstrap from n = {BOOTSTRAP_FROM} on"] if counts[-1] >= BOOTSTRAP_FROM else []
    return f"95 % confidence interval of the mean: {'; '.join(said)}."


def caption(sheet: Sheet, scored: Sequence[Cell], one_unit: bool, spread: str = "std") -> str:
    """The protocol's own words, then protocol, backbone, data, tuning, what the numbers are, n and unit: one line of plain text."""
    parts = [text[:1].upper() + text[1:].rstrip(".") + "." for text in sheet.captions]
    parts.append(f"Protocol: {sheet.protocol}; backbone: {sheet.backbone}; data: {sheet.data.removeprefix('data ')}; tuning: {sheet.tuning}.")
    counts = sorted({c.n_pretrain for c in scored})
    if counts and counts[-1] > 1:
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        shown = "± standard deviation" if spread == "std" else "(95 % confidence interval)"
        parts.append(f"Mean {shown} over pre-training seeds, n = {span}"
                     f"{' (× fine-tuning seeds)' if any(c.n_eval > 1 for c in scored) else ''}; bold: best of a column, never at n = 1.")
    elif any(c.n_eval > 1 for c in scored):
        parts.append("Mean over fine-tuning seeds of one pre-training seed, n = 1 (× fine-tuning seeds): no spread can be given.")
    elif scored:
        parts.append("One seed, n = 1: no spread can be given.")
    if one_unit:
        parts.append(f"Unit: {sheet.columns[0][1].unit}.")
    return " ".join(parts)


def _best(cells: Sequence[Cell], metric: Metric) -> list[Cell]:
    """Cells to print bold: the best as printed, if there is another to compare with, and only those with more than one seed."""
    scored = {c.method: round(c.value, 1) for c in cells if c.value is not None}
    if len(scored) < 2:
        return []
    top = max(scored.values()) if metric.higher_is_better else min(scored.values())
    return [c for c in cells if scored.get(c.method) == top and c.n_pretrain > 1]


def _heading(evaluator: str, metric: Metric, one_unit: bool) -> str:
    name = f"{evaluator} {metric.name}"
    return f"{name}{'' if one_unit else f' ({metric.unit})'}{'' if metric.higher_is_better else ' ↓'}"


def _deviates(text: str) -> str:
    return f"deviates from the recipe: {text}"


def _missing(cell: Cell) -> str:
    if cell.value is not None:
        return f"not complete: {cell.reason}"
    return cell.reason if cell.status == "missing" or cell.reason.startswith(cell.status) else f"{cell.status}: {cell.reason}"
