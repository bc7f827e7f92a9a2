"""Tables as text: Markdown for the terminal, LaTeX (booktabs), HTML, CSV and JSON.

`grid` decides once what every cell, caption and footnote of a sheet says (`results.beside` does it for a paper's table); the formats only spell it.
Each format escapes what it would misread.
"""

from __future__ import annotations

import html
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.spec import Metric
from results.cells import Cell, Sheet
from results.reference.remarks import remarks_on

DASH = "–"
PAIRS, LISTS = {"ci95", "spread"}, {"deviations", "remarks", "differences", "notes"}  # fields of rows that CSV has to flatten
APART = "{} tables: results of different protocols, backbones, data or tuning are never put into one"


@dataclass(frozen=True)
class Entry:
    """Text of one field of a table, with the marks of its footnotes; `bold` for the best of a column, `beside` is a published number."""

    text: str
    marks: tuple[str, ...] = ()
    bold: bool = False
    beside: str = ""


@dataclass(frozen=True)
class Grid:
    """What a table says, before any format: the first `stub` fields of a row say what the row is, numbers follow."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[tuple[str, str], ...]
    stub: int = 1


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


def grid(sheet: Sheet) -> Grid:
    """Decide captions, numbers, marks and bold type of a sheet."""
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
            row.append(Entry(number(cell, show_n), tuple(notes.mark(t) for t in texts), cell in bold, beside))
        rows.append(tuple(row))
    header = ("method", *(_heading(name, metric, one_unit) for name, metric in sheet.columns))
    return Grid(caption(sheet, scored, one_unit), header, tuple(rows), notes.listed())


def number(cell: Cell, show_n: bool, digits: int = 1) -> str:
    """"16.1 ± 0.4 (n=3)"; with several fine-tuning seeds "(n=3×2)"; a dash when there is no score."""
    if cell.value is None:
        return DASH
    spread = f" ± {cell.std:.{digits}f}" if cell.std is not None else ""
    balanced = cell.n == cell.n_pretrain * cell.n_eval
    count = str(cell.n) if cell.n_eval == 1 else f"{cell.n_pretrain}×{cell.n_eval}" if balanced else f"{cell.n} of {cell.n_pretrain}×{cell.n_eval}"
    return f"{cell.value:.{digits}f}{spread}" + (f" (n={count})" if show_n else "")


def caption(sheet: Sheet, scored: Sequence[Cell], one_unit: bool) -> str:
    """The protocol's own words, then protocol, backbone, data, tuning, what the numbers are, n and unit: one line of plain text."""
    parts = [text[:1].upper() + text[1:].rstrip(".") + "." for text in sheet.captions]
    parts.append(f"Protocol: {sheet.protocol}; backbone: {sheet.backbone}; data: {sheet.data.removeprefix('data ')}; tuning: {sheet.tuning}.")
    counts = sorted({c.n_pretrain for c in scored})
    if counts and counts[-1] > 1:
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        parts.append(f"Mean ± standard deviation over pre-training seeds, n = {span}"
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


# ------------------------------------------------------------------------------------------------------------- formats


Rows = Sequence[Mapping[str, Any]]


def markdown(grids: Sequence[Grid], rows: Rows) -> str:
    """GitHub tables, readable on a terminal."""
    from tabulate import tabulate

    def field(entry: Entry) -> str:
        text = f"**{_markdown(entry.text)}**" if entry.bold else _markdown(entry.text)
        return text + _markdown(entry.beside and f", {entry.beside}") + "".join(f" [{m}]" for m in entry.marks)

    blocks = [APART.format(len(grids)) + "."] if len(grids) > 1 else []
    for table in grids:
        align = (*["left"] * table.stub, *["right"] * (len(table.header) - table.stub))
        fields = [list(map(field, row)) for row in table.rows]
        body = tabulate(fields, list(map(_markdown, table.header)), "github", colalign=align, disable_numparse=True)
        blocks += [_markdown(table.caption), body]
        if table.notes:
            blocks.append("\n".join(f"- [{mark}] {_markdown(text)}" for mark, text in table.notes))
    return "\n\n".join(blocks) + "\n"


def _markdown(text: str) -> str:
    # Single underscores inside words are no markup there, and names are full of them.
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}", "[": "{[}", "]": "{]}",
    "±": r"$\pm$", "√": r"$\surd$", "−": "$-$", "×": r"$\times$", "↓": r"$\downarrow$", "–": r"\textendash{}",
}


