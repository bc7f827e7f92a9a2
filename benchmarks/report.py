"""benchmarks/RESULTS.md: one table of every dated JSON in benchmarks/results/, and the form that such a file has.

A file is {"benchmark", "date", "hardware", "versions", "rows", ...}; a row says what was measured ("name") and what came out: "ratio" (times as fast as the
rival), or "value" with its "unit"; "spread" is [lowest, highest] of its "rounds", "goal" what was wanted. Everything else that a row has (other figures,
groups of figures) stands in the last column. "growth" is what grows -> what was measured -> points ("at", "processor_s", "peak_MB"). Files without these
names are shown as well: text and whole numbers are what was measured, fractions the outcome.

    .venv/bin/python benchmarks/report.py          # writes benchmarks/RESULTS.md
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.checkpoint import write_atomically
from harness.provenance import processor, versions
from harness.store import write_json

RESULTS = Path(__file__).with_name("results")
TABLE = Path(__file__).with_name("RESULTS.md")
MAIN = ("name", "ratio", "value", "median", "unit", "spread", "rounds", "ratios", "goal")
HEAD = "| what | result | lowest to highest | rounds | goal | more |\n|---|---|---|---|---|---|"


def keep(benchmark: str, rows: Sequence[Mapping[str, Any]], folder: Path, **more: Any) -> None:
    """Write the dated JSON of a benchmark, with hardware, versions and the machine's load."""
    body = {"benchmark": benchmark, "date": datetime.date.today().isoformat(), "hardware": processor(), "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1), "versions": versions(), **more, "rows": list(rows)}
    write_json(folder / f"{benchmark}-{body['date']}.json", body)


def number(value: Any) -> str:
    """A figure for reading: three digits that count, whole numbers whole."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else str(value) if isinstance(value, int) else f"{value:.3g}"


def words(name: str, value: Any) -> str:
    """A further figure, or a group of them, as "name value"."""
    name = name.replace("_", " ")
    if isinstance(value, Mapping):
        inner = {k: v for k, v in value.items() if not isinstance(v, list)}
        return f"{name}: " + ", ".join(words(k, v) for k, v in inner.items())
    if isinstance(value, list):
        return f"{name} " + ", ".join(map(number, value))
    return f"{name} {number(value)}"


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    told = {k: v for k, v in row.items() if isinstance(v, (str, int)) and k not in MAIN} if "name" not in row else {}
    name = row.get("name") or ", ".join(f"{v}" if isinstance(v, str) else words(k, v) for k, v in told.items())
    groups = [k for k, v in row.items() if isinstance(v, Mapping) and "median" in v] if not {"ratio", "value", "median"} & set(row) else []
    for group in groups[:1]:  # the first of several outcomes; the others stand in the last column
        whole = row[group]
        name, row = f"{name}: {group}", {**{k: v for k, v in row.items() if k != group}, "ratio": whole["median"], "rounds": whole.get("rounds")}
    rounds = row.get("rounds", row.get("ratios"))
    low_high = row.get("spread") or ([min(rounds), max(rounds)] if isinstance(rounds, list) and rounds else None)
    main = row.get("ratio", row.get("value", row.get("median")))
    result = "" if main is None else f"{number(main)}{'x' if 'ratio' in row else ''} {row.get('unit', '')}".strip()
    shown = f"{number(low_high[0])} to {number(low_high[1])}" if isinstance(low_high, list) else number(low_high or "")
    count = len(rounds) if isinstance(rounds, list) else rounds or ""
    goal = row.get("goal", "")
    more = "; ".join(words(k, v) for k, v in row.items() if k not in MAIN and k not in told)
    return f"| {name} | {result} | {shown} | {count} | {number(goal)} | {more} |"


def section(path: Path) -> str:
    """What one file says."""
    body = json.loads(path.read_text())
    hardware, used = body.get("hardware") or body.get("processor"), body.get("versions") or body.get("packages") or {}
    facts = {k: v for k, v in body.items() if k not in ("benchmark", "date", "hardware", "processor", "versions", "packages", "rows", "growth")}
    where = [str(hardware), *(words(k, v) for k, v in facts.items()), *(f"{k} {used[k]}" for k in ("python", "torch") if k in used)]
    plots = "".join(f"\n![{p.stem}](results/{p.name})\n" for p in sorted(path.parent.glob(f"{path.stem}-*.png")))
    rows = "\n".join(line(row) for row in body["rows"])
    for grows, curves in body.get("growth", {}).items():
        for what, points in curves.items():
            shown = ", ".join(f"{p['at']:,}: {number(p['processor_s'])} s and {number(p['peak_MB'])} MB" for p in points)
            rows += f"\n\nGrowth with {grows}, {what} (processor seconds, peak memory): {shown}."
    return f"## {body.get('benchmark') or path.stem[:-len('-0000-00-00')]}, {body['date']}\n\n{'; '.join(where)}\n\n{HEAD}\n{rows}\n{plots}"


def table(paths: Iterable[Path]) -> str:
    """The whole page, the newest file of each benchmark."""
    newest = {path.stem[:-len("-0000-00-00")]: path for path in sorted(paths)}
    head = ("# Results of the benchmarks\n\nMade by `benchmarks/report.py` from the JSON files in `benchmarks/results/`, the newest of each; not to be edited. "
            "What each measures, and against which rival, stands in its script. A result is the median of its rounds.\n")
    return "\n".join([head, *map(section, newest.values())])


def main() -> None:
    """Write the page."""
    text = table(RESULTS.glob("*-????-??-??.json"))
    write_atomically(TABLE, lambda stream: stream.write(text.encode()))
    print(f"{TABLE.name}: {text.count(chr(10) + '## ')} benchmarks")


if __name__ == "__main__":
    main()
