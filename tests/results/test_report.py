"""The report: one page that needs nothing else, says what the records say, and works in a browser.

screens/ shows how the page of the three-seed demo looked in Chromium at desktop and phone width (1280, shown smaller, and 400): its begin, light and dark,
and its pictures; for the next one who changes its style.
"""

import argparse
import base64
import io
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from folders import about, written
from PIL import Image

from harness.collect import collect
from harness.jobs import Node
from harness.spec import UserError
from harness.store import Store, write_json
from results import charts, drawing
from results.ancestry import Archive
from results.cells import sheets
from results.curves import curve, curves_of
from results.report import Report, inlined

EVIL = "<script>alert(1)</script>&'\""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three methods, one with a name that HTML would misread, on two evaluators over three seeds; one failure."""
    root = tmp_path / "runs"
    Store(root).prepare()
    scores = {"mae": (50.0, 51.0, 52.0), "beit": (49.0, 52.0, 50.5), EVIL: (20.0,)}
    for method, values in scores.items():
        for seed, value in enumerate(values):
            training = Node("pretrain", "m", {"seed": seed, "method": method, "recipe": None, "plugin": {}}, about={"labels": False})
            facts = {"no_pictures": "its decoder is gone"} if method == "beit" else {}
            folder = written(root, training, 2.0, flops=1e12, images_seen=7200, peak_memory_bytes=2**30, facts=facts)
            if not facts:
                Image.new("RGB", (4, 4)).save(folder / "pictures.png")
            (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {3.0 / (i + 1)}}}\n' for i in range(200)) + "broken\n")
            for name, metric in (("linear", "top-1"), ("ade20k", "mIoU")):
                plain = {"seed": seed, "eval": name, "data": {}, "plugin": {}, "recipe": None}
                evaluation = Node("evaluate", f"{name}-m", plain, {"checkpoint": training}, about(method, name, seed, metric))
                correct = np.arange(100) < value
                folder = written(root, evaluation, 0.5, metrics={metric: value}, outcomes="outcomes.npz" if name == "linear" else None,
                                 git={"commit": "c0ffee" * 6, "dirty": False}, hardware={"device": "cpu", "cpu": "x", "cores": 2}, end="2026-01-02T03:04:05")
                np.savez(folder / "outcomes.npz", correct=correct, label=np.zeros(100, dtype=int))
                (folder / "samples").mkdir()
                Image.new("RGB", (4, 4)).save(folder / "samples" / "first_image.png")
    failed = Node("evaluate", "coco-m", {}, about=about("mae", "coco", 0, "AP_box"))
    Store(root).folder(failed).mkdir()
    write_json(Store(root).folder(failed) / "job.json", failed.job(root))
    write_json(Store(root).folder(failed) / "failure.json", {"message": f"no {EVIL} there"})
    return root


def made(runs: Path, *words: str) -> str:
    parser = argparse.ArgumentParser()
    Report.add_arguments(parser)
    out = runs.parent / "report.html"
    assert Report().run(parser.parse_args(["--runs", str(runs), "--out", str(out), *words])) == 0
    return out.read_text()


def test_the_page_needs_nothing_else_and_is_the_same_twice(runs: Path) -> None:
    page = made(runs)
    assert page == made(runs) and len(page) < 3_000_000
    wanted = [*re.findall(r"\b(?:src|href)=[\"']([^\"']+)", page), *re.findall(r"url\(([^)]+)\)", page)]
    assert wanted and not [w for w in wanted if not w.startswith(("data:image/", "#", "runs/"))]
    assert all((runs.parent / w).exists() for w in wanted if w.startswith("runs/")), "a link to a file that is not there"
    anchors = set(re.findall(r'id="([^"]+)"', page))
    assert {w[1:] for w in wanted if w.startswith("#")} <= anchors and "://" not in page.split("</style>")[1].replace("file://", "")


def test_the_page_says_what_the_records_say(runs: Path) -> None:
    page = made(runs)
    assert "51.0 ± 1.0 (n=3)" in page and 'class="single"' in page and "failed: no" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    headings = ["Scores", "Mean ranks", "Cost", "Score against cost", "Evaluation noise only",
                "Training curves", "Pictures", "Is the comparison fair?", "Commands"]
    assert re.findall(r"<h3>(.*?)</h3>", page) == headings
    assert "c0ffeec0ff" in page and "mae, linear: first image" in page
    assert "mae, pre-training: images, what is shown of them, and what is predicted" in page and "since its decoder is gone" in page
    command = "python -m harness run --methods mae --evals ade20k,linear --protocol demo --backbone tiny --tuning published --seeds 0,1,2"
    assert command in page
    assert "Evaluation noise only" not in made(runs, "--no-image-noise")


def test_a_big_picture_is_taken_in_smaller() -> None:
    # Twelve photographs at 224 pixels, four rows: 7 MB as PNG, and the page had no room for any.
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 2688, 3), dtype=np.uint8)).save(stream, format="PNG")
    broad, data = inlined(stream.getvalue())
    with Image.open(io.BytesIO(base64.b64decode(data.removeprefix("data:image/jpeg;base64,")))) as image:
        assert broad and image.size == (1000, 112) and len(data) < len(stream.getvalue()) / 10
    Image.new("RGB", (64, 64)).save(small := io.BytesIO(), format="PNG")
    assert inlined(small.getvalue()) == (False, f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}")


def test_pictures_go_by_turns(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By method, the first one's eight pictures would take the room of all others; and the last of those that fit would stand there alone.
    for folder in runs.glob("evaluate-*-m-*"):
        if (folder / "samples").is_dir():
            Image.new("RGB", (4, 4)).save(folder / "samples" / "second.png")
    page, shown = made(runs, "--methods", "mae,beit"), r"<figcaption>(\w+, \w+: (?:first|second)[^<]*)"
    wanted = [f"{m}, {e}: {p}" for p in ("first image", "second") for e in ("ade20k", "linear") for m in ("mae", "beit")]
    assert re.findall(shown, page) == wanted
    monkeypatch.setattr("results.report.PICTURES", sum(map(len, re.findall(r'src="(data:[^"]+)"', page))) - 1)
    page = made(runs, "--methods", "mae,beit")
    assert re.findall(shown, page) == wanted[:-2] and "2 more pictures lie in the runs folders" in page


def test_a_damaged_picture_costs_the_picture_and_not_the_page(runs: Path) -> None:
    for path in runs.glob("evaluate-linear-*/samples/first_image.png"):
        path.write_bytes(path.read_bytes()[:20])
    page = made(runs)
    assert "mae, linear: first image: the picture is damaged." in page and "mae, ade20k: first image</figcaption><img" in page


def test_a_page_that_cannot_be_written_is_one_line(runs: Path) -> None:
    parser = argparse.ArgumentParser()
    Report.add_arguments(parser)
    with pytest.raises(UserError, match="is a folder: name a file"):
        Report().run(parser.parse_args(["--runs", str(runs), "--out", str(runs)]))


def test_a_curve_is_thinned_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "loss": {i}}}\n' for i in range(120)) + '{"step": 7}\nbroken\n{"step": 8, "loss": NaN}\n')
    steps, losses = curve(path, 60)
    assert len(steps) == 60 and steps[0] == 0.5 and losses[-1] == 118.5 and curve(tmp_path / "none") == ((), ())


def test_what_a_pre_training_goes_on_from_has_a_chart_of_its_own(tmp_path: Path) -> None:
    # In one chart the two would pass for two seeds of the same training.
    Store(tmp_path).prepare()
    before = Node("pretrain", "beit", {"seed": 0})
    training = Node("pretrain", "beit-on", {"seed": 0}, {"parent": before})
    nodes = [before, training]
    for method, above in (("beit-on", training), ("beit", before)):
        nodes.append(Node("evaluate", f"linear-{method}", {"seed": 0}, {"checkpoint": above}, about(method, "linear")))
    for length, node in enumerate(nodes, start=2):
        lines = "".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(length))
        (written(tmp_path, node, metrics={"score": 1.0}) / "metrics.jsonl").write_text(lines)
    (sheet,) = sheets(collect([tmp_path]))
    charts_of = {title: [len(xs) for curves in series.values() for xs, _ in curves] for title, series in curves_of(sheet, Archive((tmp_path,)))[0]}
    assert charts_of == {"pre-training: beit-on": [3], "pre-training: beit-on, its parent": [2], "pre-training: beit": [2]}


def test_only_a_bar_from_zero_is_drawn_as_a_bar() -> None:
    # The length of a bar that begins at 80 would show 83 as three times 81.
    assert "opacity: 0.45" not in charts.dots([charts.Dot("a", 83.0, (82.0, 84.0)), charts.Dot("b", 81.0, (80.0, 82.0))], "top-1", ["a", "b"])
    bars = charts.dots([charts.Dot("a", 30.0, (20.0, 40.0)), charts.Dot("b", 5.0, (-1.0, 11.0)), charts.Dot("c", 6.0, None)], "top-1", ["a", "b", "c"])
    lengths = [float(right) - float(left) for left, right in re.findall(r"M([\d.]+) [\d.]+L([\d.]+)[^>]*opacity: 0.(?:45|25)", bars)]
    assert lengths == pytest.approx([6 * lengths[1], lengths[1], 1.2 * lengths[1]], abs=0.5)
    assert "opacity: 0.25" in bars and ">c: 6.00, one seed<" in bars and ">b: 5.00, 95 % CI -1.00 to 11.00<" in bars


def test_of_a_hundred_methods_charts_show_the_best() -> None:
    # A hundred names overlap; at the wrong end of the ranking they would be the wrong ones.
    names = [f"method-{i:03d}" for i in range(100)]
    bars = charts.dots([charts.Dot(n, 20.0 + i, None) for i, n in enumerate(names)], "error", names, higher_is_better=False)
    assert "error: the best 24 of 100" in bars and "method-023" in bars and "method-024" not in bars
    ranks = charts.rank_diagram({n: 1.0 + i for i, n in enumerate(names)}, 30.0, [names[i : i + 31] for i in range(70)])
    assert "the best 24 of 100" in ranks and "method-023" in ranks and "method-024" not in ranks and ranks.count("stroke-width: 4") == 1
    points = charts.scatter([(n, 1.0 + i, 50.0 - i) for i, n in enumerate(names)], "h", "score", names)
    assert points.count("<title>") == 100 and re.findall(r">(method-\d+)</text>", points) == names[:1]  # cheaper and better than all others


def test_the_front_of_a_scatter_is_what_nothing_beats() -> None:
    filled = r"<title>(\w+):[^<]*</title>(?:<defs><path[^>]*></defs>)?<use [^>]*fill: var"
    picture = charts.scatter([("cheap", 1.0, 10.0), ("beaten", 2.0, 9.0), ("best", 3.0, 20.0)], "h", "score", ["cheap", "beaten", "best"])
    assert re.findall(filled, picture) == ["cheap", "best"] and picture.count("fill-opacity: 0; stroke: var(--c1)") == 1
    twins = charts.scatter([("a", 0.0, 10.0), ("b", 0.0, 10.0), ("c", 2.0, 9.0)], "h", "score", ["a", "b", "c"])
    assert re.findall(filled, twins) == ["a", "b"]  # equal ones do not beat each other
    assert "a: 10.00 at 0<" in twins


def test_labels_of_neighbours_do_not_lie_on_each_other() -> None:
    points = [("supervised", 1.0, 10.0), ("beit-pixel", 1.1, 10.0), ("far off", 0.1, 11.0), ("at the edge", 30.0, 5.0)]
    picture = charts.scatter(points, "h", "score", [p[0] for p in points])
    anchors = {name: (look, float(x)) for x, look, name in re.findall(r'<text x="([\d.]+)"[^>]*?(?:text-anchor: (\w+);[^>]*)?>([^<]+)</text>', picture)}
    assert anchors["supervised"][0] == "end" and anchors["beit-pixel"][0] == "start"  # the other point lies where the label would: to the left
    assert anchors["at the edge"][0] == "end" and anchors["at the edge"][1] < charts.WIDTH


@pytest.mark.parametrize("name", [EVIL, "$x_1$ and $", "a" * 200, "\x00 two\nlines", "\u6f22\u5b57", "#fade99", "said: so", ' xlink:href="x" id="y"'])
def test_a_chart_takes_any_name(name: str) -> None:
    points, curves = [(name, 0.0, 1.0), ("b", 1.0, 2.0)], [([1, 2, 3], [3.0, math.nan, 1.0]), ([1, 2], [math.nan, math.inf])]
    drawn = [charts.dots([charts.Dot(name, 1.0, (0.5, 1.5), (0.9, 1.1), 1.3)], name, [name]), charts.scatter(points, "h", name, [name, "b"]),
             charts.lines({name: curves}, "step", "loss", [name]), charts.rank_diagram({name: 1.2, "b": 1.8}, 3.0, [(name, "b")])]
    for chart in drawn:
        root = ElementTree.fromstring(chart)
        told, wanted = (" ".join(text.replace("\x00", "?").split()) for text in (" ".join(root.itertext()), name))
        assert {e.tag for e in root.iter()} <= {"svg", "g", "path", "defs", "use", "text", "title"} and (wanted in told or charts.clipped(wanted) in told)


def test_charts_are_of_the_page_and_leave_matplotlib_as_it_is() -> None:
    # A colour that is fixed is unreadable in the dark, an id that two charts share makes one draw the other's marks, pyplot would open a window's backend.
    before, loaded = dict(matplotlib.rcParams), set(sys.modules)
    curves = [(range(9), [1.0 / (i + 1) for i in range(9)])]
    names = [f"m{i}" for i in range(drawing.COLOURS + 1)]
    made = [charts.lines(dict.fromkeys(names, curves), "step", "loss", names), charts.dots([charts.Dot("m1", 1.0, (0.5, 1.5), (0.9, 1.1))], "top-1", names),
            charts.dots([charts.Dot("m1", 1.0, (0.5, 1.6), (0.9, 1.1))], "top-1", names)]
    assert dict(matplotlib.rcParams) == before and "matplotlib.pyplot" not in set(sys.modules) - loaded
    assert not re.search(r"#[0-9a-f]{6}|font-family|<style|<metadata|clip-path", "".join(made))
    assert all(re.match(r'<svg viewBox="0 0 376 \d+" style="max-width:376px" role="img" aria-label="[^"]+">', m) for m in made)
    ids = re.findall(r' id="([^"]+)"', "".join(made))
    assert ids and len(set(ids)) == len(ids) and {f"#{i}" for i in ids} == set(re.findall(r'href="([^"]+)"', "".join(made)))
    assert made[0].count("stroke-dasharray") == 1 and f"<title>{names[-1]}, curve 1</title>" in made[0]  # the last has the first's colour
    assert charts.lines({"a": [([1.0], [math.nan])]}, "step", "loss", ["a"]) == ""


SCRIPT = """<script>
const rows = () => [...document.querySelectorAll("#rows-1 tbody tr")];
const heads = document.querySelectorAll("#rows-1 thead th button");
const out = [];
heads[1].focus(); heads[1].click(); out.push(rows().map(r => r.cells[1].textContent[0]).join(""));
heads[1].click(); out.push(rows().map(r => r.cells[1].textContent[0]).join(""));
const input = document.querySelector("[data-filter]"); input.value = "BEIT"; input.dispatchEvent(new Event("input"));
out.push(rows().filter(r => !r.hidden).length, performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length);
const field = rows().find(r => !r.hidden).cells[1], link = field.querySelector("a"), tip = document.getElementById(link.getAttribute("aria-describedby"));
const said = () => tip.hidden || getComputedStyle(tip).display === "none" ? "" : tip.textContent;
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
// a window behind another is told nothing of focus
const told = (element, type) => document.hasFocus() || element.dispatchEvent(new FocusEvent(type, {bubbles: true}));
link.focus(); told(link, "focusin"); const focused = said();
press("Escape"); const escaped = said();
field.dispatchEvent(new MouseEvent("mouseover", {bubbles: true})); const dismissed = said();
link.blur(); told(link, "focusout"); const left = said();
field.dispatchEvent(new MouseEvent("mouseover", {bubbles: true})); const hovered = said();
const box = tip.getBoundingClientRect(), within = box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight;
out.push(focused.startsWith("95 % CI") && focused === hovered && within && !field.title, escaped + dismissed + left === "");
const bare = document.querySelector("[data-hint]:not(:has(a))"); out.push(!bare || bare.tabIndex === 0);
location.hash = document.querySelector("#rows-1 td a").hash; dispatchEvent(new Event("hashchange"));
out.push(document.querySelector(location.hash).closest("details").open);
document.body.dataset.found = out.join(" ");
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_in_a_browser_sorting_filtering_and_hints_work_and_nothing_is_requested(runs: Path) -> None:
    page = runs.parent / "probed.html"
    page.write_text(made(runs, "--no-image-noise", "--evals", "linear").replace("</body>", SCRIPT + "</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={runs.parent / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert 'data-found="552 255 1 0 true true true true"' in done.stdout, re.findall(r'data-found="[^"]*"', done.stdout)
    assert "CONSOLE" not in done.stderr and re.search(r"@media print \{.*#hint \{ display: none \}", page.read_text())
