"""What changed a job's key: its identity field by field against the nearest earlier run of the same name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.spec import UserError, suggest
from harness.store import State, read_json
from results.ancestry import Archive

Flat = dict[str, Any]


def explain(run: str, archive: Archive, away: Mapping[str, State]) -> list[str]:
    """Lines for `status RUN`: its state, what it is, what it deviates in, where memory gave out, what it was built from, what changed its key, its record.
    `away`: what launchers know of nodes elsewhere.

    Raises:
        UserError: there is no such run, several fit, or its files cannot be read.
    """
    folder = find(run, archive)
    state, record, job = archive.state(folder, away), archive.read(folder), archive.job(folder)
    about, identity = job.get("about") or {}, job["identity"]
    lines = [f"{folder.name}: {state.status}{': ' + state.reason if state.reason else ''}"]
    lines += [f"recipe: {source} ({fields})" for fields, source in (identity.get("recipe") or {}).get("sources", ())]
    lines += [f"deviates from the recipe: {text}" for text in about.get("deviations", ())]
    lines += [f"halved: {text}" for text in ((record or {}).get("facts") or {}).get("out_of_memory", ())]
    lines += [f"data: {name} {value}" for name, value in (identity.get("data") or {}).items()]
    lines += [f"built from: {role} {parent['folder']}" for role, parent in (job.get("parents") or {}).items()]
    found = nearest_earlier(folder, archive)
    if found is None:
        lines.append("key: no earlier run of this name here")
    else:
        other, changes = found
        said = "; ".join(f"{name} {_short(before)} -> {_short(after)}" for name, (before, after) in changes.items()) or "nothing that a folder still shows"
        lines.append(f"key: since {other.name} changed: {said}")
    return [*lines, json.dumps(job, indent=1)]


def find(run: str, archive: Archive) -> Path:
    """The folder that RUN means: its name, the beginning of its key, or a part of its name that no other has. Raises UserError."""
    folders = archive.folders()
    found = [f for f in folders if f.name == Path(run).name or f.name.rsplit("-", 1)[-1].startswith(run)]
    found = found or [f for f in folders if run in f.name]
    if len(found) != 1:
        what = "no such run" if not found else f"{len(found)} runs fit"
        raise UserError(f"status {run}: {what}: {suggest(run, [f.name for f in (found or folders)], most=200)}")
    return found[0]


def nearest_earlier(folder: Path, archive: Archive) -> tuple[Path, dict[str, tuple[Any, Any]]] | None:
    """The run of the same kind and name that was started before and differs in the fewest fields (the newest of several), and these fields."""
    mine, born = identity_of(folder, archive), _started(folder, archive) or math.inf
    kind_and_name = folder.name.rpartition("-")[0]
    best: tuple[int, float, Path, dict[str, tuple[Any, Any]]] | None = None
    for other in archive.folders():
        if other == folder or other.name.rpartition("-")[0] != kind_and_name or (then := _started(other, archive)) is None or then >= born:
            continue
        changes = difference(identity_of(other, archive), mine)
        if best is None or (len(changes), -then) < best[:2]:
            best = (len(changes), -then, other, changes)
    return None if best is None else best[2:]


def _started(folder: Path, archive: Archive) -> float | None:
    """When a job was first started, None when it was only planned."""
    for told in (read_json(folder / "usage.json"), archive.record(folder)):
        if isinstance(told, Mapping) and isinstance(start := told.get("start"), str) and start:
            return datetime.fromisoformat(start).timestamp()
    return None


def identity_of(folder: Path, archive: Archive) -> Flat:
    """A job's identity as field -> value; that of a parent whose folder is there in place of its key, under the parent's role."""
    try:
        job = archive.job(folder)
    except UserError:
        return {}
    fields = flat({k: v for k, v in job["identity"].items() if k != "parents"})
    for role, parent in (job.get("parents") or {}).items():
        above = folder.parent / parent["folder"]
        fields |= {f"{role}.{k}": v for k, v in identity_of(above, archive).items()} if archive.has(above) else {f"{role}.key": parent["key"]}
    return fields


def flat(value: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested mappings as dotted names; sources are left out, they follow the values."""
    found: Flat = {}
    for name, part in value.items():
        if isinstance(part, Mapping):
            found |= flat(part, f"{prefix}{name}.")
        elif name != "sources":
            found[prefix + name] = part
    return found


def difference(before: Flat, after: Flat) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, with both values; a field that one of them lacks is None there."""
    return {name: (before.get(name), after.get(name)) for name in sorted({*before, *after}) if before.get(name) != after.get(name)}


def _short(value: Any) -> str:
    """A value in a line."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
