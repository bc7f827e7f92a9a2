"""The papers' recipes as the tables have them, the ViT that each method gets, and the reason where no source has a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import plugins
from harness.canonical import restore
from harness.plan import Planner
from harness.request import Request
from harness.spec import UserError, ViTConfig
from protocols.paper import BACKBONES, paper

S, B, L, H = (BACKBONES[n] for n in ("vit-s16", "vit-b16", "vit-l16", "vit-h14"))

# method, backbone -> values of its recipe as printed in the table named (facts: recipes A1, A5, A6, A7, A13, A14)
ROWS = {
    ("mae", B): {"batch": 4096, "peak_lr": 2.4e-3, "epochs": 800, "warmup": 40, "betas": (0.9, 0.95), "weight_decay": 0.05, "drop_path": 0.0, "clip": None},
    ("mae@1600", H): {"batch": 4096, "peak_lr": 2.4e-3, "epochs": 1600, "min_lr": 0.0, "no_decay": (), "frozen": ("vit.pos_embed",)},
    ("beit", B): {"batch": 2048, "peak_lr": 1.5e-3, "epochs": 800, "warmup": 10, "min_lr": 1e-5, "clip": 3.0, "drop_path": 0.1, "betas": (0.9, 0.999)},
    ("beit@300", L): {"batch": 2048, "peak_lr": 1.5e-3, "epochs": 300, "clip": 1.0, "frozen": ()},
    ("beit@plus", L): {"epochs": 800, "frozen": ()},
    ("beit@intermediate", B): {"batch": 1024, "peak_lr": 4e-3, "epochs": 100, "warmup": 20, "layer_decay": 0.65, "weight_decay": 0.05, "min_lr": 1e-6},
    ("beit@intermediate", L): {"batch": 1024, "peak_lr": 2e-3, "epochs": 50, "warmup": 5, "layer_decay": 0.75},
    ("supervised", B): {"batch": 4096, "peak_lr": 1.6e-3, "epochs": 300, "warmup": 20, "weight_decay": 0.3, "drop_path": 0.1, "ema": 0.9999},
    ("supervised", H): {"peak_lr": 1.6e-3, "epochs": 200, "drop_path": 0.2, "betas": (0.9, 0.95)},
    ("deit", B): {"batch": 1024, "peak_lr": 1e-3, "epochs": 300, "warmup": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "ema": None, "weight_decay": 0.05},
    ("moco-v3", B): {"batch": 4096, "peak_lr": 2.4e-3, "epochs": 300, "warmup": 40, "min_lr": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.1,
                     "decay_vectors": True, "no_decay": (), "frozen": ("vit.pos_embed", "vit.patch_embed.*"), "clip": None, "drop_path": 0.0},
    ("moco-v3@600", L): {"peak_lr": 2.4e-3, "epochs": 600},
    ("dino@repo", B): {"batch": 1024, "peak_lr": 2e-3, "epochs": 100, "warmup": 10, "min_lr": 1e-6, "weight_decay": 0.04, "weight_decay_end": 0.4,
                       "clip": 3.0, "clip_mode": "tensor", "drop_path": 0.1, "no_decay": (), "frozen": ()},
    ("dino", B): {"batch": 1024, "peak_lr": 3e-3, "epochs": 400, "clip": 0.3},
    ("deit", S): {"batch": 1024, "peak_lr": 1e-3, "epochs": 300, "warmup": 5, "drop_path": 0.1, "weight_decay": 0.05},
    ("moco-v3", S): {"batch": 4096, "peak_lr": 2.4e-3, "epochs": 300, "frozen": ("vit.pos_embed", "vit.patch_embed.*")},
    ("dino@repo", S): {"peak_lr": 2e-3, "epochs": 100, "clip": 3.0}, ("dino@boosted", S): {"peak_lr": 2e-3, "epochs": 300, "clip": 3.0},
}


@pytest.mark.parametrize(("name", "vit"), ROWS, ids=lambda v: v if isinstance(v, str) else f"{v.width}")
def test_values_are_the_tables(name: str, vit: ViTConfig) -> None:
    """A wrong cell here is a run of weeks that reproduces nothing."""
    method = plugins.build("methods", name)
    recipe = method.recipe(paper, method.architecture(vit, True) if hasattr(method, "architecture") else vit)
    for field, value in ROWS[name, vit].items():
        found = getattr(recipe, field)
        assert found == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), field
    assert any(what == "all" for what, _ in recipe.sources)


def test_augmentation_of_the_classification_recipes() -> None:
    """Erasing and repeats are where the tables differ."""
    found = {n: plugins.build("methods", n).recipe(paper, B).augment for n in ("supervised", "deit", "beit@intermediate")}
    assert [(a.erasing, a.repeats) for a in found.values()] == [(0, 1), (0.25, 3), (0.25, 3)]
    assert {(a.mixup, a.cutmix, a.smoothing, a.rand_augment) for a in found.values()} == {(0.8, 1.0, 0.1, "rand-m9-mstd0.5-inc1")}


def test_each_method_gets_its_published_vit() -> None:
    def vit(name: str, base: ViTConfig, published: bool = True) -> ViTConfig:
        return plugins.build("methods", name).architecture(base, published)

    assert vit("mae", B).positions == "sincos-mae" and vit("mae", B, False) == B == vit("beit", B, False)
    assert (vit("beit", B).positions, vit("beit", B).key_bias, vit("beit", B).relative_bias, vit("beit", B).layer_scale) == ("learned", False, "none", None)
    plus = [vit("beit@plus", v) for v in (B, L)]
    assert [(p.positions, p.relative_bias, p.layer_scale) for p in plus] == [("none", "shared", 0.1), ("none", "shared", 1e-5)]
    assert vit("beit@plus", B, False) == dataclasses.replace(plus[0], key_bias=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A data root with two images of two classes."""
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            (tmp_path / "data" / "imagenet" / split / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8)).save(tmp_path / "data" / "imagenet" / split / name / "a.png")
    return tmp_path / "data"


