"""A paper's table with what was measured here beside each number: difference, verdict, and in footnotes what a reader must know.

`fill` finds what stands in each field, `grid_of` says it in words for Markdown, LaTeX and HTML, `rows_of` as objects for JSON and CSV.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from harness.collect import Result
from harness.spec import Metric, UserError, suggest
from results.cells import Cell, sheets
from results.grid import DASH, Entry, Grid, Notes, number
from results.reference import beit_tables, mae_tables
from results.reference.names import EVALUATORS, METHODS, counterpart
from results.reference.paper_table import Column, PaperTable, Row
from results.reference.published import LOWER_IS_BETTER, METRICS, SOURCES, Published
from results.reference.remarks import remarks_on
from results.staleness import Staleness, with_stale
from results.standing import Standing, choices, compare

LAYOUTS = {table.name: table for table in (*beit_tables.TABLES, *mae_tables.TABLES)}
EMPTY: dict[str, Any] = dict.fromkeys(Cell("", "", Metric(""), "", "", "", "").as_row())
UNITS = {"hours": "h", "speedup-x": "x", "FLOPs-x": "x"}
SPREAD = ("measured: mean ± standard deviation over n pre-training seeds, its difference from the published number, and whether that lies within the spread, "
          "which is where one further run would fall with 95 % probability (Student's t: mean ± t s √(1 + 1/n), plus half of the last published digit); "
          "no verdict at n = 1 or where a footnote names a difference of protocol")


@dataclass(frozen=True)
class Field:
    """A field of a paper's table. `standing` is what is measured beside the number, `kept_out` what has its name and cannot stand there."""

    row: Row
    column: Column
    number: Published | None
    standing: Standing | None = None
    kept_out: Standing | None = None


def paper_table(name: str) -> PaperTable:
    """The table behind a name of --layout.

    Raises:
        UserError: there is none.
    """
    if name not in LAYOUTS:
        raise UserError(f"--layout: unknown name {name!r}: {suggest(name, LAYOUTS)}")
    return LAYOUTS[name]


def fill(table: PaperTable, results: Iterable[Result], staleness: Staleness | None = None) -> list[Field]:
    """All fields of a table, row by row, each with the measured value that comes closest to its protocol. `staleness` stars what is stale."""
    cells = measured(results, staleness)
    fields = []
    for row in table.rows:
        for column in table.columns:
            published = table.number(row, column)
            found = [s for s in (compare(cell, published) for cell in cells) if s is not None] if published is not None else []
            found.sort(key=lambda s: (len(s.barred) > 0, len(s.differences), len(s.notes), -s.cell.n_pretrain, s.cell.status != "done"))
            best = found[0] if found else None
            fields.append(Field(row, column, published, best if best and not best.barred else None, best if best and best.barred else None))
    return fields


def measured(results: Iterable[Result], staleness: Staleness | None = None) -> list[Cell]:
    """Cells of all settings that were measured, newest first: unlike in an ordinary table, 300 and 800 epochs of a method both count."""
    grouped: dict[tuple[str, ...], list[Result]] = {}
    for r in sorted(results, key=lambda r: r.start, reverse=True):
        if r.lineage:
            grouped.setdefault((r.method, r.eval, r.protocol, r.backbone, r.data, r.tuning, r.settings), []).append(r)
    found = [sheet for members in grouped.values() for sheet in sheets(members)]
    return [cell for sheet in found for cell in (with_stale(sheet, staleness) if staleness else sheet).cells.values()]


def grid_of(table: PaperTable, fields: list[Field]) -> Grid:
    """The table in words."""
    notes, rows, width = Notes(), [], len(table.columns)
    lines = [fields[i : i + width] for i in range(0, len(fields), width)]
    for line in lines:
        row = line[0].row
        if row.section:
            rows.append((Entry(row.section), *[Entry("")] * (len(table.stub) - 1 + 2 * width + len(table.asides))))
        remarks = {f.column.heading: [*_origin(table, f), *remarks_on(f.number)] for f in line if f.number is not None}
        shared = [r for r in next(iter(remarks.values()), []) if all(r in texts for texts in remarks.values())]
        entries = [Entry(row.label, tuple(notes.mark(r) for r in shared)), *map(Entry, row.texts)]
        for f in line:
            own = [r for r in remarks.get(f.column.heading, []) if r not in shared]
            entries.append(Entry(f.number.text if f.number else DASH, tuple(notes.mark(r) for r in own)))
            entries.append(_measured(f, notes))
        rows.append((*entries, *map(Entry, row.aside or [""] * len(table.asides))))
    header = (*table.stub, *(h for c in table.columns for h in (c.heading + _arrow(c, fields), "measured")), *table.asides)
    return Grid(caption(table, fields), header, tuple(rows), notes.listed(), len(table.stub))


