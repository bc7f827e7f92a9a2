"""What may stand beside a published number, what is told about it, and when a verdict is given."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest

from harness import plugins
from harness.canonical import canonical
from harness.collect import Result
from harness.spec import Metric
from protocols.paper import BACKBONES, paper
from results.ancestry import Archive
from results.beside import LAYOUTS, fill, paper_table
from results.cells import sheets
from results.reference.names import EVALUATORS, METHODS, counterpart
from results.reference.published import published
from results.staleness import Staleness
from results.standing import Standing, compare
from results.table import Table

VIT = {"patch": 16, "width": 768, "depth": 12, "heads": 12, "positions": "sincos-mae"}
TOP1 = Metric("top-1")


def measured(*scores: float, method: str = "mae", evaluator: str = "imagenet", epochs: float | None = 1600, metric: Metric = TOP1, **changed) -> list[Result]:
    """Results of a paper run, one for each pre-training seed. `changed` replaces fields of the results, or parts of the identities."""
    evaluation = {"kind": "evaluate", "family": changed.pop("family", "paper"), "recipe": {"epochs": 100}, "parents": {"checkpoint": "k"}}
    pretraining = {"kind": "pretrain", "family": "paper", "recipe": {"epochs": epochs, "iterations": None}, "vit": {**VIT, **changed.pop("vit", {})},
                   "data": {changed.pop("pretrained_on", "imagenet"): "f"}, "parents": changed.pop("parents", {}), "files": changed.pop("files", {})}
    facts = {"scored_images": changed.pop("scored", 50_000)}
    plain = Result(method=method, eval=evaluator, protocol="paper", backbone="vit-b16", data="data", seed=0, eval_seed=0, metrics={}, columns=(metric,),
                   status="done", start="2026-01-01", settings=f"{method}{evaluator}{epochs}", lineage=(evaluation, pretraining), facts=facts)
    return [replace(plain, seed=s, key=f"{method}{evaluator}{epochs}{s}{changed}", metrics={metric.name: v}, **changed) for s, v in enumerate(scores)]


def standing(results: Sequence[Result], layout: str = "mae-table3", row: str = "MAE", column: str = "ViT-B") -> Standing | None:
    (field,) = (f for f in fill(paper_table(layout), results) if (f.row.label, f.column.heading) == (row, column))
    assert field.standing is None or field.kept_out is None
    return field.standing or field.kept_out


def beside_of(results: Sequence[Result]) -> list[float | None]:
    return [row["published"] for row in json.loads(Table.render(results, "json"))]


def test_the_same_protocol_gets_difference_spread_and_verdict() -> None:
    s = standing(measured(83.4, 83.5, 83.6))
    # t(0.975, 2) = 4.30265, s = 0.1: 0.430265 * sqrt(1 + 1/3)
    assert s.difference == pytest.approx(-0.1) and s.spread == pytest.approx((83.5 - 0.49683, 83.5 + 0.49683), abs=1e-4) and s.verdict == "within"
    assert (s.barred, s.differences) == ((), ())
    assert standing(measured(82.4, 82.5, 82.6)).verdict == "outside"


def test_one_seed_gives_no_verdict() -> None:
    # A single run that happens to hit the number proves nothing, and one that misses it neither.
    assert standing(measured(83.6)).verdict == "no verdict: n = 1"


def test_a_spread_smaller_than_the_printed_digit_is_no_contradiction() -> None:
    assert standing(measured(83.64, 83.641, 83.642)).verdict == "within"


@pytest.mark.parametrize("changed", [{"family": "demo"}, {"family": "smoke"}, {"vit": {"width": 128}}, {"vit": {"patch": 14}}, {"method": "nobody"},
                                     {"evaluator": "nothing"}, {"metric": Metric("top-5")}, {"lineage": ()}])
def test_another_thing_never_stands_there(changed: dict) -> None:
    results = measured(83.5, 83.6, **changed)
    assert standing(results) is None and beside_of(results) == [None]


@pytest.mark.parametrize(("changed", "told"), [
    ({"epochs": 800}, "pre-trained for 800 epochs, published with 1600 epochs"),
    ({"epochs": None}, "pre-trained for None iterations, published with 1600 epochs"),
    ({"pretrained_on": "folder"}, "pre-trained on other images (folder), published on ImageNet-1K"),
    ({"protocol": "paper-shared"}, "protocol paper-shared: not each method as published"),
    ({"tuning": "shared"}, "one fine-tuning recipe for all methods, not each paper's"),
    ({"deviations": ("imagenet.recipe.lr=1 (recipe: 2; FINETUNE.md)",)}, "deviates from the recipe: imagenet.recipe.lr=1 (recipe: 2; FINETUNE.md)"),
])
def test_what_differs_is_a_footnote_and_takes_the_verdict(changed: dict, told: str) -> None:
    results = measured(83.5, 83.6, **changed)
    s = standing(results)
    assert s.differences == (told,) and s.barred == () and s.verdict == "no verdict: protocol differs" and s.difference == pytest.approx(-0.05)
    assert told in Table.render_layout("mae-table3", results)
    assert beside_of(results) == [None]  # an ordinary table puts exactly the same protocol beside, or nothing


@pytest.mark.parametrize(("changed", "told"), [
    ({"scored": 20}, "scored on 20 images (data), the official split has 50000"),
    ({"facts": {}}, "scored on an unknown number of images"),
    ({"deviations": ("mae.mask_ratio=0.6 (recipe: 0.75; A1)",)}, "another configuration: mae.mask_ratio=0.6"),
    ({"deviations": ("imagenet.holdout=0.1 (recipe: 0; x)",)}, "another configuration: imagenet.holdout=0.1"),
])
def test_what_is_the_same_by_name_only_is_kept_out_and_it_is_said_why(changed: dict, told: str) -> None:
    results = measured(83.5, 83.6, **changed)
    assert told in standing(results).barred[0]
    text = Table.render_layout("mae-table3", results)
    assert told in text and "| 83.6 [" not in text and "83.5 ±" not in text and beside_of(results) == [None]


def test_a_tokenizer_of_ones_own_is_told_where_the_paper_had_dall_es() -> None:
    beit = {"method": "beit", "epochs": 800, "vit": {"positions": "learned"}}
    own = standing(measured(83.0, 83.2, parents={"tokenizer": "k"}, **beit), row="BEiT")
    assert own.differences == ("tokenizer trained here, published with DALL-E's",)
    assert standing(measured(83.0, 83.2, files={"tokenizer": "sha"}, **beit), row="BEiT").differences == ()


def test_lengths_of_one_method_find_their_own_rows() -> None:
    # In an ordinary table the newest settings win; Table 4 has 300 and 800 epochs of the same method.
    dalle = {"files": {"tokenizer": "sha256"}}
    results = [*measured(82.9, 82.7, method="beit", epochs=300, **dalle), *measured(83.1, 83.3, method="beit", epochs=800, **dalle)]
    for label, epochs in (("BEiT (300 epochs)", 300), ("longer pre-training (800 epochs)", 800)):
        s = standing(results, "beit-table4", label, "ImageNet top-1")
        assert s.cell.example.lineage[1]["recipe"]["epochs"] == epochs and s.differences == () and s.verdict == "within"


def segmented(method: str, evaluator: str, epochs: int, **more) -> list[Result]:
    return measured(45.0, 45.2, method=method, evaluator=evaluator, epochs=epochs, metric=Metric("mIoU"), scored=2_000, **more)


def test_a_near_evaluator_stands_with_its_difference_named() -> None:
    s = standing(segmented("mae", "ade20k@mae-160k", 1600), "mae-table5")
    assert "published with 100 epochs" in s.differences[0] and len(s.differences) == 1 and s.verdict.startswith("no verdict")
    (row,) = (r for r in published() if (r.method, r.eval, r.paper, r.backbone) == ("BEiT", "IN1K-linear", "BEiT", "ViT-B/16"))
    told = {}
    for name in ("linear@beit", "linear@beit-repo", "linear"):
        (sheet,) = sheets(measured(57.0, method="beit", evaluator=name, epochs=800, files={"tokenizer": "s"}))
        (cell,) = sheet.cells.values()
        told[name] = compare(cell, row).differences
    assert told["linear@beit"] == () and "at the best block" in told["linear@beit-repo"][0] and "MAE's protocol" in told["linear"][0]


@pytest.mark.parametrize(("evaluator", "where"), [("ade20k", "mae-table5"), ("ade20k@mae", "mae-table5"), ("ade20k@setr", "beit-table3"),
                                                  ("ade20k@beit", "beit-table5"), ("ade20k@beit-640", ""), ("ade20k@mae-long-seq", "")])
def test_the_three_protocols_of_ade20k_are_never_mixed(evaluator: str, where: str) -> None:
    """Each number of UperNet or SETR beside the tables of its own protocol, without a footnote, and in no other."""
    tokens = {"files": {"tokenizer": "s"}}
    results = [*segmented("mae", evaluator, 1600), *segmented("beit", evaluator, 800, **tokens), *segmented("beit", evaluator, 300, **tokens)]
    fields = {("mae-table5", "MAE", "ViT-B"), ("beit-table3", "BEiT", "ADE20K mIoU"), ("beit-table5", "ViT (as in the paper's other tables)", "ADE20K mIoU")}
    found = {layout: standing(results, layout, row, column) for layout, row, column in fields}
    assert {layout for layout, s in found.items() if s is not None} == ({where} if where else set())
    assert all(s.differences == () and s.barred == () for s in found.values() if s is not None)


def test_from_scratch_the_fine_tuning_is_the_training() -> None:
    (result,) = measured(82.0, method="scratch")
    evaluation, pretraining = result.lineage
    trained = replace(result, lineage=({**evaluation, "recipe": {"epochs": 300}}, {**pretraining, "recipe": None}))
    assert standing([trained], row="scratch").differences == ()
    short = replace(result, lineage=({**evaluation, "recipe": {"epochs": 100}}, {**pretraining, "recipe": None}))
    assert standing([short], row="scratch").differences == ("trained for 100 epochs, published with 300 epochs",)


def of_file(name: str, *scores: float, **changed) -> list[Result]:
    """Results on a checkpoint of somebody else's: nothing of its training is in the record."""
    results = measured(*scores, method=f"weights:{name}", **changed)
    return [replace(r, lineage=(r.lineage[0], {**r.lineage[1], "recipe": None, "data": {}})) for r in results]


