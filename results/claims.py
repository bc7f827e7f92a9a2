"""A paper in a folder: `run --plan results/CLAIM/plan.py` does what the plan says and keeps its tables and its report beside it.

A plan is a Python file with a function `plan()` that returns a `harness.request.Request`, or several for several backbones; its docstring has the command, the
cost and the numbers to expect. `LAYOUTS`, if there are any, are the tables of papers that it is about (`table --layout`).

    python -m results.claims results/demo/plan.py               # tables and report again from the records kept beside the plan, without any runs folder
    python -m results.claims results/demo/plan.py --runs RUNS   # from what a runs folder holds, as it is: nothing is trained
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import plugins
from harness.checkpoint import write_atomically
from harness.collect import Result, collect
from harness.request import Keep, Request
from harness.spec import UserError
from results.ancestry import Archive
from results.audit import of_sheet
from results.audit_command import as_text
from results.beside import paper_table
from results.cells import sheets
from results.kept import NAME, pack
from results.report import RECORDS, Page
from results.staleness import Staleness, pinned
from results.table import Table

SCORES = ("method", "eval", "metric", "protocol", "backbone", "data", "tuning", "seed", "eval_seed", "value", "key")
# A report that is kept stays below 1 MB, as a file of a repository should: without pictures that of the three-seed demo has 350,000 bytes.
ROOM = {"pictures": 480_000, "records": RECORDS, "picture": 10_000, "width": 480}
OF_FILES = re.compile(r"<!-- of files: (\S+) -->.*?<!-- end -->", re.S)  # see results/report.html
LISTS = ("methods", "evals", "seeds", "eval_seeds", "settings")  # fields of a request that hold several values


@dataclass(frozen=True)
class Claim:
    """What a plan file says. `folder` is where its tables are kept."""

    folder: Path
    requests: tuple[Request, ...]
    layouts: tuple[str, ...] = ()

    def keep(self, results: Sequence[Result], runs: Sequence[Path]) -> str:
        """Write the records behind these results, and from them the tables, the scores, the audit and the report; and say where. All of it is made before
        any of it is written: who stops it in the middle has what was there before."""
        files = Archive(tuple(runs))
        linked = all(folder.resolve().is_relative_to(Path.cwd()) for folder in (*runs, self.folder))  # elsewhere is not there for others
        with TemporaryDirectory() as folder:
            made = replace(self, folder=Path(folder))
            made.write(records := {NAME: pack(results, files)})
            contents = {**records, **made.tables(), "report.html": made.page(files, linked, self.folder).encode()}
        return self.write(contents)

    def done(self, results: Iterable[Result]) -> list[Result]:
        """Those of some results that the plan asks for, by their names and seeds, in its order. Raises UserError when there are none."""
        asked = ((q.protocol, q.backbone, s, m, e, t) for q in self.requests for s in q.seeds for m in q.methods for e in q.evals for t in q.eval_seeds)
        places = {cell: place for place, cell in enumerate(dict.fromkeys(asked))}
        found = [(place, r) for r in results if (place := next((places[cell] for backbone in (r.backbone, None) if (
            cell := (r.protocol, backbone, r.seed, r.method, r.eval, r.eval_seed)) in places), None)) is not None]
        if not found:
            raise UserError(f"--runs: nothing there that the plan of {self.folder} asks for: name the folder that it was run in")
        return [r for _, r in sorted(found, key=lambda placed: placed[0])]

    def again(self) -> str:
        """Write tables, scores, audit and report again from the kept records alone; what the report had from the files of runs it keeps."""
        earlier = self.folder / "report.html"
        page = with_files(self.page(), earlier.read_text() if earlier.is_file() else "")
        return self.write({**self.tables(), "report.html": page.encode()})

    def write(self, contents: Mapping[str, bytes]) -> str:
        """Write files, and say where."""
        for name, content in contents.items():
            write_atomically(self.folder / name, lambda stream, content=content: stream.write(content))
        return f"kept in {self.folder}: {', '.join(contents)}"

    @cached_property
    def archive(self) -> Archive:
        """The kept records. Raises UserError when there are none."""
        if not (self.folder / NAME).is_file():
            raise UserError(f"{self.folder / NAME}: no such file: `python -m harness run --plan` with its plan makes it")
        return Archive((self.folder,))

    @property
    def staleness(self) -> Staleness:
        """Evaluators as the code has them, libraries as requirements.lock pins them, data as the records say: the same stars on every machine."""
        return Staleness(self.archive, installed=pinned())

    @property
    def order(self) -> list[list[str]]:
        """Names of methods and of evaluators as the plan has them."""
        return [list(dict.fromkeys(name for r in self.requests for name in getattr(r, kind))) for kind in ("methods", "evals")]

    def tables(self) -> dict[str, bytes]:
        """Name -> content of all that is kept but the records and the report."""
        results, archive = self.archive.kept, self.archive
        found = {f"table.{end}": Table.render(results, format, *self.order, archive=archive, staleness=self.staleness)
                 for end, format in (("md", "markdown"), ("json", "json"))}
        found |= {f"{name}.md": Table.render_layout(name, results, staleness=self.staleness) for name in self.layouts}
        audits = [as_text(f"{s.protocol}, {s.backbone}, {s.data}, tuning {s.tuning}", of_sheet(s, archive)) for s in sheets(results, *self.order)]
        return {name: f"{text}\n".encode() for name, text in {**found, "audit.txt": "\n\n".join(audits)}.items()} | {"seeds.csv": scores(results).encode()}

    def page(self, files: Archive | None = None, linked: bool = False, base: Path | None = None) -> str:
        """The report; without the runs folders (`files`) it has no curves, pictures or evaluation noise, and no links to logs and checkpoints. `base`: where
        it will lie, if not in the folder of the records."""
        page = Page(self.archive, (base or self.folder).resolve(), True, files, self.staleness, linked, NAME, ROOM.copy())  # it counts the room down
        return page.render(self.archive.kept, *self.order)


def of_records(page: str) -> str:
    """What of a report its records decide: all that it shows but what it took from the files of runs."""
    return OF_FILES.sub("", page[page.index("<body>") : page.index("<script>")])


def with_files(page: str, earlier: str) -> str:
    """A report with what an earlier one took from the files of runs; where it only says that these are not there, it took nothing."""
    taken = {found[1]: found[0] for found in OF_FILES.finditer(earlier) if NAME not in found[0]}
    return OF_FILES.sub(lambda found: taken.get(found[1], found[0]), page)


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
        if out is not None:
            raise UserError(f"--out {out}: {'is a file' if folder.is_file() else 'cannot be written'}: name a folder where its tables can be kept")
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


def main(words: Sequence[str]) -> int:
    """Write what is kept beside plan files again: from their kept records, as a changed evaluator or layout of tables needs it, or from what runs folders
    hold of these plans, as it is there: nothing is planned or trained, what is stale is starred."""
    parser = argparse.ArgumentParser(prog="python -m results.claims", description="write tables and reports of plans again, beside them")
    parser.add_argument("plans", metavar="FILE", nargs="+", type=Path, help="plan files, with kept records beside them if --runs is not given")
    parser.add_argument("--runs", metavar="DIR", nargs="+", type=Path, help="keep what these runs folders hold")
    args = parser.parse_args(words)
    try:
        for plan in args.plans:
            found = read_plan(plan)
            print(found.keep(found.done(collect(args.runs)), args.runs) if args.runs else found.again())
    except UserError as error:
        print(f"results.claims: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename2 or error.filename
        print(f"results.claims: {where}: {error.strerror}: mend that (space, permissions), then give the same line again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("results.claims: interrupted: what was kept before is still there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
