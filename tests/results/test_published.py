"""The published numbers: the file, the layouts that arrange it, and the names that connect it with our plugins."""

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from harness import plugins
from harness.spec import UserError
from results.beside import LAYOUTS
from results.reference import published as reader
from results.reference.names import AS_IT_IS, BACKBONES, EVALUATORS, METHODS, RELEASED, SCORED, counterpart
from results.reference.published import METRICS, published
from results.reference.remarks import REMARKS, remarks_on

ROOT = Path(__file__).resolve().parents[2]
RANGES = {"top1": (0, 100), "mIoU": (0, 100), "APbox": (0, 100), "APmask": (0, 100), "mCE": (0, 120), "hours": (1, 200)}
RANGES |= dict.fromkeys(("speedup-x", "FLOPs-x"), (1, 10))
TABLES = {  # tables, figures and sections that the file has numbers of
    "BEiT": "1 3 4 5 6 7 8 9 10 11", "BEiT-repo": "README", "MAE": "1a 1b 1c 1d 1e 1f 2 3 4 5 6 7 12 13 fig5 fig7 fig9 sec4.3 A.2 footnote2",
    "MAE-repo": "FINETUNE.md", "MAE-issue43": "", "Li21": "1", "MoCo3": "4 5 sec6.2 sec6.3", "MoCo3-repo": "README transfer", "DINO": "2 6",
    "DINO-repo": "README", "DeiT-repo": "README", "iGPT": "2 sec4.4 sec4.5 sec4.6", "D2": "README",
}


def test_all_rows_are_there_once() -> None:
    rows = published()
    assert len(rows) == 351
    assert [r for r, n in Counter(dataclasses.replace(r, value=0.0, text="") for r in rows).items() if n > 1] == []


def test_papers_tables_metrics_and_backbones_are_known() -> None:
    assert {r.paper for r in published()} == set(TABLES)
    assert [r for r in published() if r.table not in (TABLES[r.paper].split() or [""])] == []
    assert {r.backbone for r in published()} - set(BACKBONES) == {"iGPT-S", "iGPT-M", "iGPT-L", "iGPT-XL", "ViT-L/7", "ViT-H/14to16"}


def test_values_are_in_range() -> None:
    assert set(RANGES) == set(METRICS)
    assert [r for r in published() if not RANGES[r.metric][0] <= r.value <= RANGES[r.metric][1]] == []
    assert [r for r in published() if r.epochs is not None and not 0 <= r.epochs <= 1600] == []