MCE = Metric("mCE", higher_is_better=False)


@pytest.mark.parametrize(("file", "changed", "number"), [
    ("some/where/mae_pretrain_vit_base.pth", {}, 83.6), ("vit_base_patch16_224.mae", {"evaluator": "linear"}, 68.0),
    ("hub/models--facebook--vit-mae-base/snapshots/0a1b", {}, 83.6), ("facebook/vit-mae-base", {}, 83.6), ("vit-mae-base/model.safetensors", {}, 83.6),
    ("mae_finetuned_vit_base.pth", {"evaluator": "head"}, 83.6), ("deit_base_patch16_224-b5f2ef4d.pth", {"evaluator": "head"}, 81.8),
    ("mae_finetuned_vit_base.pth", {"evaluator": "imagenet-c@head", "metric": MCE}, 51.7),
    ("deit_base_patch16_224.fb_in1k", {"evaluator": "inat2018@deit", "scored": 24_426}, 73.2),
    ("dino_vitbase16_pretrain.pth", {"evaluator": "knn"}, 76.1), ("vit-b-300ep.pth.tar", {"evaluator": "linear@mocov3"}, 76.7),
    ("dino_deitsmall16_pretrain.pth", {"evaluator": "knn", "vit": {"width": 384, "heads": 6}}, 74.5),
    ("dino_deitsmall16_pretrain.pth", {"evaluator": "knn"}, None),
    # trained on anew, what is published of the file itself is another thing; and a name that is not known stands nowhere
    ("mae_finetuned_vit_base.pth", {}, None), ("deit_base_patch16_224.fb_in1k", {}, None), ("mae_pretrain_vit_base-mine.pth", {}, None),
    ("checkpoint.pth", {}, None), ("mae_pretrain_vit_large.pth", {}, None), ("mae_pretrain_vit_base.pth", {"deviations": ("positions interpolated",)}, None),
    ("mae_pretrain_vit_base.pth", {"deviations": ("as read: mean and std are not in the file: ImageNet's",)}, 83.6),
])
def test_a_released_checkpoint_is_known_by_its_name(file: str, changed: dict, number: float | None) -> None:
    results = of_file(file, 83.5, 83.6, **changed)
    assert beside_of(results) == [number]
    assert ("taken by name" in Table.render(results)) == (number is not None)


