"""Tables as text: Markdown for the terminal, LaTeX (booktabs), HTML, CSV and JSON. Each format escapes what it would misread."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from results.grid import Entry, Grid

FAINT = ' class="single" style="opacity:.6"'  # a single seed; grey on light and dark alike
PAIRS, LISTS = {"ci95", "spread"}, {"deviations", "remarks", "stale", "differences", "notes"}  # fields of rows that CSV has to flatten
APART = "{} tables: results of different protocols, backbones, data or tuning are never put into one"
Rows = Sequence[Mapping[str, Any]]


def markdown(grids: Sequence[Grid], rows: Rows) -> str:
    """GitHub tables, readable on a terminal."""
    from tabulate import tabulate

    def field(entry: Entry) -> str:
        text = (f"**{_markdown(entry.text)}**" if entry.bold else _markdown(entry.text)) + "".join(f" {s}" for s in entry.signs)
        return text + _markdown(entry.beside and f", {entry.beside}") + "".join(f" [{m}]" for m in entry.marks)

    blocks = [APART.format(len(grids)) + "."] if len(grids) > 1 else []
    for table in grids:
        align = (*["left"] * table.stub, *["right"] * (len(table.header) - table.stub))
        fields = [list(map(field, row)) for row in table.rows]
        body = tabulate(fields, list(map(_markdown, table.header)), "github", colalign=align, disable_numparse=True)
        blocks += [_markdown(table.caption), body]
        if table.notes or table.below:
            blocks.append("\n".join([*(f"- [{mark}] {_markdown(text)}" for mark, text in table.notes), *(f"- {_markdown(text)}" for text in table.below)]))
    return "\n\n".join(blocks) + "\n"


def _markdown(text: str) -> str:
    # Single underscores inside words are no markup there, and names are full of them.
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}", "[": "{[}", "]": "{]}",
    "±": r"$\pm$", "†": r"\textdagger{}", "√": r"$\surd$", "−": "$-$", "×": r"$\times$", "↓": r"$\downarrow$", "–": r"\textendash{}",
}


def latex(grids: Sequence[Grid], rows: Rows) -> str:
    r"""Floating tables for \usepackage{booktabs,xcolor,graphicx}; a single seed is grey. TeX itself measures a table: what is wider than the line is made
    smaller, anything else keeps its size."""

    def field(entry: Entry) -> str:
        text = rf"\textbf{{{_latex(entry.text)}}}" if entry.bold else _latex(entry.text)
        text = rf"\textcolor{{gray}}{{{text}}}" if entry.faint else text
        marks = [*map(_latex, entry.signs), *entry.marks]
        return text + _latex(entry.beside and f", {entry.beside}") + (rf"\textsuperscript{{{','.join(marks)}}}" if marks else "")

    blocks = [f"% {APART.format(len(grids))}."] if len(grids) > 1 else []
    for table in grids:
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.caption)}}}",
                 rf"\sbox0{{\begin{{tabular}}{{{'l' * table.stub}{'r' * (len(table.header) - table.stub)}}}",
                 r"\toprule", " & ".join(map(_latex, table.header)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(field, row)) + r" \\" for row in table.rows]
        lines += [r"\bottomrule", r"\end{tabular}}", r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"]
        lines += [rf"\par\footnotesize \textsuperscript{{{mark}}} {_latex(text)}" for mark, text in table.notes]
        lines += [rf"\par\footnotesize {_latex(text)}" for text in table.below]
        blocks.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(blocks) + "\n"


def _latex(text: str) -> str:
    # pdflatex stops at a character that its fonts lack: beyond the Latin letters those are told by their number
    escaped = "".join(_LATEX.get(c, c if ord(c) < 0x180 else f"{{[}}U+{ord(c):04X}{{]}}") for c in " ".join(text.split()))
    return re.sub("-(?=-)", "-{}", escaped)  # two hyphens of a flag would join into a dash


def web(grids: Sequence[Grid], rows: Rows) -> str:
    """An HTML fragment of <table> elements with captions; footnotes in <tfoot>."""

    def field(entry: Entry) -> str:
        text = f"<strong>{html.escape(entry.text)}</strong>" if entry.bold else html.escape(entry.text)
        text = f'<a href="#{html.escape(entry.link)}">{text}</a>' if entry.link else text
        marks = ", ".join([*entry.signs, *entry.marks])
        return text + html.escape(entry.beside and f", {entry.beside}") + (f"<sup>{marks}</sup>" if marks else "")

    def cell(entry: Entry) -> str:
        attributes = f' title="{html.escape(entry.hint)}"' if entry.hint else ""
        return f'<td{attributes}{FAINT if entry.faint else ""}>{field(entry)}</td>'

    lines = [f"<p>{html.escape(APART.format(len(grids)))}.</p>"] if len(grids) > 1 else []
    for table in grids:
        lines += ["<table>", *([f"<caption>{html.escape(table.caption)}</caption>"] if table.caption else []), "<thead>"]
        lines += ["<tr>" + "".join(f'<th scope="col">{html.escape(h)}</th>' for h in table.header) + "</tr>", "</thead>", "<tbody>"]
        for name, *cells in table.rows:
            lines.append(f'<tr><th scope="row">{field(name)}</th>' + "".join(map(cell, cells)) + "</tr>")
        lines.append("</tbody>")
        if table.notes or table.below:
            notes = [f'<tr><td colspan="{len(table.header)}"><sup>{mark}</sup> {html.escape(text)}</td></tr>' for mark, text in table.notes]
            notes += [f'<tr><td colspan="{len(table.header)}">{html.escape(text)}</td></tr>' for text in table.below]
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