def latex(grids: Sequence[Grid], rows: Rows) -> str:
    r"""Floating tables for \usepackage{booktabs}."""

    def field(entry: Entry) -> str:
        text = rf"\textbf{{{_latex(entry.text)}}}" if entry.bold else _latex(entry.text)
        return text + _latex(entry.beside and f", {entry.beside}") + (rf"\textsuperscript{{{','.join(entry.marks)}}}" if entry.marks else "")

    blocks = [f"% {APART.format(len(grids))}."] if len(grids) > 1 else []
    for table in grids:
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.caption)}}}",
                 rf"\begin{{tabular}}{{{'l' * table.stub}{'r' * (len(table.header) - table.stub)}}}",
                 r"\toprule", " & ".join(map(_latex, table.header)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(field, row)) + r" \\" for row in table.rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\footnotesize \textsuperscript{{{mark}}} {_latex(text)}" for mark, text in table.notes]
        blocks.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(blocks) + "\n"


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(c, c) for c in " ".join(text.split()))
    return re.sub("-(?=-)", "-{}", escaped)  # two hyphens of a flag would join into a dash


def web(grids: Sequence[Grid], rows: Rows) -> str:
    """An HTML fragment of <table> elements with captions; footnotes in <tfoot>."""

    def field(entry: Entry) -> str:
        text = f"<strong>{html.escape(entry.text)}</strong>" if entry.bold else html.escape(entry.text)
        return text + html.escape(entry.beside and f", {entry.beside}") + (f"<sup>{', '.join(entry.marks)}</sup>" if entry.marks else "")

    lines = [f"<p>{html.escape(APART.format(len(grids)))}.</p>"] if len(grids) > 1 else []
    for table in grids:
        lines += ["<table>", f"<caption>{html.escape(table.caption)}</caption>", "<thead>"]
        lines += ["<tr>" + "".join(f'<th scope="col">{html.escape(h)}</th>' for h in table.header) + "</tr>", "</thead>", "<tbody>"]
        for name, *cells in table.rows:
            lines.append(f'<tr><th scope="row">{field(name)}</th>' + "".join(f"<td>{field(e)}</td>" for e in cells) + "</tr>")
        lines.append("</tbody>")
        if table.notes:
            notes = [f'<tr><td colspan="{len(table.header)}"><sup>{mark}</sup> {html.escape(text)}</td></tr>' for mark, text in table.notes]
            lines += ["<tfoot>", *notes, "</tfoot>"]
        lines.append("</table>")
    return "\n".join(lines) + "\n"


def as_json(grids: Sequence[Grid], rows: Rows) -> str:
    """The list of objects of design.md, section 6."""
    return json.dumps(rows, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def csv(grids: Sequence[Grid], rows: Rows) -> str:
    """The rows of the JSON; an interval in two columns, lists joined by "; "."""
    import pandas

    frame = pandas.DataFrame(rows)
    for name in PAIRS & set(frame.columns):
        place = list(frame.columns).index(name)
        bounds = [pair or (None, None) for pair in frame.pop(name)]
        frame.insert(place, f"{name}_low", [low for low, _ in bounds])
        frame.insert(place + 1, f"{name}_high", [high for _, high in bounds])
    for name in LISTS & set(frame.columns):
        frame[name] = frame[name].str.join("; ")
    return str(frame.to_csv(index=False, lineterminator="\n"))


FORMATS: dict[str, Callable[[Sequence[Grid], Rows], str]] = {"markdown": markdown, "latex": latex, "csv": csv, "json": as_json, "html": web}
