"""Runs folders for tests: nodes with records, as jobs leave them."""

from pathlib import Path

from harness.jobs import Node
from harness.store import RECORD_SCHEMA, Store, record_schema, write_json

EMPTY = {"object": {}, "array": [], "string": "", "integer": 0, "number": 0.0}


def written(root: Path, node: Node, hours: float = 0.0, **fields: object) -> Path:
    """A node's folder with a record."""
    folder = Store(root).folder(node)
    folder.mkdir(parents=True, exist_ok=True)
    job = node.job(root)
    write_json(folder / "job.json", job)
    plain: dict[str, object] = {}
    for name in (schema := record_schema())["required"]:
        kinds = schema["properties"][name].get("type", [])
        plain[name] = None if "null" in kinds else EMPTY.get(kinds) if isinstance(kinds, str) else None
    same = {k: job[k] for k in ("kind", "name", "key", "identity", "about", "parents")}
    used = {"device_hours": hours, "wall_s": hours * 3600, "start": "2026-01-01", "flops": 0.0}
    write_json(folder / "record.json", {**plain, "schema": RECORD_SCHEMA, **same, **used, **fields})
    return folder


def about(method: str, evaluator: str, seed: int = 0, *metrics: str, **more: object) -> dict[str, object]:
    """What an evaluation's job says of its cell."""
    return {"method": method, "eval": evaluator, "protocol": "demo", "backbone": "tiny", "data": "generated data", "seed": seed, "eval_seed": 0,
            "columns": [{"name": m, "unit": "%", "higher_is_better": True} for m in metrics or ("score",)], "deviations": [], **more}
