"""A paper in a folder: `run --plan results/CLAIM/plan.py` does what the plan says and keeps its tables and its report beside it.

A plan is a Python file with a function `plan()` that returns a `harness.request.Request`, or several for several backbones; its docstring has the command, the
cost and the numbers to expect. `LAYOUTS`, if there are any, are the tables of papers that it is about (`table --layout`).
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from harness import plugins
from harness.checkpoint import write_atomically
from harness.collect import Result
from harness.request import Keep, Request
from harness.spec import UserError
from results.ancestry import Archive
from results.audit import of_sheet
from results.audit_command import as_text
from results.beside import paper_table
from results.cells import sheets
from results.report import Page
from results.table import Table

SCORES = ("method", "eval", "metric", "protocol", "backbone", "data", "tuning", "seed", "eval_seed", "value", "key")
LISTS = ("methods", "evals", "seeds", "eval_seeds", "settings")  # fields of a request that hold several values


@dataclass(frozen=True)
class Claim:
    """What a plan file says. `folder` is where its tables are kept."""

    folder: Path
    requests: tuple[Request, ...]
    layouts: tuple[str, ...] = ()

    def keep(self, results: Sequence[Result], runs: Sequence[Path]) -> str:
        """Write the tables, the scores, the audit and the report of these results, and say where."""
        written = {**self.tables(results, runs), "report.html": Page(Archive(tuple(runs)), self.folder.resolve()).render(results)}
        for name, text in written.items():
            write_atomically(self.folder / name, lambda stream, text=text: stream.write(text.encode()))
        return f"kept in {self.folder}: {', '.join(written)}"

    def tables(self, results: Sequence[Result], runs: Sequence[Path] = ()) -> dict[str, str]:
        """Name -> content of all that is kept but the report. Without runs folders what only they can tell is left out (stars, audit)."""
        order = [list(dict.fromkeys(name for r in self.requests for name in getattr(r, kind))) for kind in ("methods", "evals")]
        found = {f"table.{end}": Table.render(results, format, *order, folders=runs) + "\n" for end, format in (("md", "markdown"), ("json", "json"))}
        found |= {f"{name}.md": Table.render_layout(name, results, archive=Archive(tuple(runs))) + "\n" for name in self.layouts}
        audits = [as_text(f"{s.protocol}, {s.backbone}, {s.data}, tuning {s.tuning}", of_sheet(s, Archive(tuple(runs)))) for s in sheets(results, *order)]
        return {**found, "seeds.csv": scores(results), **({"audit.txt": "\n\n".join(audits) + "\n"} if runs else {})}


def read_plan(path: Path) -> Claim:
    """The claim of a plan file. The file is run: it is code of the user's, as a plugin is.

    Raises:
        UserError: no such file, it does not import, has no function `plan`, or that returns something else than requests.
    """
    if not path.is_file():
        hint = f"is a folder: name the file in it, as in {path / 'plan.py'}" if path.is_dir() else "no such file: name a plan, as in results/demo/plan.py"
        raise UserError(f"--plan {path}: {hint}")
    space: dict[str, Any] = {"__name__": "plan", "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), space)
    except Exception as error:
        raise UserError(f"--plan {path}: cannot be imported ({type(error).__name__}: {error}): mend it") from error
    if not callable(function := space.get("plan")):
        raise UserError(f"--plan {path}: has no function plan(): it returns a harness.request.Request, as that of results/demo/plan.py does")
    try:
        found = function()
    except Exception as error:
        raise UserError(f"--plan {path}: its plan() fails ({type(error).__name__}: {error}): mend it") from error
    requests = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    if not requests or (wrong := [r for r in requests if not isinstance(r, Request)]):
        what = type(wrong[0]).__name__ if requests else "nothing"
        raise UserError(f"--plan {path}: its plan() returns {what}, not a harness.request.Request or several")
    for request in requests:
        for name in LISTS:
            if not isinstance(value := getattr(request, name), (tuple, list)) or not all(isinstance(v, int if "seed" in name else str) for v in value):
                raise UserError(f"--plan {path}: {name} of its request must be a tuple of {'integers' if 'seed' in name else 'names'}, not {value!r}")
    layouts = tuple(space.get("LAYOUTS", ()))
    for layout in layouts:
        paper_table(layout)
    return Claim(path.parent, requests, layouts)


def claim(path: Path, out: str | None, changed: Sequence[str], writes: bool) -> tuple[tuple[Request, ...], Keep]:
    """Requests of a plan, and what keeps its tables in its folder or in `out`: only as the plan has it, unless `out` is given.

    Args:
        changed: flags that are given. --data changes a plan only that asks for generated data.
        writes: whether anything will be kept (not on --dry-run), so that a folder that cannot be written is found before a week is spent.

    Raises:
        UserError: a plan that cannot be used, a folder that cannot be written.
    """
    found = read_plan(path)
    generated = any(r.data is None and getattr(plugins.build("protocols", r.protocol), "generator", None) for r in found.requests)
    changed = [flag for flag in changed if flag != "--data" or generated]
    if changed and out is None:
        return found.requests, lambda results, runs: f"not kept beside the plan, {', '.join(changed)} changes it: add --out DIR to keep its tables there"
    folder = Path(out) if out is not None else path.parent
    with contextlib.suppress(OSError):
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
    if writes and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--plan {path}: {folder} cannot be written: add --out DIR, a folder where its tables are kept")
    return found.requests, Claim(folder, found.requests, found.layouts).keep


def scores(results: Iterable[Result]) -> str:
    """Every score with its seeds and the key of its record, as CSV."""
    stream = io.StringIO()
    lines = csv.DictWriter(stream, SCORES, lineterminator="\n")
    lines.writeheader()
    for r in results:
        same = {f.name: getattr(r, f.name) for f in fields(r) if f.name in SCORES}
        lines.writerows({**same, "metric": m.name, "value": f"{r.metrics[m.name]:.4f}"} for m in r.columns if m.name in r.metrics)
    return stream.getvalue()