def test_what_is_known_of_a_release_is_told_beside_a_number() -> None:
    beit = of_file("beit_base_patch16_224_pt22k.pth", 83.0, evaluator="imagenet")
    s = standing(beit, "beit-table5", "ViT + LayerScale + relative position bias", "ImageNet top-1")
    assert s.notes == ("published for beit_base_patch16_224_pt22k; taken by name",)
    assert [d.split(",")[0].removeprefix("the released weights are pre-trained ") for d in s.differences] == [
        "on IN22K+DALLE", "for 150 epochs", "fine-tuned by MAE's recipe"]
    text = Table.render_layout("beit-table5", beit)
    assert all(told in text for told in (*s.notes, *s.differences)) and "83.0" in text
    (row,) = (r for r in json.loads(Table.render_layout("beit-table5", beit, "json")) if r["value"])
    assert row["remarks"] == list(s.notes) and row["verdict"].startswith("no verdict")
    mae = of_file("mae_pretrain_vit_base.pth", 83.5, 83.7)
    assert standing([*mae, *measured(83.5, 83.7)]).notes == ()  # what was pre-trained here comes first
    assert standing(mae).verdict == "within" and standing(mae).notes[1].startswith("one checkpoint")


# ------------------------------------------------------------------------------------------------------ tables as printed


