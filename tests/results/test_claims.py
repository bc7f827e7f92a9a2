"""A paper in a folder: what a plan file may be, what is kept of it, and that each shipped one can be run and fills the rows of its tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from harness import cli, layout
from harness.collect import result_of
from harness.data import folder_names
from harness.plan import Planners
from harness.request import Request, requests_of
from harness.spec import UserError
from results.beside import fill, paper_table
from results.claims import claim, of_records, read_plan
from results.reference.published import METRICS

ROOT = Path(__file__).resolve().parents[2]
PLANS = sorted(p.parent.name for p in (ROOT / "results").glob("*/plan.py"))
TOLD = sorted(p.parent.name for p in (ROOT / "results").glob("*/README.md"))
# images of the official split that an evaluator scores
SCORED = {"imagenet": 50_000, "linear": 50_000, "ade20k": 2_000, "coco": 5_000, "cifar100": 10_000, "inat2017": 95_986, "inat2018": 24_426,
          "inat2019": 3_030, "places205": 20_500, "places365": 36_500}
# rows of a paper's table that its plan does not fill, as the plan's docstring says
OPEN = {
    "beit-table1": {"ViT384-B", "ViT384-L", "iGPT-1.36B", "ViT384-B-JFT300M"}, "beit-table3": set(),
    "beit-table4": set(), "beit-table9": {"iGPT-L", "iGPT-XL", "iGPT-XL (five layers)"}, "beit-table10": set(), "beit-table11": {"ViT384-B"},
    "mae-table1": set(), "mae-table3": set(),
    "mae-table4": set(), "mae-table5": set(), "mae-table6": set(), "mae-table7": set(),
}


@pytest.fixture
def everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root that has a folder of every name and a file for DALL-E's encoder; what is in them is not looked at."""
    for folder in folder_names().values():
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dall-e").mkdir()
    (tmp_path / "dall-e" / "encoder.pkl").touch()
    monkeypatch.setattr(layout, "check_layout", lambda name, folder: None)
    monkeypatch.setattr(layout, "fingerprint", lambda name, folder: "f")
    monkeypatch.setattr("methods.targets.load_tokenizer", lambda path: None)
    return tmp_path


def test_all_claims_are_there() -> None:
    assert set(PLANS) == {*OPEN, "demo", "photos", "rivals"} and set(TOLD) == {"demo", "photos", "rivals"}
    assert all((ROOT / "results" / name / "records.jsonl.gz").is_file() for name in TOLD)  # what test_kept.py makes the tables from


@pytest.mark.parametrize("name", sorted(OPEN))
def test_a_papers_plan_fills_the_rows_of_its_tables(name: str, everything: Path) -> None:
    """Each row that the docstring does not leave out gets a number of the same protocol, and the docstring says what is expected there."""
    path = ROOT / "results" / name / "plan.py"
    found, text = read_plan(path), path.read_text()
    plan = Planners([replace(r, data=str(everything), precision="bf16") for r in found.requests]).plan()
    results = []
    for cell in plan.cells:
        assert cell.node is not None, cell.skipped
        record = {"metrics": {c["name"]: 50.0 for c in cell.about["columns"]}, "start": "2026", "identity": cell.node.identity,
                  "about": {"lineage": cell.node.lineage}, "facts": {"scored_images": SCORED[cell.about["eval"].partition("@")[0]]}}
        results.append(result_of(cell.about, "done", "", record, cell.node.key))
    fields = [f for name in found.layouts for f in fill(paper_table(name), results) if f.number is not None and METRICS[f.number.metric]]
    assert {f.row.label for f in fields if f.standing is None} == OPEN[name]
    assert [f.number.text for f in fields if f.standing and not re.search(rf"\b{re.escape(f.number.text)}\b", text)] == []
    assert f"--plan results/{name}/plan.py" in text and "\nCost: " in text


@pytest.mark.parametrize("name", TOLD)
def test_a_readmes_line_is_the_plan(name: str) -> None:
    folder = ROOT / "results" / name
    line = next(x.strip() for x in (folder / "README.md").read_text().splitlines() if "harness run --methods" in x)
    requests, _ = requests_of(cli.parser().parse_args(shlex.split(line)[3:]), None)
    assert requests == read_plan(folder / "plan.py").requests


GOOD = "from harness.request import Request\ndef plan():\n    return Request(('scratch', 'mae'), ('linear',), 'smoke')\n"