def planner(photos: Path, methods: str, evals: str = "imagenet", **fields: object) -> Planner:
    request = {"protocol": "paper", "data": str(photos), **fields}
    return Planner(Request(methods=tuple(methods.split(",")), evals=tuple(evals.split(",")), **request))


def test_a_size_that_no_paper_gives_is_named_with_those_that_exist(photos: Path) -> None:
    """It is found before anything starts."""
    with pytest.raises(UserError, match=r"beit has no recipe for protocol paper with backbone vit-h14.*there is one for vit-b16, vit-l16"):
        planner(photos, "beit", backbone="vit-h14").plan()
    with pytest.raises(UserError, match=r"mae has no recipe for protocol paper with backbone vit-s16: no source gives one; there is one for vit-b16, "):
        planner(photos, "mae", backbone="vit-s16").plan()


def test_small_vits_are_tuned_and_probed_where_a_source_says_how(photos: Path) -> None:
    """MoCo v3's has 12 heads, DeiT's and DINO's 6; what no source has is a reason in its cell, or one line for an evaluator that was named."""
    nodes = [c.node for c in planner(photos, "moco-v3", "imagenet,linear,knn", backbone="vit-s16").plan().cells]
    assert all(n is not None for n in nodes) and [n.parents["checkpoint"].identity["vit"]["heads"] for n in nodes if n] == [12, 12, 12]
    imagenet, linear = (restore(n.identity["recipe"]) for n in nodes[:2] if n)
    assert (imagenet.epochs, imagenet.peak_lr, linear.peak_lr, linear.epochs) == (300, 1e-3, 12.0, 90)
    (own,) = planner(photos, "deit", backbone="vit-s16").plan().cells
    assert own.node is not None and own.node.identity["use_head"] and own.node.identity["recipe"] is None
    (probe,) = planner(photos, "dino@repo", "linear", backbone="vit-s16").plan().cells
    assert probe.node is not None and restore(probe.node.identity["plugin"]).by == "dino"
    with pytest.raises(UserError, match=r"cifar100 on dino@repo has no recipe for protocol paper with backbone vit-s16: no source gives one"):
        planner(photos, "dino@repo", "cifar100", backbone="vit-s16").plan()
    cells = planner(photos, "dino@repo", "all", backbone="vit-s16").plan().cells
    told = {c.about["eval"]: c.skipped for c in cells}
    assert "no source gives one" in told["ade20k"] and "no source gives one" in told["cifar100"]
    assert not (told["knn"] or told["linear"] or told["imagenet"])
    with pytest.raises(UserError, match=r"dino@repo has no recipe .* vit-s16-12h: no source gives one; there is one for vit-s16, vit-b16$"):
        planner(photos, "dino@repo", "knn", backbone="vit-s16-12h").plan()
    with pytest.raises(UserError, match=r"dino has no recipe .* vit-s16: .* there is one for vit-b16; variants that have one here: dino@repo, dino@boosted$"):
        planner(photos, "dino", "knn", backbone="vit-s16").plan()
    with pytest.raises(UserError, match=r"^--backbone: deit has no recipe .* vit-l16: "):  # and not that its variant `distilled` cannot have pooling=mean
        planner(photos, "deit", "knn", backbone="vit-l16", settings=("deit.pooling=mean",)).plan()