def test_an_ordinary_table_shows_the_published_number_with_its_source() -> None:
    results = [*measured(83.4, 83.6), *measured(83.4, 83.6, method="mae@pca")]
    rows = json.loads(Table.render(results, "json"))
    assert [(r["published"], r["published_source"]) for r in rows] == [(83.6, "MAE-paper Table 3"), (None, None)]
    text = Table.render(results)
    assert "**83.5 ± 0.1 (n=2)**, published 83.6 [a]" in text and "- [a] published: MAE-paper Table 3" in text and text.count("published 8") == 1


def test_beside_a_paper_a_single_seed_is_grey_too_and_a_stale_number_starred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("results.staleness.Staleness.reasons", lambda self, result: ("imagenet was version 0, is 1",))
    text = Table.render_layout("mae-table3", measured(83.6), staleness=Staleness(Archive((tmp_path,))))
    assert "83.6 (n=1), 0.0 no verdict * [" in text.replace("+", "") and "stale: imagenet was version 0, is 1" in text
    assert r"\textcolor{gray}{83.6 (n=1)" in Table.render_layout("mae-table3", measured(83.6), "latex")
    assert "textcolor" not in Table.render_layout("mae-table3", measured(83.5, 83.7), "latex")


def test_what_was_never_published_is_told_unless_the_methods_paper_has_it() -> None:
    sources = [["warmup", "Table 2"], ["all", "Table 9"], ["lr, warmup", "ours: Table 9's, the values were never published"]]
    (result,) = measured(75.0)
    evaluation, pretraining = result.lineage
    told = "ours, not published: lr of imagenet: Table 9's, the values were never published"
    chosen = replace(result, lineage=({**evaluation, "recipe": {"epochs": 100, "sources": sources}}, pretraining))
    assert told in Table.render([chosen]) and told in Table.render_layout("mae-table3", [chosen])
    assert json.loads(Table.render([chosen], "json"))[0]["remarks"] == [told]
    assert [r["remarks"] for r in json.loads(Table.render_layout("mae-table3", [chosen], "json")) if r["value"]] == [[told]]
    demo = replace(chosen, lineage=({**chosen.lineage[0], "family": "demo"}, pretraining))
    assert "not published" not in Table.render([demo])  # the caption says it of the whole table


