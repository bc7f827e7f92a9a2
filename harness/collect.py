"""What tables are made of: the evaluation cells of runs folders as results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.jobs import read_job
from harness.spec import Metric, UserError
from harness.store import State, Store, read_json, read_record, write_json

ALSO = "cells.json"  # beside a job.json: all cells that stand on the node, where these are several
PLACE = ("protocol", "backbone", "data", "tuning", "method", "eval", "seed")


@dataclass(frozen=True)
class Result:
    """One (method, evaluator, seeds) cell before averaging. `status`: done, failed, running, interrupted, missing or skipped.

    `settings` is what seeds must share to be averaged, `ground` what the rows of a column must share to be compared (evaluator and data).
    `lineage` (of a done one) are the identities of the evaluation and of the trainings before it, the last one first; `facts` the record's.
    """

    method: str
    eval: str
    protocol: str
    backbone: str
    data: str
    seed: int
    eval_seed: int
    metrics: Mapping[str, float]
    columns: tuple[Metric, ...]
    status: str
    reason: str = ""
    deviations: tuple[str, ...] = ()
    caption: str = ""
    tuning: str = "published"
    key: str = ""
    start: str = ""
    settings: str = ""
    ground: str = ""
    lineage: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def result_of(about: Mapping[str, Any], status: str, reason: str, record: Mapping[str, Any] | None, key: str) -> Result:
    """A Result from what job.json or a plan says about a cell and, when done, its record."""
    return Result(
        method=about["method"], eval=about["eval"], protocol=about["protocol"], backbone=about["backbone"], data=about["data"],
        seed=about["seed"], eval_seed=about["eval_seed"], metrics=dict(record["metrics"]) if record else {},
        columns=tuple(Metric(**m) for m in about["columns"]), status=status, reason=reason,
        deviations=(*about.get("deviations", ()), *(record or {}).get("deviations_found", ())),
        caption=about.get("caption", ""), tuning=about.get("tuning", "published"), key=key, start=(record or {}).get("start", ""),
        settings=about.get("settings", ""), ground=about.get("ground", ""), facts=dict((record or {}).get("facts") or {}),
        lineage=(record["identity"], *record["about"]["lineage"]) if record and "lineage" in (record["about"] or {}) else (),
    )


def cells_of(folder: Path, about: Mapping[str, Any]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The cells that stand on a node, by their place: what its job or record is `about`, and what was noted beside it."""
    also = read_json(folder / ALSO)
    return {tuple(map(a.get, PLACE)): a for a in [*(also if isinstance(also, list) else ()), about] if isinstance(a, Mapping)}


def note_cells(cells: Iterable[Any], store: Store) -> None:
    """Write beside each node which cells of a plan stand on it besides the one that its job.json names: equal work is done once, and a table made of the
    runs folder is to have all that `run` prints (a probe whose recipe is the same under both tunings). Fine-tuning seeds that change nothing are one cell."""
    known: dict[Path, dict[tuple[Any, ...], Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.node is None or "trial" in cell.about:
            continue
        if (folder := store.folder(cell.node)) not in known:
            job = read_json(folder / "job.json")
            known[folder] = cells_of(folder, (job.get("about") if isinstance(job, dict) else None) or cell.about)
        if (place := tuple(map(cell.about.get, PLACE))) not in known[folder]:
            known[folder][place] = cell.about
            write_json(folder / ALSO, list(known[folder].values()))


def collect(roots: Iterable[Path], read: Callable[[Path], Mapping[str, Any] | None] = read_record) -> list[Result]:
    """All evaluation cells found in runs folders, those of trials left out. `read`: folder -> its record, for one who has read them already.

    Raises:
        UserError: a runs folder is missing or of another version, or a record is unreadable.
    """
    results = []
    for root in roots:
        store = Store(root)
        if not root.is_dir():
            raise UserError(f"--runs {root}: {'is a file' if root.exists() else 'no such folder'}: name the folder that `run` wrote to")
        store.check_version()
        for folder in store.folders():
            if not folder.name.startswith("evaluate-"):
                continue
            record = read(folder)
            job = record or read_job(folder / "job.json")  # which say the same
            if "trial" in job["about"]:  # scored on what a sweep has held out: `results.selection` counts it
                continue
            state = State("done") if record else store.explain(folder)
            try:
                found = [result_of(about, state.status, state.reason, record, job["key"]) for about in cells_of(folder, job["about"]).values()]
            except (KeyError, TypeError, ValueError) as error:
                name = "record.json" if record else "job.json"
                raise UserError(f"{folder / name}: damaged ({type(error).__name__}: {error}): move its folder away, then run again") from error
            usage = None if record else read_json(folder / "usage.json")  # a job without a record has started all the same
            results += [replace(f, start=str(usage.get("start", ""))) for f in found] if isinstance(usage, dict) else found
    return results