# method, backbone -> the variant of `imagenet` by which its paper fine-tunes, and what its classifier reads (recipes A2, A5, A7)
TRANSFERS = {
    ("mae@1600", "vit-b16"): ("default", "mean"), ("mae", "vit-l16"): ("default", "mean"), ("mae@pixels", "vit-h14"): ("mae-table9", "cls"),
    ("mae@pca", "vit-b16"): ("mae-table9", "cls"), ("mae@dec-depth-1", "vit-b16"): ("mae-table9", "cls"), ("mae@tokens", "vit-b16"): ("default", "mean"),
    ("beit", "vit-b16"): ("beit", "mean"), ("beit@plus", "vit-l16"): ("beit", "mean"), ("scratch", "vit-l16"): ("scratch", "cls"),
}


@pytest.mark.parametrize(("name", "backbone"), TRANSFERS)
def test_imagenet_is_tuned_as_the_methods_paper_does(photos: Path, name: str, backbone: str) -> None:
    """Recipe and read-out belong together: Table 9 with the mean of the patches is nobody's protocol. The column keeps its name, the job says which it was."""
    (cell,) = planner(photos, name, backbone=backbone).plan().cells
    by, reads = TRANSFERS[name, backbone]
    assert cell.node is not None and cell.about["eval"] == "imagenet"
    evaluator = restore(cell.node.identity["plugin"])
    assert (evaluator.by, evaluator.read_out(paper)) == (by, reads)
    variant = plugins.build("evals", "imagenet" if by == "default" else f"imagenet@{by}")
    recipe, own = restore(cell.node.identity["recipe"]), variant.recipe(paper, BACKBONES[backbone])
    assert dataclasses.replace(recipe, precision="auto", sources=()) == dataclasses.replace(own, sources=())
    assert recipe.sources == (own.sources if name != "mae@tokens" else (recipe.sources[0], *own.sources))
    if name == "mae@tokens":
        assert recipe.sources[0][0] == "all" and recipe.sources[0][1].startswith("ours: FINETUNE.md's")


