"""benchmarks/RESULTS.md: one table of every dated JSON in benchmarks/results/, and the form that such a file has.

BENCHMARK-DATE.json is {"benchmark", "date", "hardware", "versions", "rows", ...}; what else stands there (threads, load, a note) is shown above the table.
A row has
- "name": what was measured, and in which size;
- what came out: "ratio" (times as fast as the "rival", which it names), or "value" with its "unit"; the median where there are several rounds;
- "rounds": how many, or the outcome of each; "spread": [lowest, highest] of them;
- "goal": what was wanted of it, as "< 5 s" or ">= 1.4", in the row's unit;
- "details": whatever the page leaves out, as lists of samples and what a check before the timing compared;
- every other name is a further figure, shown in the last column: a number, a text, {"median", "spread"}, or several of these under their names.
"growth" of a file is what grows -> what was measured -> points ("at", "processor_s", "peak_MB").

    .venv/bin/python benchmarks/report.py          # writes benchmarks/RESULTS.md
"""

from __future__ import annotations

import datetime
import json
import operator
import os
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.checkpoint import write_atomically
from harness.provenance import processor, versions
from harness.store import write_json

RESULTS = Path(__file__).with_name("results")
TABLE = Path(__file__).with_name("RESULTS.md")
KEPT = ("benchmark", "date", "hardware", "versions", "rows", "growth")
MAIN = ("name", "ratio", "value", "unit", "spread", "rounds", "goal", "rival", "details")
HEAD = "| what | result | lowest to highest | rounds | goal | rival | more |\n|---|---|---|---|---|---|---|"
GOAL = re.compile(r"(<=|>=|<|>) ([\d.]+) ?(.*)")
HOLDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def middle(rounds: Sequence[float], name: str = "median") -> dict[str, Any]:
    """The median of some rounds under a name, and the spread."""
    return {name: statistics.median(rounds), "spread": [min(rounds), max(rounds)]}


def keep(benchmark: str, rows: Sequence[Mapping[str, Any]], folder: Path, **more: Any) -> None:
    """Write the dated JSON of a benchmark, with hardware (the processor unless `more` says otherwise), versions and the machine's load."""
    body = {"benchmark": benchmark, "date": datetime.date.today().isoformat(), "hardware": processor(), "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1), "versions": versions(), **more, "rows": list(rows)}
    write_json(folder / f"{benchmark}-{body['date']}.json", body)


def row_faults(row: Mapping[str, Any]) -> Iterator[str]:
    """In what a row does not keep the form."""
    if not isinstance(row.get("name"), str):
        yield "no name"
    outcomes = [k for k in ("ratio", "value") if isinstance(row.get(k), (int, float))]
    if len(outcomes) != 1 or ("unit" in row) != ("value" in row):
        yield "not one outcome: a ratio, or a value with its unit"
        return
    main, spread, rounds, goal = outcomes[0], row.get("spread"), row.get("rounds"), row.get("goal")
    if main == "ratio" and "rival" not in row:
        yield "a ratio without its rival"
    if spread is not None and not (len(spread) == 2 and spread[0] <= row[main] <= spread[1]):
        yield "the outcome is not within its spread"
    if isinstance(rounds, list) and middle(rounds, main) != {main: row[main], "spread": spread}:
        yield "outcome and spread are not those of its rounds"
    if goal is not None and ((wanted := GOAL.fullmatch(goal)) is None or wanted[3] != row.get("unit", "")):
        yield "the goal is no comparison with a number in the row's unit"


def faults(stem: str, body: Mapping[str, Any]) -> list[str]:
    """In what a file, named without its ending, does not keep the form."""
    found = [f"no {name}" for name in KEPT[:-1] if not body.get(name)]
    if stem != f"{body.get('benchmark')}-{body.get('date')}":
        found.append("not named after benchmark and date")
    if not isinstance(body.get("hardware"), str):
        found.append("hardware is no text")
    return found + [f"row {row.get('name', place)}: {what}" for place, row in enumerate(body.get("rows", ()), start=1) for what in row_faults(row)]


def number(value: Any) -> str:
    """A figure for reading: three digits that count, whole numbers whole."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else min(f"{value:#.3g}".rstrip("."), str(value), key=len)


def words(name: str, value: Any) -> str:
    """A further figure, or a group of them, as "name value"."""
    name = name.replace("_", " ")
    if isinstance(value, Mapping) and "median" in value:
        return f"{name} {number(value['median'])} ({' to '.join(map(number, value['spread']))})"
    if isinstance(value, Mapping):
        return f"{name}: " + ", ".join(words(k, v) for k, v in value.items())
    return f"{name} " + ", ".join(map(number, value)) if isinstance(value, list) else f"{name} {number(value)}"


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    figure = row.get("ratio", row.get("value"))
    as_text = (lambda x: f"{x:.2f}x") if "ratio" in row else number
    goal = row.get("goal", "")
    if wanted := GOAL.fullmatch(goal):
        goal += f", {'met' if HOLDS[wanted[1]](figure, float(wanted[2])) else 'missed'}"
    rounds, more = row.get("rounds", ""), "; ".join(words(k, v) for k, v in row.items() if k not in MAIN)
    cells = (row["name"], f"{as_text(figure)} {row.get('unit', '')}".strip(), " to ".join(map(as_text, row.get("spread", ()))),
             str(len(rounds) if isinstance(rounds, list) else rounds), goal, row.get("rival", ""), more)
    return f"| {' | '.join(cells)} |"


def section(path: Path) -> str:
    """What one file says.

    Raises:
        ValueError: it does not keep the form.
    """
    body = json.loads(path.read_text())
    if wrong := faults(path.stem, body):
        raise ValueError(f"{path.name}: {'; '.join(wrong)}")
    used = body["versions"]
    where = [body["hardware"], *(words(k, v) for k, v in body.items() if k not in KEPT), *(f"{k} {used[k]}" for k in ("python", "torch") if k in used)]
    plots = "".join(f"\n![{p.stem}](results/{p.name})\n" for p in sorted(path.parent.glob(f"{path.stem}-*.png")))
    rows = "\n".join(map(line, body["rows"]))
    for grows, curves in body.get("growth", {}).items():
        for what, points in curves.items():
            shown = ", ".join(f"{p['at']:,}: {number(p['processor_s'])} s and {number(p['peak_MB'])} MB" for p in points)
            rows += f"\n\nGrowth with {grows}, {what} (processor seconds, peak memory): {shown}."
    return f"## {body['benchmark']}, {body['date']}\n\n{'; '.join(where)}\n\n{HEAD}\n{rows}\n{plots}"


def table(paths: Iterable[Path]) -> str:
    """The whole page, the newest file of each benchmark."""
    newest = {path.stem[:-len("-0000-00-00")]: path for path in sorted(paths)}
    head = ("# Results of the benchmarks\n\nMade by `benchmarks/report.py` from the JSON files in `benchmarks/results/`, the newest of each; not to be edited. "
            "What each measures, and how, stands in its script. A result is the median of its rounds; 1.50x is 1.5 times as fast as the rival.\n")
    return "\n".join([head, *map(section, newest.values())])


def main() -> None:
    """Write the page."""
    try:
        text = table(RESULTS.glob("*-????-??-??.json"))
    except ValueError as error:
        sys.exit(str(error))
    write_atomically(TABLE, lambda stream: stream.write(text.encode()))
    print(f"{TABLE.name}: {text.count(chr(10) + '## ')} benchmarks")


if __name__ == "__main__":
    main()
