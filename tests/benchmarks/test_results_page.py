"""benchmarks/RESULTS.md is made from the JSON files beside it, which keep one form."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
report = runpy.run_path(str(BENCHMARKS / "report.py"))
FILES = sorted(report["RESULTS"].glob("*.json"))
ROW = {"name": "step", "ratio": 1.5, "spread": [1.4, 1.6], "rounds": [1.6, 1.5, 1.4], "goal": ">= 1.4", "rival": "theirs"}


def test_the_page_is_what_its_generator_makes() -> None:
    kept = (BENCHMARKS / "RESULTS.md").read_text()
    assert FILES and kept == report["table"](FILES), "run benchmarks/report.py after a new JSON"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_keeps_the_form(path: Path) -> None:
    assert report["faults"](path.stem, json.loads(path.read_text())) == []


@pytest.mark.parametrize(("change", "said"), [
    ({"ratio": {"median": 1.5}}, "not one outcome"), ({"value": 2.0}, "not one outcome"), ({"ratio": None, "value": 2.0}, "not one outcome"),
    ({"rounds": [1.6, 1.5, 1.5]}, "not those of its rounds"), ({"rounds": 3, "ratio": 1.7}, "not within its spread"), ({"goal": ">= 1.4 s"}, "the row's unit"),
    ({"goal": "fast"}, "no comparison"), ({"rival": None}, "without its rival"), ({"name": None}, "no name"),
])
def test_a_row_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    row = {k: v for k, v in {**ROW, **change}.items() if v is not None}
    path = tmp_path / "x-2026-11-21.json"
    path.write_text(json.dumps({"benchmark": "x", "date": "2026-11-21", "hardware": "a processor", "versions": {"torch": "2.9"}, "rows": [ROW, row]}))
    with pytest.raises(ValueError, match=f"x-2026-11-21.json: row (step|2): .*{said}"):
        report["table"]([path])


def test_what_is_shown_of_a_row(tmp_path: Path) -> None:
    rows = [
        {**ROW, "images_per_s": {"ours": 12.34, "rival": 8.47}, "details": {"samples": [77.7, 78.8]}},
        {"name": "key", "value": 1.04, "unit": "ms", "spread": [0.9, 1234.5], "rounds": 3, "goal": "< 1 ms", "share": {"median": 2.004, "spread": [2.0, 2.1]}},
    ]
    for day, hardware in ((20, "an older machine"), (21, "a processor")):
        report["keep"]("x", rows, tmp_path, date=f"2026-11-{day}", hardware=hardware, load=6.1, versions={"torch": "2.9"}, cores=2,
                       growth={"nodes": {"plan": [{"at": 1000, "processor_s": 0.5, "peak_MB": 80}]}})
    text = report["table"](tmp_path.glob("*.json"))
    assert "| step | 1.50x | 1.40x to 1.60x | 3 | >= 1.4, met | theirs | images per s: ours 12.3, rival 8.47 |" in text and "77.7" not in text
    assert "| key | 1.04 ms | 0.9 to 1,234 | 3 | < 1 ms, missed |  | share 2.00 (2.0 to 2.1) |" in text and "1,000: 0.5 s and 80 MB" in text
    assert "a processor; cores 2; load 6.1; torch 2.9" in text and "an older machine" not in text, "the newest of each"
