"""The records behind a table in one small file beside it, from which the table, the audit and all that a report says can be made again without the runs folder.

    records.jsonl.gz    {"schema": 1}
                        {"cell": {...}}                       a result as the plan has it, its numbers in the record of its key; also what was skipped or failed
                        {"folder": "...", "record": {...}}    a node that these stand on, or that counts as a trial of theirs
                        {"folder": "...", "job": {...}}       one without a record, without the places where its data and files lay

What is not in it: logs, curves, pictures, outcomes of single images, checkpoints. A folder with this file is read as a runs folder is (`--runs results/demo`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.collect import Result
from harness.spec import Metric, UserError
from harness.store import RECORD_SCHEMA, record_shape

if TYPE_CHECKING:
    from results.ancestry import Archive

NAME, SCHEMA = "records.jsonl.gz", 1
OF_RECORD = ("metrics", "facts", "lineage")  # fields of a result that its record has
PLACE = ("protocol", "backbone", "data", "tuning", "method", "eval")


@dataclass(frozen=True)
class Kept:
    """What such a file holds: results in the plan's order, and by name of their folder the records of nodes, or the jobs of those without one."""

    results: tuple[Result, ...]
    records: Mapping[str, Mapping[str, Any]]
    jobs: Mapping[str, Mapping[str, Any]]


def pack(results: Sequence[Result], archive: Archive) -> bytes:
    """The content of the file for these results; the same ones give the same bytes."""
    lines: list[dict[str, Any]] = [{"schema": SCHEMA}]
    lines += [{"cell": {k: v for k, v in asdict(replace(r, lineage=())).items() if k not in OF_RECORD}} for r in results]
    nodes = []
    for key in needed(results, archive):
        record = archive.record(folder := archive.folder(key))
        node = {"record": record} if record else {"job": {**archive.jobs()[key], "where": {}}}
        nodes.append({"folder": folder.name if folder else "", **node})
    lines += sorted(nodes, key=lambda line: str(line["folder"]))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return gzip.compress(text.encode(), mtime=0)


def needed(results: Sequence[Result], archive: Archive) -> set[str]:
    """Keys of the nodes that results stand on, of those scored in the same places (they are trials), and of all that these were built from."""
    places = {tuple(getattr(r, name) for name in PLACE) for r in results}
    jobs, found = archive.jobs(), set[str]()
    above = {r.key for r in results if r.key in jobs}
    above |= {key for key, job in jobs.items() if tuple({"tuning": "published", **job["about"]}.get(name) for name in PLACE) in places}
    while above:
        found |= above
        above = {p["key"] for key in above for p in jobs[key]["parents"].values() if p["key"] in jobs} - found
    return found


def read_kept(folder: Path) -> Kept | None:
    """The kept records of a folder, None where it has none.

    Raises:
        UserError: the file is damaged or of another version.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        first, *lines = map(json.loads, gzip.decompress(path.read_bytes()).removesuffix(b"\n").split(b"\n"))  # lines of text may end in more ways
        if first["schema"] == SCHEMA:
            records = {line["folder"]: _checked(line["record"]) for line in lines if "record" in line}
            jobs = {line["folder"]: line["job"] for line in lines if "job" in line}
            by_key = {record["key"]: record for record in records.values()}
            return Kept(tuple(_result(line["cell"], by_key) for line in lines if "cell" in line), records, jobs)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): take it from version control, or run its plan again") from error
    raise UserError(f"{path}: kept records of schema version {first['schema']}, this harness reads {SCHEMA}: use the version that wrote them")


def _checked(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record that has all that this version asks of the record.json of a runs folder. Raises ValueError when it has not."""
    if record["schema"] != RECORD_SCHEMA:
        raise ValueError(f"a record of schema version {record['schema']}, this harness reads {RECORD_SCHEMA}")
    wrong = [name for name, types in record_shape().items() if name not in record or not isinstance(record[name], types)]
    if wrong or not all(isinstance(v, (int, float)) for v in record["metrics"].values()):
        raise ValueError(f"{', '.join(wrong[:3]) or 'metrics'} of {record.get('key')} missing or wrong")
    return record


def _result(cell: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> Result:
    """A result from its line and, when it is done, its record."""
    record = records[cell["key"]] if cell["status"] == "done" else None
    told = {**cell, "columns": tuple(Metric(**m) for m in cell["columns"]), "deviations": tuple(cell["deviations"]), "metrics": {}}
    if record:
        lineage = (record["identity"], *record["about"]["lineage"]) if "lineage" in record["about"] else ()
        told |= {"metrics": dict(record["metrics"]), "facts": dict(record.get("facts") or {}), "lineage": lineage}
    return Result(**told)

