"""benchmarks/RESULTS.md is made from the JSON files beside it, whatever the form in which a benchmark keeps its figures."""

import json
import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
report = runpy.run_path(str(BENCHMARKS / "report.py"))


def test_the_page_is_what_its_generator_makes() -> None:
    kept = (BENCHMARKS / "RESULTS.md").read_text()
    assert kept == report["table"](report["RESULTS"].glob("*-????-??-??.json")), "run benchmarks/report.py after a new JSON"


def test_every_form_of_a_row_is_shown(tmp_path: Path) -> None:
    rows = [
        {"name": "step", "ratio": 1.4567, "spread": [1.4, 1.6], "rounds": 7, "goal": ">= 1.4", "images_per_s": {"ours": 12.34, "rival": 8.47}},
        {"name": "key", "median": 0.0312, "unit": "ms", "rounds": [0.03, 0.0312, 0.05]},
        {"evaluator": "coco", "side": 256, "ratio to rival": {"median": 1.83, "low": 1.78, "rounds": [1.78, 1.83]}},
    ]
    body = {"benchmark": "x", "date": "2026-11-21", "hardware": "a processor", "versions": {"torch": "2.9"}, "rows": rows,
            "growth": {"nodes": {"plan": [{"at": 1000, "processor_s": 0.5, "peak_MB": 80}]}}}
    for day, hardware in (("20", "an older machine"), ("21", "a processor")):
        (tmp_path / f"x-2026-11-{day}.json").write_text(json.dumps({**body, "hardware": hardware}))
    text = report["table"](tmp_path.glob("*.json"))
    assert "| step | 1.46x | 1.4 to 1.6 | 7 | >= 1.4 | images per s: ours 12.3, rival 8.47 |" in text
    assert "| key | 0.0312 ms | 0.03 to 0.05 | 3 |" in text
    assert "| coco, side 256: ratio to rival | 1.83x | 1.78 to 1.83 | 2 |" in text and "1,000: 0.5 s and 80 MB" in text
    assert "a processor; torch 2.9" in text and "an older machine" not in text, "the newest of each"