def test_whose_recipe_the_user_names_is_the_one_that_is_taken(photos: Path) -> None:
    """A footnote would say it was done, and the run would have been another."""
    for method, by in (("beit", "beit-repo"), ("beit", "mae"), ("mae@pixels", "mae"), ("scratch", "mae"), ("supervised", "mae")):
        (cell,) = planner(photos, method, settings=(f"imagenet.by={by}",)).plan().cells
        assert cell.node is not None and not cell.node.identity["use_head"]
        recipe, own = restore(cell.node.identity["recipe"]), plugins.build("evals", f"imagenet@{by}").recipe(paper, B)
        assert dataclasses.replace(recipe, precision="auto") == own and restore(cell.node.identity["plugin"]).by == by
        assert any(d.startswith(f"imagenet.by={by}") for d in cell.about["deviations"])
    same = [planner(photos, "beit", settings=s).plan().cells[0].node for s in ((), ("imagenet.by=beit",))]
    assert same[0] is not None and same[1] is not None and same[0].key == same[1].key
    (size,) = planner(photos, "beit", settings=("imagenet.size=256",)).plan().cells  # another field leaves the paper's recipe in its place
    assert size.node is not None and restore(size.node.identity["plugin"]).by == "beit"


def test_rows_of_one_column_share_its_ground_whatever_they_are_tuned_by(photos: Path) -> None:
    """What each paper sets is no reason to call two rows of a column incomparable; another choice of the user's is."""
    cells = planner(photos, "mae,beit,scratch").plan().cells
    assert len({c.about["ground"] for c in cells}) == 1
    (chosen,) = planner(photos, "beit", settings=("imagenet.by=beit-repo",)).plan().cells
    assert chosen.about["ground"] != cells[0].about["ground"]


def test_data_is_the_users() -> None:
    """Nothing is generated in place of ImageNet."""
    with pytest.raises(UserError, match="--data: no folder for imagenet"):
        Planner(Request(("mae",), ("imagenet",), protocol="paper")).plan()


def test_shared_means_one_vit_and_one_fine_tuning_for_all(photos: Path) -> None:
    """paper-shared compares methods, paper reproduces papers; a ViT of a method's own is a footnote."""
    found = {p: planner(photos, "mae,beit", protocol=p).plan() for p in ("paper", "paper-shared")}
    vits = {p: [n.identity["vit"] for n in plan.nodes if n.kind == "pretrain"] for p, plan in found.items()}
    recipes = {p: [n.identity["recipe"] for n in plan.nodes if n.kind == "evaluate"] for p, plan in found.items()}
    assert vits["paper"][0] != vits["paper"][1] and vits["paper-shared"][0] == vits["paper-shared"][1]
    assert recipes["paper"][0] != recipes["paper"][1] and recipes["paper-shared"][0] == recipes["paper-shared"][1]
    assert [c.about["tuning"] for c in found["paper-shared"].cells] == ["shared", "shared"]
    plus = planner(photos, "beit@plus", protocol="paper-shared").plan()
    assert any("a ViT of its own" in note and "relative_bias shared" in note for note in plus.cells[0].about["deviations"])


def test_intermediate_fine_tuning_trains_on_from_beit(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One BEiT for both rows, under the name that --set knows it by; the files of the tokenizer are asked for by name."""
    made = planner(photos, "beit,beit@intermediate")
    plan = made.plan()
    first, second = (n for n in plan.nodes if n.kind == "pretrain")
    assert (first.name, second.name, second.parents["parent"].key) == ("beit", "beit@intermediate", first.key) and len(plan.nodes) == 4
    [reason] = made.missing.values()
    assert "dall-e/encoder.pkl: no such file" in reason and "cdn.openai.com" in reason
    before = first.key
    monkeypatch.setattr("methods.targets.load_tokenizer", lambda path: None)  # what is wrong with a file: test_released_dvae.py
    (photos / "dall-e").mkdir()
    (photos / "dall-e" / "encoder.pkl").write_bytes(b"weights")
    again = planner(photos, "beit")
    node = again.plan().nodes[0]
    assert not again.missing and node.key != before and node.where["files"]["tokenizer"].endswith("encoder.pkl")
    assert len(node.identity["files"]["tokenizer"]) == 64
