"""What changed a job's key: its identity field by field against the nearest earlier run of the same name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.jobs import read_job
from harness.spec import UserError
from harness.store import Store, read_json, read_record

Flat = dict[str, Any]


def explain(folder: Path) -> list[str]:
    """Lines for `status RUN`: what it is, what it deviates in, where memory gave out, what it was built from, what changed its key.

    Raises:
        UserError: its job.json cannot be read.
    """
    job = read_job(folder / "job.json")
    about, identity = job.get("about") or {}, job["identity"]
    lines = [f"recipe: {source} ({fields})" for fields, source in (identity.get("recipe") or {}).get("sources", ())]
    lines += [f"deviates from the recipe: {text}" for text in about.get("deviations", ())]
    lines += [f"halved: {text}" for text in ((read_record(folder) or {}).get("facts") or {}).get("out_of_memory", ())]
    lines += [f"data: {name} {value}" for name, value in (identity.get("data") or {}).items()]
    lines += [f"built from: {role} {parent['folder']}" for role, parent in (job.get("parents") or {}).items()]
    found = nearest_earlier(folder)
    if found is None:
        return [*lines, "key: no earlier run of this name here"]
    other, changes = found
    said = "; ".join(f"{name} {_short(before)} -> {_short(after)}" for name, (before, after) in changes.items()) or "nothing that a folder still shows"
    return [*lines, f"key: since {other.name} changed: {said}"]


def nearest_earlier(folder: Path) -> tuple[Path, dict[str, tuple[Any, Any]]] | None:
    """The run of the same kind and name that was started before and differs in the fewest fields (the newest of several), and these fields."""
    mine, born = identity_of(folder), _started(folder) or math.inf
    kind_and_name = folder.name.rpartition("-")[0]
    best: tuple[int, float, Path, dict[str, tuple[Any, Any]]] | None = None
    for other in Store(folder.parent).folders():
        if other == folder or other.name.rpartition("-")[0] != kind_and_name or (then := _started(other)) is None or then >= born:
            continue
        changes = difference(identity_of(other), mine)
        if best is None or (len(changes), -then) < best[:2]:
            best = (len(changes), -then, other, changes)
    return None if best is None else best[2:]


def _started(folder: Path) -> float | None:
    """When a job was first started, None when it was only planned; of a record alone when it was written, though copies of folders have new times."""
    from datetime import datetime

    usage = read_json(folder / "usage.json")
    if isinstance(usage, dict) and isinstance(usage.get("start"), str):
        return datetime.fromisoformat(usage["start"]).timestamp()
    return path.stat().st_mtime if (path := folder / "record.json").exists() else None


def identity_of(folder: Path) -> Flat:
    """A job's identity as field -> value; that of a parent whose folder is there in place of its key, under the parent's role."""
    try:
        job = read_job(folder / "job.json")
    except UserError:
        return {}
    fields = flat({k: v for k, v in job["identity"].items() if k != "parents"})
    for role, parent in (job.get("parents") or {}).items():
        above = folder.parent / parent["folder"]
        fields |= {f"{role}.{k}": v for k, v in identity_of(above).items()} if above.is_dir() else {f"{role}.key": parent["key"]}
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