@pytest.mark.parametrize(("found", "line"), [
    ("method,variant\n", "columns"), ("{head}\nMAE,x,ViT-B/16,IN1K,800,IN1K-ft-224,top1,high,MAE,3\n", "csv:2: could not convert"),
    ("{head}\nMAE,x,ViT-B/16,IN1K,800,IN1K-ft-224,top1,83.6,MAE\n", "csv:2: not 10 fields"),
    ("{head}\nMAE,x,ViT-B/16,IN1K,800,IN1K-ft-224,top-1,83.6,MAE,3\n", "csv:2: unknown paper 'MAE' or metric 'top-1'"),
    ("{head}\n,x,ViT-B/16,IN1K,800,IN1K-ft-224,top1,83.6,MAE,3\n", "csv:2: method empty"),
])
def test_a_damaged_file_is_refused(found: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shifted column would otherwise become a published number.
    monkeypatch.setattr(reader, "FILE", tmp_path / "published.csv")
    reader.FILE.write_text(found.format(head=",".join(reader.COLUMNS)))
    with pytest.raises(ValueError, match=line):
        reader.published.__wrapped__()


def test_each_layout_has_every_number_of_its_table_once() -> None:
    for table in LAYOUTS.values():
        shown = [n for row in table.rows for column in table.columns if (n := table.number(row, column)) is not None]
        own = [r for r in published() if (r.paper, r.table) == (table.paper, table.table)]
        assert own and sorted(map(repr, own)) == sorted(repr(n) for n in shown if n.table == table.table), table.name
        assert all(len(row.texts) == len(table.stub) - 1 and len(row.aside) == len(table.asides) for row in table.rows), table.name


def test_the_layouts_are_those_that_were_asked_for() -> None:
    beit, mae = (1, 3, 4, 5, 9, 10, 11), ("1a", "1b", "1c", "1d", "1e", "1f", 2, 3, 4, 5, 6, 7, 12, 13)
    assert list(LAYOUTS) == [*(f"beit-table{n}" for n in beit), *(f"mae-table{n}" for n in mae)]


def test_each_remark_concerns_some_row_and_the_two_beits_are_told_apart() -> None:
    assert [r.text for r in REMARKS if not any(map(r.concerns, published()))] == []
    said = {r.table: " ".join(remarks_on(r)) for r in published() if (r.paper, r.method) == ("MAE", "BEiT") and r.table in "345"}
    assert "plain ViT of BEiT's own paper" in said["3"] and all("released code" in said[t] and "MAE Table 3 is another" in said[t] for t in "45")
    (suspect,) = (r for r in published() if (r.paper, r.table, r.method) == ("BEiT", "11", "MoCo-v3"))
    assert "90.5" in remarks_on(suspect)[0]


def test_names_of_our_side_are_plugins() -> None:
    """A renamed plugin would silently lose its published numbers."""
    unknown = {name for kind, lines in (("methods", METHODS), ("evals", EVALUATORS)) for line in lines for name in (*line.names, *line.near)
               if not exists(kind, name)}
    assert unknown == set()


def test_each_release_stands_for_a_row() -> None:
    """One that stands for none is a misspelt variant or backbone; a name that two rows of one kind claim would be ambiguous."""
    for release in RELEASED:
        name = release.names[0].replace("[46]", "6")
        rows = [r for r in published() if release.stands_for(name, r)]
        assert any(r.pretrain_data == release.data or "22K" in release.data for r in rows), release
        assert [r for r in RELEASED if r.tuned == release.tuned and set(r.names) & set(release.names)] == [release]
    assert all(exists("evals", name) for pair in AS_IT_IS.items() for name in pair)


def exists(kind: str, name: str) -> bool:
    try:
        plugins.build(kind, name)
    except UserError:
        return False
    return True


def test_what_a_name_stands_for_is_unambiguous_where_it_matters() -> None:
    found = {(r.table, r.variant): counterpart(METHODS, r) for r in published() if (r.paper, r.method) == ("MAE", "BEiT")}
    assert found["3", "as-published"].names[0] == "beit" and found["4", "official-code-rerun"].names[0] == "beit@plus"
    evals = {(r.paper, r.method, r.eval): counterpart(EVALUATORS, r).names for r in published() if r.eval in ("IN1K-linear", "ADE20K-SETRPUP-ss")}
    assert evals["BEiT", "BEiT", "IN1K-linear"] != evals["MAE", "BEiT", "IN1K-linear"] == ("linear",)
    boxes = {r.eval: counterpart(EVALUATORS, r) for r in published() if r.eval.startswith("COCO") and r.method != "scratch"}
    assert {name: line.names for name, line in boxes.items() if line} == {  # Li21's setting and ViTDet never stand beside one another
        "COCO-Li21": ("coco", "coco@li21"), "COCO-Li21-25ep": ("coco@li21-25",), "COCO-Li21-50ep": ("coco@li21-50",), "COCO-ViTDet-MRCNN": ("coco@vitdet",),
    } and not any(line.near for line in boxes.values() if line)
    assert {r.eval for r in published() if counterpart(EVALUATORS, r)} >= {"IN1K-ft-224", "COCO-Li21", "IN-C", "iNat2017-ft-448"}
    assert [r.eval for r in published() if counterpart(EVALUATORS, r) and not r.eval.startswith(tuple(SCORED))] == []


def test_an_installation_that_is_not_editable_has_the_file(tmp_path: Path) -> None:
    import shutil

    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for room in ("harness", "results"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    assert (site / "results" / "reference" / "published.csv").read_bytes() == reader.FILE.read_bytes()