def caption(table: PaperTable, fields: list[Field]) -> str:
    """Whose table it is, what the columns are, and when nothing is measured that."""
    said = f"Table {table.table} of {SOURCES[table.paper]}: {table.title}. Published numbers, and beside each what was measured here. "
    if any(f.standing for f in fields):
        return f"{said}{SPREAD[0].upper()}{SPREAD[1:]}."
    kept = " (what was measured under the same names differs too much: see the footnotes)" if any(f.kept_out for f in fields) else ""
    return f"{said}Nothing of the same protocol is measured yet{kept}."


def _measured(field: Field, notes: Notes) -> Entry:
    """"83.5 ± 0.1 (n=3), −0.1 within", with a mark for each difference; a dash where nothing stands, with the reason if there is one."""
    standing = field.standing
    if standing is None or standing.difference is None or field.number is None:
        return Entry(DASH, (notes.mark(_kept_out(field.kept_out)),) if field.kept_out else ())
    cell, digits = standing.cell, max(1, field.number.digits)
    difference = f"{standing.difference:+.{digits}f}".replace("-", "−")
    texts = [*standing.notes, *standing.differences, *choices(cell), *cell.remarks, *([f"not complete: {cell.reason}"] if cell.reason else [])]
    marks = tuple(notes.mark(t) for t in (*texts, *(f"stale: {s}" for s in cell.stale)))
    said = f"{number(cell, True, digits)}, {difference} {standing.verdict.partition(':')[0]}"
    return Entry(said, marks, signs=("*",) * bool(cell.stale), faint=cell.n_pretrain == 1)


def _kept_out(standing: Standing) -> str:
    return f"measured {standing.cell.value:.1f} by {standing.cell.method} on {standing.cell.eval}, not shown here: {'; '.join(standing.barred)}"


def _origin(table: PaperTable, field: Field) -> tuple[str, ...]:
    """A remark on a number that the file has under another table."""
    assert field.number is not None
    return () if field.number.table == table.table else (f"the number of {field.number.source}",)


def _arrow(column: Column, fields: list[Field]) -> str:
    """An arrow down where less is better in the whole column."""
    metrics = {f.number.metric for f in fields if f.column is column and f.number is not None}
    return " ↓" if metrics and metrics <= set(LOWER_IS_BETTER) else ""


def rows_of(table: PaperTable, fields: list[Field]) -> list[dict[str, Any]]:
    """One object per field that has a published number: the keys of an ordinary table, and how the measured value stands to the number.

    `method`, `eval` and `backbone` are ours where something is measured. Else they are the plugins that would fill the field, as far as there are
    any, and the paper's words.
    """
    found = []
    for f in fields:
        if f.number is None:
            continue
        n, s = f.number, f.standing
        method, evaluator = counterpart(METHODS, n), counterpart(EVALUATORS, n)
        cell = s.cell.as_row() if s else EMPTY | {
            "method": next(iter(method.names if method else ()), n.method), "eval": next(iter(evaluator.names if evaluator else ()), n.eval),
            "backbone": n.backbone, "n": 0, "n_pretrain": 0, "n_eval": 0, "deviations": [], "remarks": [], "stale": [], "status": "missing",
            "reason": _kept_out(f.kept_out) if f.kept_out else "not run",
            "metric": METRICS[n.metric] or n.metric, "unit": UNITS.get(n.metric, "%"),
        }
        found.append({
            **cell, "remarks": [*cell["remarks"], *((*choices(s.cell), *s.notes) if s else ())], "published": n.value, "published_source": n.source,
            "published_text": n.text, "published_method": n.method, "published_variant": n.variant, "published_backbone": n.backbone,
            "published_data": n.pretrain_data, "published_epochs": n.epochs, "published_eval": n.eval, "layout": table.name,
            "row": " ".join((f.row.label, *(t for t in f.row.texts if t != "-"))), "column": f.column.heading,
            "difference": s.difference if s else None, "spread": list(s.spread) if s and s.spread else None, "verdict": s.verdict if s else None,
            "differences": list(s.differences) if s else [], "notes": list(remarks_on(n)),
        })
    return found