def test_a_row_that_its_paper_tunes_by_another_table_says_so_and_what_of_it_is_ours() -> None:
    """BEiT's own cells lost "ours" when all sources of Table 13 were joined into one."""
    recipe = canonical(plugins.build("evals", "imagenet@beit").recipe(paper, BACKBONES["vit-b16"]))
    (result,) = measured(83.0, method="beit", epochs=800)
    evaluation, pretraining = result.lineage
    tuned = replace(result, lineage=({**evaluation, "recipe": recipe, "plugin": {"by": "beit"}}, pretraining))
    text = Table.render([tuned])
    assert "imagenet tuned by BEiT-paper Table 13, ImageNet, Base (recipes A7)" in text
    assert "ours, not published: lr of imagenet: one of the paper's sweep of 2e-3 to 5e-3" in text
    assert "tuned by" not in Table.render([replace(tuned, eval="imagenet@beit")])  # the column's name says it
    (probed,) = measured(50.0, evaluator="linear")
    probed = replace(probed, lineage=({**probed.lineage[0], "plugin": {"by": "mae"}}, probed.lineage[1]))
    assert "tuned by" not in Table.render([probed])  # the column's own protocol


def test_a_published_number_stands_beside_its_own_recipe() -> None:
    """DeiT's 384 pixels are 30 epochs, not BEiT's ten; DINO fine-tunes on iNaturalist otherwise than DeiT; one read-out is the published one."""
    files = {"pretrained_on": "imagenet", "epochs": 300}
    deit = standing(measured(83.0, method="deit", evaluator="imagenet@deit-384", **files), "beit-table1", "DeiT384-B", "ImageNet top-1")
    beits = standing(measured(83.0, method="deit", evaluator="imagenet@384", **files), "beit-table1", "DeiT384-B", "ImageNet top-1")
    assert deit.differences == () and beits.differences == ("10 epochs at 384, as BEiT's; published with DeiT's 30",)
    names = {(r.method, r.eval): counterpart(EVALUATORS, r).names for r in published() if r.paper == "DINO" and r.eval.startswith("iNat")}
    assert names == {("DINO", "iNat2018-ft"): ("inat2018@dino",), ("DINO", "iNat2019-ft"): ("inat2019@dino",),
                     ("supervised", "iNat2018-ft"): ("inat2018@deit",), ("supervised", "iNat2019-ft"): ("inat2019@deit",)}
    cls, mean = (standing(measured(82.0, method=m, epochs=300), row="scratch") for m in ("supervised", "supervised@mean"))
    assert cls.differences == () and "mean of the patch tokens" in mean.differences[0]