@pytest.mark.parametrize(("text", "line"), [
    (None, "no such file: name a plan, as in results/demo/plan.py"),
    ("def plan(:", r"cannot be imported \(SyntaxError: "),
    ("import nothing_of_that_name", r"cannot be imported \(ModuleNotFoundError: "),
    ("x = 1", r"has no function plan\(\)"),
    ("def plan(): return 1 / 0", r"its plan\(\) fails \(ZeroDivisionError: "),
    ("def plan(): return {'methods': 'mae'}", r"its plan\(\) returns dict, not a harness.request.Request or several"),
    ("def plan(): return ()", r"its plan\(\) returns nothing"),
    (GOOD.replace("('linear',)", "'linear'"), "evals of its request must be a tuple of names, not 'linear'"),
    (GOOD.replace("'smoke'", "seeds=('0',)"), r"seeds of its request must be a tuple of integers, not \('0',\)"),
    (GOOD + "LAYOUTS = ('mae-tabel3',)", "--layout: unknown name 'mae-tabel3': did you mean mae-table3?"),
])
def test_a_wrong_plan_is_one_line(text: str | None, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "plan.py").write_text(text)
    assert cli.main(["run", "--plan", str(tmp_path / "plan.py"), "--runs", str(tmp_path / "runs")]) == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert re.search(line, found) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("words", "line"), [
    (["--methods", "mae"], "--methods: --plan .*plan.py says which: leave one of them out"),
    (["--evals", "linear"], "--evals: --plan .*plan.py says which"),
    (["--set", "beit.epochs=3"], "--set beit.epochs: no such method or evaluator in this run"),
])
def test_flags_that_a_plan_refuses(words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], smoke_data: Path) -> None:
    (tmp_path / "plan.py").write_text(GOOD)
    assert cli.main(["run", "--plan", str(tmp_path / "plan.py"), "--data", str(smoke_data), "--dry-run", *words]) == 2
    assert re.search(line, capsys.readouterr().err)
    assert cli.main(["run", "--methods", "mae", "--evals", "linear", "--out", "x"]) == 2 and "--out: belongs to --plan" in capsys.readouterr().err
    assert cli.main(["run", "--methods", "mae"]) == 2 and "name --methods and --evals, or --plan FILE" in capsys.readouterr().err


def test_flags_take_the_place_of_a_plans_values(tmp_path: Path) -> None:
    (tmp_path / "plan.py").write_text(GOOD)
    words = ["run", "--plan", str(tmp_path / "plan.py"), "--seeds", "0,1", "--data", "d", "--set", "mae.mask_ratio=0.5", "--out", str(tmp_path / "out")]
    requests, keep = requests_of(cli.parser().parse_args(words), "bf16")
    assert requests == (Request(("scratch", "mae"), ("linear",), "smoke", seeds=(0, 1), data="d", settings=("mae.mask_ratio=0.5",), precision="bf16"),)
    assert keep is not None and (tmp_path / "out").is_dir()


def test_a_plan_that_flags_have_changed_does_not_overwrite_its_tables(tmp_path: Path) -> None:
    (tmp_path / "plan.py").write_text(GOOD)
    _, keep = claim(tmp_path / "plan.py", None, ["--seeds"], True)
    assert "not kept beside the plan, --seeds changes it: add --out DIR" in keep([], []) and not (tmp_path / "table.md").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: name a folder where its tables can be kept"):
        claim(tmp_path / "plan.py", str(tmp_path / "file"), [], True)


def test_a_plan_runs_and_keeps_its_tables(harness: Callable[..., CompletedProcess[str]], tmp_path: Path, smoke_data: Path) -> None:
    """Two requests in one graph: the table on stdout is that of the folder, and the kept records make it again."""
    text = GOOD.replace("return Request(('scratch', 'mae'), ('linear',), 'smoke')", "return [Request((m,), ('knn',), 'smoke') for m in ('scratch', 'mae')]")
    (tmp_path / "plan.py").write_text(text)
    done = harness("run", "--plan", "plan.py", "--launcher", "debug")
    assert done.returncode == 0, done.stderr
    kept = {p.name for p in tmp_path.iterdir() if p.is_file()} - {"plan.py"}
    assert kept == {"records.jsonl.gz", "table.md", "table.json", "seeds.csv", "audit.txt", "report.html"} and "kept in ." in done.stderr
    assert (tmp_path / "table.md").read_text() == done.stdout and done.stdout.count("| scratch") == done.stdout.count("| mae") == 1
    claim = read_plan(tmp_path / "plan.py")
    assert {name: (tmp_path / name).read_bytes() for name in claim.tables()} == claim.tables() and len(claim.archive.kept) == 2
    page = (tmp_path / "report.html").read_text()
    assert of_records(page) == of_records(claim.page()) and "runs/evaluate-knn" in page and "<img" in page
