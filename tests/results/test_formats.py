"""Tables as text: whole outputs for fixed results, names that LaTeX, HTML or Markdown would misread among them.

`HARNESS_SNAPSHOTS=write pytest tests/results` rewrites the files beside this one; read the difference before committing it.
"""

import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pandas
import pytest

from harness.collect import Result
from harness.spec import Metric
from results.beside import LAYOUTS
from results.formats import FORMATS
from results.grid import Notes
from results.table import Table

SNAPSHOTS = Path(__file__).parent / "snapshots"
CAPTION = "demo protocol, generated data: not comparable with published numbers"
COCO = (Metric("AP_box"), Metric("AP_mask"))


def cell(method: str, evaluator: str, seed: int, scores: dict[str, float] | None, columns: tuple[Metric, ...] = (Metric("mIoU"),), **fields) -> Result:
    plain = {"status": "missing" if scores is None else "done", "protocol": "demo", "backbone": "tiny", "data": "generated", "caption": CAPTION,
             "tuning": "shared", "key": f"{method}{evaluator}{seed}", "start": "2026-01-01", "eval_seed": 0}
    return Result(method=method, eval=evaluator, seed=seed, metrics=scores or {}, columns=columns, **{**plain, **fields})


THREE = [
    *(cell("mae", "ade20k", s, {"mIoU": v}, deviations=("mae.mask_ratio=0.6",)) for s, v in enumerate((15.7, 16.1, 16.5))),
    *(cell("mae", "coco", s, {"AP_box": v, "AP_mask": v - 1}, COCO, deviations=("mae.mask_ratio=0.6",)) for s, v in enumerate((8.0, 8.25, 8.5))),
    cell("beit", "ade20k", 0, {"mIoU": 17.0}), cell("beit", "ade20k", 1, {"mIoU": 15.0}),
    cell("beit", "ade20k", 2, None, status="failed", reason="loss is not finite at step 12"),
    cell("beit", "coco", 0, None, COCO, status="skipped", reason="coco: no data under --data"),
    cell("scratch", "ade20k", 0, {"mIoU": 40.0}),
]
SPECIAL = [
    cell(r"a_b&c%#$|<i>*x*`~^\{}", "imagefolder:/d_1/<x>|[y]", 0, {"error": 3.0}, (Metric("error", "m|s", higher_is_better=False),), caption="5 % & <more>"),
    cell("plain", "imagefolder:/d_1/<x>|[y]", 0, None, (Metric("error", "m|s", higher_is_better=False),), status="failed",
         reason='<b>"no"</b> 100% of $x_1\nend of --data'),
    cell("plain", "top", 0, {"top-1": 50.0}, (Metric("top-1"),)),
]
SEEDS = [  # a is surely the best; b has its mean nearly; c is far below; d has one seed
    cell(m, "ade20k", s, {"mIoU": v}) for m, scores in {
        "a": (30.0, 31.0, 32.0, 33.0), "b": (29.0, 31.5, 31.0, 33.0), "c": (20.0, 21.1, 22.0, 23.1), "d": (25.0,)}.items() for s, v in enumerate(scores)
]
PAPER = [cell("mae", "ade20k", 0, {"mIoU": 48.1}, protocol="paper", data="ADE20K", caption="", tuning="published")]
EXTENSIONS = {"markdown": "md", "latex": "tex", "csv": "csv", "json": "json", "html": "html"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["three", "special", "mixed", "seeds"])
def test_snapshot(name: str, format: str) -> None:
    text = Table.render({"three": THREE, "special": SPECIAL, "mixed": THREE[:3] + PAPER, "seeds": SEEDS}[name], format)
    path = SNAPSHOTS / f"{name}.{EXTENSIONS[format]}"
    if os.environ.get("HARNESS_SNAPSHOTS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    assert text + "\n" == path.read_text()


def test_json_has_the_fields_that_scripts_rely_on() -> None:
    rows = json.loads(Table.render(THREE, "json"))
    contract = {"method", "eval", "metric", "value", "n", "n_pretrain", "n_eval", "std", "ci95", "protocol", "backbone", "data", "published",
                "published_source", "deviations", "status", "reason"}
    assert all(contract <= set(row) for row in rows)
    assert [(r["method"], r["eval"], r["metric"]) for r in rows] == [
        (m, e, k) for m in ("mae", "beit", "scratch") for e, k in (("ade20k", "mIoU"), ("coco", "AP_box"), ("coco", "AP_mask"))]
    first = rows[0]
    assert first["value"] == pytest.approx(16.1) and first["std"] == pytest.approx(0.4) and (first["n"], first["n_pretrain"], first["n_eval"]) == (3, 3, 1)
    assert first["ci95"][0] < 16.1 < first["ci95"][1] and first["deviations"] == ["mae.mask_ratio=0.6"] and first["published"] is None
    failed, skipped, absent = rows[3], rows[4], rows[7]
    assert (failed["status"], failed["n"]) == ("failed", 2) and "seed 2: loss is not finite" in failed["reason"]
    assert (skipped["status"], skipped["value"], skipped["reason"]) == ("skipped", None, "coco: no data under --data")
    assert (absent["status"], absent["value"], absent["ci95"], absent["n"]) == ("missing", None, None, 0)


@pytest.mark.parametrize("layout", ["", "mae-table3"])
def test_json_keeps_to_its_schema(layout: str) -> None:
    schema = json.loads((Path(__file__).resolve().parents[2] / "results" / "table.schema.json").read_text())
    rows = json.loads(Table.render_layout(layout, [], "json") if layout else Table.render(THREE + SPECIAL + SEEDS, "json"))
    assert rows and not list(jsonschema.Draft202012Validator(schema).iter_errors(rows))
    assert list(jsonschema.Draft202012Validator(schema).iter_errors([{**rows[0], "status": "perhaps"}]))


def test_csv_loads_in_pandas_with_the_same_numbers() -> None:
    frame = pandas.read_csv(io.StringIO(Table.render(SPECIAL + THREE, "csv")))
    rows = json.loads(Table.render(SPECIAL + THREE, "json"))
    assert list(frame.method) == [r["method"] for r in rows]
    assert [None if v != v else v for v in frame.value] == [r["value"] for r in rows]


def bold_of(results: list[Result]) -> list[str]:
    return [line.split("|")[1].strip() for line in Table.render(results).splitlines() if "**" in line]


def test_bold_is_for_the_best_and_never_for_one_seed() -> None:
    one = [cell(m, "e", 0, {"mIoU": v}) for m, v in (("a", 1.0), ("b", 2.0))]
    assert bold_of(one) == []
    assert bold_of([cell(m, "e", s, {"mIoU": v + s}) for m, v in (("a", 1.0), ("b", 2.0)) for s in (0, 1)]) == ["b"]
    # The best has one seed only: the second best must not be put forward in its stead.
    assert bold_of([*(cell("a", "e", s, {"mIoU": 1.0 + s}) for s in (0, 1)), cell("b", "e", 0, {"mIoU": 9.0})]) == []
    # Nothing to compare with.
    assert bold_of([cell("a", "e", s, {"mIoU": 1.0 + s}) for s in (0, 1)]) == []


def test_bold_turns_round_where_lower_is_better_and_covers_ties() -> None:
    columns = (Metric("error", higher_is_better=False),)
    results = [cell(m, "e", s, {"error": v + s}, columns) for m, v in (("a", 1.0), ("b", 2.0), ("c", 1.01)) for s in (0, 1)]
    assert bold_of(results) == ["a", "c"]


def test_a_dagger_says_which_methods_cannot_be_told_from_the_best() -> None:
    rows = {r["method"]: r for r in json.loads(Table.render(SEEDS, "json"))}
    # b - a: -1.0, 0.5, -1.0, 0.0; t = -0.375 / (0.75 / 2) = -1.0, two-sided p on 3 degrees of freedom 0.3910 (tables of Student's t).
    assert rows["b"]["p_best"] == pytest.approx(0.3910, abs=1e-4) and rows["b"]["undecided"] is True
    assert rows["c"]["undecided"] is False and rows["c"]["p_best"] < 1e-4
    assert (rows["a"]["undecided"], rows["d"]["undecided"], rows["d"]["p_best"]) == (None, None, None)
    marked = [line for line in Table.render(SEEDS).splitlines() if line.startswith("|") and "†" in line]
    assert len(marked) == 1 and marked[0].startswith("| b ")


def test_a_gap_that_cannot_be_is_said_in_words() -> None:
    # Differences of two seeds, -30 and +10: such a spread hides any gap in percent, and a note "the gap that would be found: 340.1" helps nobody.
    wild = [cell(m, "e", s, {"mIoU": v}) for m, scores in {"a": (60.0, 50.0), "b": (30.0, 60.0)}.items() for s, v in enumerate(scores)]
    said = "- Power: no gap that there can be would this test find in 4 of 5 repetitions with these seeds: e mIoU."
    assert [line for line in Table.render(wild).splitlines() if "Power" in line] == [said]
    # A unit without a ceiling keeps its number.
    error = (Metric("nats", "nat", higher_is_better=False),)
    assert "repetitions with these seeds, at Holm" in Table.render([cell(r.method, "e", r.seed, {"nats": r.metrics["mIoU"]}, error) for r in wild])


def test_one_seed_is_grey_where_a_format_has_grey_and_bold_in_none() -> None:
    best = [cell(m, "e", s, {"mIoU": v}) for m, v, seeds in (("a", 1.0, 2), ("b", 9.0, 1)) for s in range(seeds)]
    for results, name in ((SEEDS, "d"), (best, "b")):
        grey = [line for line in Table.render(results, "html").splitlines() if 'class="single"' in line]
        assert len(grey) == 1 and f'<th scope="row">{name}</th>' in grey[0]
        assert [line[0] for line in Table.render(results, "latex").splitlines() if r"\textcolor{gray}" in line] == [name]
    for format, sign in (("markdown", "**"), ("html", "<strong>"), ("latex", r"\textbf")):
        assert sign not in Table.render(best, format) and "†" not in Table.render(best, format) and "textdagger" not in Table.render(best, format)
    rows = {r["method"]: r for r in json.loads(Table.render(best, "json"))}
    assert (rows["b"]["n_pretrain"], rows["b"]["std"], rows["b"]["ci95"], rows["b"]["undecided"], rows["b"]["detectable"]) == (1, None, None, None, None)


def test_the_interval_can_stand_behind_the_mean() -> None:
    # a: mean 31.5, standard deviation 1.2910, t(0.975, 3) = 3.18245, so +- 2.0542.
    assert "31.5 (29.4 to 33.6) (n=4)" in Table.render(SEEDS, spread="ci95")


def test_the_two_layers_of_seeds_are_told_apart() -> None:
    # Fine-tuning seeds differ by 2 (standard deviation 1.4) on each pre-training, the pre-trainings' means by 4 (2.8).
    two = [cell("a", "e", s, {"mIoU": v}, eval_seed=e, key=f"{s}{e}") for (s, e), v in {(0, 0): 10.0, (0, 1): 12.0, (1, 0): 14.0, (1, 1): 16.0}.items()]
    text = Table.render(two)
    assert "13.0 ± 2.8 (n=2×2)" in text and "on one pre-training, pooled over methods: e mIoU 1.4." in text and "holds the noise of both" not in text
    assert "on this pre-training: e mIoU 1.4." in Table.render(two[:2])


def test_html_is_well_formed_and_inert() -> None:
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            assert tag in {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "sup", "strong", "p"}, f"{tag} came from a name"
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(Table.render(SPECIAL + THREE + PAPER, "html"))
    assert not opened


def test_latex_has_the_same_number_of_columns_in_each_row() -> None:
    text = Table.render(SPECIAL, "latex").replace(r"\&", "")
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 3 and all(line.count("&") == 2 for line in lines)


def test_a_character_that_latex_has_no_glyph_for_is_told_by_its_number() -> None:
    text = Table.render([cell("Zoë ☃", "e", 0, {"mIoU": 1.0})], "latex")
    assert "Zoë {[}U+2603{]}" in text and "☃" not in text


def test_a_number_that_is_no_score_does_not_bury_the_table() -> None:
    assert "| m        |   1e+308 |" in Table.render([cell("m", "e", 0, {"mIoU": 1e308})])


def test_footnote_marks_go_on_after_z() -> None:
    notes = Notes()
    marks = [notes.mark(str(i)) for i in range(30)]
    assert (marks[0], marks[25], marks[26], marks[27], notes.mark("0")) == ("a", "z", "aa", "ab", "a") and len(set(marks)) == 30


def test_a_hundred_methods_and_no_results() -> None:
    text = Table.render([cell(f"m{i}", "e", 0, {"mIoU": float(i)}) for i in range(100)])
    assert sum(line.startswith("| m") for line in text.splitlines()) == 101
    assert json.loads(Table.render([], "json")) == []


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex with booktabs and xcolor (texlive-latex-recommended)")
def test_latex_compiles_within_the_margins(tmp_path: Path) -> None:
    broad = [cell(f"a-long-method-{m}", f"a-long-evaluator-{e}", 0, {"mIoU": 41.2 + m}) for m in range(3) for e in range(14)]
    others = [Table.render_layout(name, [], "latex") for name in LAYOUTS]
    others += [Table.render(broad, "latex"), Table.render([cell("Zoë ☃ 模型", "e", 0, {"mIoU": 1.0})], "latex")]
    text = "\n\\clearpage\n".join([*(path.read_text() for path in sorted(SNAPSHOTS.glob("*.tex"))), *others])
    (tmp_path / "t.tex").write_text("\\documentclass{article}\n\\usepackage{booktabs,xcolor,graphicx}\n\\begin{document}\n" + text + "\\end{document}\n")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "t.pdf").stat().st_size > 1000
    assert re.findall(r"Overfull .hbox.*", (tmp_path / "t.log").read_text()) == []
