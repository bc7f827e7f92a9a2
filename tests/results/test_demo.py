"""results/demo holds what the records say: the table is made again from the scores of its single seeds."""

import csv
import json
import re
from pathlib import Path

import pytest

from harness.collect import Result
from harness.spec import Metric
from results.table import Table

DEMO = Path(__file__).resolve().parents[2] / "results" / "demo"


def scores() -> list[Result]:
    """One result for each record of seeds.csv, in its order of methods and evaluators."""
    with open(DEMO / "seeds.csv", newline="") as stream:
        lines = list(csv.DictReader(stream))
    columns: dict[str, dict[str, Metric]] = {}
    records: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        columns.setdefault(line["eval"], {})[line["metric"]] = Metric(line["metric"])
        records.setdefault(line["key"], []).append(line)
    about = json.loads((DEMO / "table.json").read_text())[0]
    return [Result(
        method=found[0]["method"], eval=found[0]["eval"], seed=int(found[0]["seed"]), eval_seed=0, key=key, status="done", start=key,
        metrics={line["metric"]: float(line["value"]) for line in found}, columns=tuple(columns[found[0]["eval"]].values()),
        caption="demo protocol, generated data: not comparable with published numbers", **{k: about[k] for k in ("protocol", "backbone", "data", "tuning")},
    ) for key, found in records.items()]


def said(text: str) -> list[list[str]]:
    """Fields and lines of a table, without what only the runs folder can tell (stars and their reasons, the audit)."""
    kept = [line for line in text.splitlines() if not line.startswith(("- Fairness", "- Starred", "- [", "|--"))]
    return [[re.sub(r" \*( \[\w+\])*$", "", field.strip()) for field in line.split("|")] for line in kept if line]


def test_the_table_is_that_of_its_records() -> None:
    rows = json.loads((DEMO / "table.json").read_text())
    order = [list(dict.fromkeys(r[k] for r in rows)) for k in ("method", "eval")]
    assert said(Table.render(scores(), "markdown", *order)) == said((DEMO / "table.md").read_text())
    for kept, again in zip(rows, json.loads(Table.render(scores(), "json", *order)), strict=True):
        assert {k: again[k] for k in ("method", "eval", "metric", "n", "undecided")} == {k: kept[k] for k in ("method", "eval", "metric", "n", "undecided")}
        for name in ("value", "std", "p_best", "detectable"):
            assert kept[name] == (None if again[name] is None else pytest.approx(again[name], rel=1e-2, abs=1e-4)), (kept["method"], kept["eval"], name)
