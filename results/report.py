"""`harness report`: one self-contained HTML page of what runs folders hold: tables, charts, audit, pictures, provenance.

The page is results/report.html (Jinja2, everything escaped) with charts of `results.charts`; it asks nothing of the network. The same records give the same
page, to the byte.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from harness import __version__
from harness.checkpoint import write_atomically
from harness.collect import Result
from harness.spec import UserError
from results import attention, charts, masks
from results.ancestry import Archive, Step
from results.audit import compared, of_sheet, stamp
from results.beside import LAYOUTS, fill, grid_of
from results.cells import Cell, Sheet, sheets
from results.costs import LEGEND, cost_grid, cost_of
from results.curves import curves_of
from results.formats import APART, web
from results.grid import grid
from results.image_noise import noise
from results.origins import commands, environment_of, made, whereabouts
from results.ranks import ranks_of, sentence
from results.selection import selected_on_test, selected_on_train, trials_of
from results.staleness import Staleness, with_stale
from results.standing import with_published
from results.table import add_choice, choose

PICTURES, RECORDS = 2_500_000, 1_000_000  # bytes of pictures and of records that a page takes in; the rest is linked
BIG, BROAD = 50_000, 1000  # a picture of more bytes is taken in as JPEG, of no more pixels across
MADE = {"what is hidden (grey)": masks.picture, "attention of the last block: image, and where the boxed patch looks": attention.picture}  # of pre-trainings
FILES = ("record.json", "log.txt", "job.json", "metrics.jsonl", "outcomes.npz", "checkpoint")
NOISE = ("How far each score would move on other test images of the same kind, by a paired bootstrap over the stored outcomes (200 draws), checkpoints held "
         "fixed. It says nothing about another training, and decides nothing about methods: that is done by seeds, above. The reference is the best method.")


class Report:
    """The command plugin `report`."""

    help: ClassVar[str] = "one self-contained HTML page: tables, charts, audit, pictures, provenance"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Flags of the command."""
        parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="the page (default: report.html)")
        parser.add_argument("--no-image-noise", action="store_true", help="leave out the bootstrap over test images, which can take minutes for COCO")
        add_choice(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Write the page and print its path.

        Raises:
            UserError: no results, none that a flag asks for, or a page that cannot be written.
        """
        if args.out.is_dir():
            raise UserError(f"--out {args.out}: is a folder: name a file, as in {args.out / 'report.html'}")
        choice = choose(args)
        text = Page(choice.archive, args.out.resolve().parent, not args.no_image_noise).render(choice.results, choice.methods, choice.evals)
        try:
            write_atomically(args.out, lambda stream: stream.write(text.encode()))
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written ({error.strerror}): choose another file") from error
        print(args.out)
        choice.archive.tell()
        return 0


@dataclass
class Page:
    """Assembles the page. `base` is the folder it will lie in, for its links.

    What `archive` knows from kept records alone has no files: `files` are the runs folders that have them (logs, curves, pictures, outcomes; by default
    the archive itself). All that the page takes from files stands between the comments "of files: NAME" and "end". `staleness` decides on stars in place
    of this machine, `linked` whether there are links to files of runs; `kept` is the link to kept records, where they will lie elsewhere than in the
    archive; `room` is what the page takes in.
    """

    archive: Archive
    base: Path
    image_noise: bool = True
    files: Archive | None = None
    staleness: Staleness | None = None
    linked: bool = True
    kept: str = ""
    room: dict[str, int] = field(default_factory=lambda: {"pictures": PICTURES, "records": RECORDS, "picture": BIG, "width": BROAD})
    _anchors: dict[tuple[str, ...], str] = field(default_factory=dict)
    _shown: set[Path] = field(default_factory=set)

    def render(self, results: Sequence[Result], methods: Sequence[str] = (), evals: Sequence[str] = ()) -> str:
        """The page as text."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup

        staleness = self.staleness or Staleness(self.archive, data=True)
        found = [with_stale(with_published(s), staleness) for s in sheets(results, methods, evals)]
        for sheet in found:
            for cell in sheet.cells.values():
                if cell.results:
                    self._anchors.setdefault(place(cell), f"score-{len(self._anchors)}")
        parts = [self.part(sheet) for sheet in found]
        papers = [web([grid_of(table, fields)], []) for table in LAYOUTS.values() if any(r.lineage for r in results)
                  for fields in [fill(table, results, staleness)] if any(f.standing for f in fields)]
        newest = max((str(r.get("end"))[:10] for r in self.records(results)), default="none")
        done = sum(r.status == "done" for r in results)
        sizes = [(len({getattr(r, k) for r in results}), name) for k, name in (("method", "method"), ("eval", "evaluator"), ("protocol", "protocol"))]
        count = [f"{n} {name}{'s' if n != 1 else ''}" for n, name in sizes]
        environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
        return environment.get_template("report.html").render(
            title="Which vision pre-training?", summary=f"{done} scores of {', '.join(count)}; newest record of {newest}; page by harness", version=__version__,
            apart=APART.format(len(parts)) + ".", parts=[{k: Markup(v) if k in ("table", "costs", "rank_diagram") else v for k, v in p.items()} for p in parts],
            papers=[Markup(p) for p in papers], scores=[s for sheet in found for s in self.scores(sheet)], environment=environment_of(self.records(results)))

    def records(self, results: Sequence[Result]) -> list[Mapping[str, Any]]:
        """The records of scores that are done."""
        return [r for result in results if result.key and (r := self.archive.record(self.archive.folder(result.key))) is not None]

    def part(self, sheet: Sheet) -> dict[str, Any]:
        """What the page says about a sheet."""
        from markupsafe import Markup

        items = of_sheet(sheet, self.archive)
        table = grid(sheet)
        rows = []
        for method, (name, *entries) in zip(sheet.methods, table.rows, strict=True):
            cells = [sheet.cell(method, evaluator, metric) for evaluator, metric in sheet.columns]
            rows.append((name, *(replace(e, link=self._anchors.get(place(c), "")) for e, c in zip(entries, cells, strict=True))))
        trials = trials_of(sheet, self.archive)
        said = filter(None, (selected_on_train(sheet, trials), selected_on_test(sheet, trials), stamp(items)))
        table = replace(table, rows=tuple(rows), below=(*table.below, *said))
        ranks = ranks_of(sheet)
        pictures, without = self.pictures(sheet)
        pretraining, evaluations = curves_of(sheet, self.files or self.archive)
        curves = [{"title": title, "svg": Markup(svg)} for title, series in (*pretraining, *evaluations)
                  if (svg := charts.lines(series, "step", "loss", sheet.methods))]
        return {
            "title": f"{sheet.protocol}, {sheet.backbone}, {sheet.data}" + ("" if sheet.tuning == "published" else f", tuning {sheet.tuning}"),
            "caption": table.caption, "table": web([replace(table, caption="", notes=(), below=())], []), "notes": table.notes, "below": table.below,
            "costs_said": LEGEND, "costs": web([cost_grid(sheet, self.archive)], []),
            "scores": [Markup(c) for c in self.bars(sheet)], "pareto": [Markup(c) for c in self.pareto(sheet)],
            "ranks": ranks, "ranks_said": sentence(ranks) + rank_test(ranks.friedman) if ranks else "",
            "rank_diagram": charts.rank_diagram(ranks.mean, ranks.critical, ranks.groups) if ranks and ranks.critical is not None else "",
            "noise": self.noise(sheet) if self.image_noise else [], "noise_said": NOISE,
            "curves": curves, "legend": [(m, charts.colour(i)) for i, m in enumerate(sheet.methods)],
            "samples": [group for trained in (True, False) if (group := [p for p in pictures if p["trained"] is trained])], "without": without,
            "audit_title": "Is the comparison fair?" if compared(items) else "What the row had",
            "audit": [{"verdict": i.verdict, "name": i.name, "said": "; ".join(f"{', '.join(m)}: {v}" if len(i.grouped()) > 1 else v
                                                                                for v, m in i.grouped().items())} for i in items],
            "commands": commands(sheet),
        }

    def bars(self, sheet: Sheet) -> list[str]:
        """A chart of each column's scores."""
        found = []
        for name, metric in sheet.columns:
            cells = [c for m in sheet.methods if (c := sheet.cell(m, name, metric)).value is not None]
            rows = [charts.Dot(c.method, float(c.value or 0), c.ci95, list(c.seeds.values()) if c.n_pretrain > 1 else (),
                               c.published.value if c.published else None) for c in cells]
            if rows:
                label = f"{name} {metric.name} ({metric.unit})" + ("" if metric.higher_is_better else ", lower is better")
                found.append(charts.dots(rows, label, sheet.methods, metric.higher_is_better))
        return found

    def pareto(self, sheet: Sheet) -> list[str]:
        """Score against device-hours for each column where two methods or more have both."""
        found = []
        for name, metric in sheet.columns:
            points = []
            for method in sheet.methods:
                cell = sheet.cell(method, name, metric)
                totals = [cost_of(r, self.archive).total_hours for r in cell.results]
                if cell.value is not None and totals and None not in totals:
                    points.append((method, sum(t for t in totals if t is not None) / len(totals), cell.value))
            if len(points) > 1:
                found.append(charts.scatter(points, "device-hours", f"{name} {metric.name}", sheet.methods, metric.higher_is_better))
        return found

    def noise(self, sheet: Sheet) -> list[tuple[str, ...]]:
        """Rows of evaluation noise: the first pre-training seed that all methods of a column share."""
        found: list[tuple[str, ...]] = []
        for name, metric in sheet.columns:
            cells = [c for m in sheet.methods if (c := sheet.cell(m, name, metric)).results]
            shared = set.intersection(*({r.seed for r in c.results} for c in cells)) if cells else set()
            if len(cells) < 2 or not shared:
                continue
            best = (max if metric.higher_is_better else min)(cells, key=lambda c: c.value or 0.0).method
            files = {}
            for cell in cells:
                result = next(r for r in cell.results if r.seed == min(shared))
                folder = (self.files or self.archive).folder(result.key)
                outcomes = (self.archive.record(folder) or {}).get("outcomes")
                files[cell.method] = ((folder or Path()) / (outcomes or "outcomes.npz"), result.metrics[metric.name])
            rows, reason = noise(files, metric.name, best)
            title = f"{name} {metric.name}"
            found += [(title, n.method, str(min(shared)), f"{n.score:.1f}", f"{n.std:.2f}", "reference" if n.gap is None else f"{n.gap:+.1f}".replace("-", "−"),
                       "" if n.ci95 is None else f"{n.ci95[0]:+.1f} to {n.ci95[1]:+.1f}".replace("-", "−")) for n in rows]
            found += [(title, reason, "", "", "", "", "")] if reason else []
        return found

    def pictures(self, sheet: Sheet) -> tuple[list[dict[str, Any]], list[str]]:
        """PNG files of the first score of each method and evaluator and of what it was built from, masks and attention of its pre-training; and, in words,
        what there is no picture of, or no room for. Trainings first, then each evaluator's first picture of every method (they are of the same images),
        the second, and so on, all methods' or none, so that what there is no room for is no method's alone."""
        entries: list[tuple[tuple[int, int], str, bytes]] = []
        evals = [name for name, _ in sheet.columns]
        shown, without, left_out = [], [], 0
        for cell in sheet.cells.values():
            for step in (self.files or self.archive).steps(cell.results[0]) if cell.results else ():
                if step.folder is None or step.folder in self._shown:
                    continue
                self._shown.add(step.folder)
                files = sorted([*step.folder.glob("samples/*.png"), *step.folder.glob("pictures.png")])
                found = {reconstructed(step) if path.stem == "pictures" else path.stem.replace("_", " "): path.read_bytes() for path in files}
                for title, made_of in MADE.items() if step.kind == "pretrain" else ():
                    found |= {title: content} if (content := made_of(step.folder)) is not None else {}
                where = cell.eval if step.role == "evaluation" else "pre-training" if step.kind == "pretrain" and step.role == "checkpoint" else step.role
                if reason := ((step.record or {}).get("facts") or {}).get("no_pictures"):
                    without.append(f"{cell.method}, {where}: no reconstructions, since {reason}.")
                turns = [(i, evals.index(cell.eval)) if step.role == "evaluation" else (0, len(entries) + i) for i in range(1, 1 + len(found))]
                entries += [(turn, f"{cell.method}, {where}: {title}", content) for turn, (title, content) in zip(turns, found.items(), strict=True)]
        for turn, together in groupby(sorted(entries, key=lambda entry: entry[0]), lambda entry: entry[0]):
            taken = []
            for _, title, content in together:
                try:
                    broad, data = inlined(content, self.room["picture"], self.room["width"])
                    taken.append({"title": title, "data": data, "broad": broad, "trained": turn[0] == 0})
                except (OSError, SyntaxError, ValueError):  # what Pillow raises on damaged files
                    without.append(f"{title}: the picture is damaged.")
            fits = (size := sum(len(str(t["data"])) for t in taken)) <= self.room["pictures"]
            self.room["pictures"] -= size * fits
            shown, left_out = (shown + taken, left_out) if fits else (shown, left_out + len(taken))
        return shown, [*without, *([f"{left_out} more pictures lie in the runs folders: this page would be too big with them."] if left_out else [])]

    def scores(self, sheet: Sheet) -> list[dict[str, Any]]:
        """Provenance of each method and evaluator: all its seeds, step by step."""
        found = []
        for cell in {place(c): c for c in sheet.cells.values() if c.results}.values():
            steps, text = [], ""
            for result in cell.results:
                said = ", ".join(f"{k} {v:.2f}" for k, v in result.metrics.items())
                for step in self.archive.steps(result):
                    role = f"seed {result.seed}/{result.eval_seed}, {said}: evaluation" if step.role == "evaluation" else f"built on {step.role}"
                    steps.append({"role": role, "key": step.key, "made": made(step), "links": self.links(step), "at": whereabouts(step, self.base, self.kept)})
                    if step.role == "evaluation" and step.record and not text:
                        text = json.dumps(step.record, indent=1, ensure_ascii=False)
            if len(text) > self.room["records"]:
                text = ""
            self.room["records"] -= len(text)
            title = f"{cell.method} on {cell.eval} ({cell.protocol}, {cell.backbone}): {cell.n} score{'s' if cell.n != 1 else ''}"
            found.append({"anchor": self._anchors[place(cell)], "title": title, "steps": steps, "record": text})
        return found

    def links(self, step: Step) -> list[tuple[str, str]]:
        """Files of a node, relative to the page."""
        from urllib.parse import quote

        folder = (self.files or self.archive).folder(step.key) if self.linked else None
        return [(name, quote(os.path.relpath(folder.resolve() / name, self.base))) for name in FILES if (folder / name).exists()] if folder else []


def reconstructed(step: Step) -> str:
    """What the rows of a training's pictures are."""
    made_by = {*((step.record or {}).get("parents") or {}), *(step.identity.get("files") or {})}
    last = "their own tokens decoded, and the predicted ones" if "tokenizer" in made_by else "and what is predicted"
    return f"images, what is shown of them, {last}" if step.kind == "pretrain" else "images, and what is made of them again"


def inlined(content: bytes, big: int = BIG, broad: int = BROAD) -> tuple[bool, str]:
    """Whether a PNG is broader than a chart, and its data URL; smaller where it is big: photographs at the papers' sizes would fill the page."""
    from PIL import Image

    kind = "png"
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if len(content) > big:
            kind, stream, share = "jpeg", io.BytesIO(), min(1.0, broad / width)
            image.convert("RGB").resize((round(width * share), max(1, round(height * share)))).save(stream, format="JPEG", quality=88)
            content = stream.getvalue()
    return width > 1.3 * charts.WIDTH, f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def place(cell: Cell) -> tuple[str, ...]:
    """What the metrics of one evaluation have in common."""
    return cell.protocol, cell.backbone, cell.data, cell.tuning, cell.method, cell.eval


def rank_test(p: float | None) -> str:
    """Friedman's test in words."""
    return "" if p is None else f" Friedman's test that all methods are alike: p = {p:.2g}."