def test_a_rivals_own_recipe_under_the_plain_name_is_the_published_one() -> None:
    """`linear` of DINO is probed as by DINO where each method is tuned as published, and as by MAE otherwise; the same of MoCo v3's fine-tuning."""
    def differences(by: str, method: str, row: str, layout: str, column: str, evaluator: str, epochs: int) -> tuple[str, ...]:
        (result,) = measured(78.0, method=method, evaluator=evaluator, epochs=epochs)
        evaluation, *before = result.lineage
        return standing((replace(result, lineage=({**evaluation, "plugin": {"by": by}}, *before)),), layout, row, column).differences

    assert differences("dino", "dino", "DINO-B", "beit-table9", "ImageNet top-1", "linear", 400) == ()
    assert [list(counterpart(METHODS, r).near) for r in published() if r.variant == "vanilla-100ep"] == [["dino@repo"]]  # of half the batch
    assert "probed by MAE's protocol" in differences("mae", "dino", "DINO-B", "beit-table9", "ImageNet top-1", "linear", 400)[0]
    assert differences("mocov3", "moco-v3", "MoCo v3", "mae-table3", "ViT-B", "imagenet", 300) == ()
    assert "as by MAE" in differences("mae", "moco-v3", "MoCo v3", "mae-table3", "ViT-B", "imagenet", 300)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_a_run_each_layout_prints_its_numbers_in_every_format(name: str) -> None:
    table = paper_table(name)
    numbers = [n.text for row in table.rows for column in table.columns if (n := table.number(row, column))]
    for format in ("markdown", "latex", "html"):
        text = Table.render_layout(name, [], format)
        assert all(text.count(n) >= numbers.count(n) for n in numbers) and "Nothing of the same protocol is measured yet" in text
    rows = json.loads(Table.render_layout(name, [], "json"))
    assert [r["published_text"] for r in rows] == numbers and {r["value"] for r in rows} == {None} and {r["status"] for r in rows} == {"missing"}
    frame = pandas.read_csv(io.StringIO(Table.render_layout(name, [], "csv")), dtype=str)
    assert list(frame.published_text) == numbers and list(frame.columns)[:3] == ["method", "eval", "metric"]


def test_a_measured_layout_shows_both_side_by_side() -> None:
    results = [*measured(83.4, 83.5, 83.6), *measured(82.0, method="scratch", epochs=300)]
    (line,) = (x for x in Table.render_layout("mae-table3", results).splitlines() if x.startswith("| MAE"))
    assert [x.strip() for x in line.split("|")][3:5] == ["83.6", "83.5 ± 0.1 (n=3), −0.1 within"]
    assert "82.0 (n=1), −0.3 no verdict" in Table.render_layout("mae-table3", results)
    (row,) = (r for r in json.loads(Table.render_layout("mae-table3", results, "json")) if r["verdict"] == "within")
    assert (row["method"], row["eval"], row["published"], row["value"], row["difference"]) == ("mae", "imagenet", 83.6, 83.5, pytest.approx(-0.1))
    assert (row["layout"], row["row"], row["column"]) == ("mae-table3", "MAE IN1K", "ViT-B")


def test_layouts_are_well_formed_in_html_and_latex() -> None:
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    for name in LAYOUTS:
        Checker().feed(Table.render_layout(name, measured(83.4, 83.6, epochs=300), "html"))
        assert not opened
        lines = [x for x in Table.render_layout(name, [], "latex").replace(r"\&", "").splitlines() if x.endswith(r"\\")]
        assert len({x.count("&") for x in lines}) == 1, name


def test_each_number_of_the_file_can_be_repeated_by_the_plugins_that_stand_for_it() -> None:
    """The road back: a run of a row's counterpart with its length and images must find that number, or one of the same model printed elsewhere."""
    found = []
    for name, row in (("MAE", "norm-pix"), ("BEiT", "plain-ViT")):
        p = next(r for r in published() if (r.method, r.variant, r.eval, r.backbone) == (name, row, "IN1K-ft-224", "ViT-B/16"))
        found.append(beside_of(measured(p.value, method=name.lower(), epochs=p.epochs, files={"tokenizer": "s"} if name == "BEiT" else {})) == [p.value])
    assert found == [True, True]
