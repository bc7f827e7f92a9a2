"""Fine-tuning evaluators: learn what can be learnt, resume to the same number, score a pre-trained head, name what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evals.finetune import FineTuning, ImageFolder, ImageNet, INat2018, Places365
from evals.recipes import PUBLISHED
from evals.scoring import labelled_images, predict
from harness.augment import EvalTransform
from harness.canonical import canonical, digest, restore
from harness.checkpoint import Backbone
from harness.classifier import Classifier
from harness.optim import lr_at
from harness.plugins import EvalContext, Session, build, group
from harness.randomness import seed_all
from harness.settings import source_of
from harness.spec import Augment, Interrupted, JobFailed, Overrides, Protocol, Recipe, UserError, ViTConfig
from harness.vit import ViT, init_mae

CONFIG = ViTConfig(size=(16, 16), patch=8, width=32, depth=2, heads=2)
TINY = Protocol("tiny", "smoke", "for tests", {"tiny": CONFIG}, "tiny")
COLORS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
RECIPE = Recipe(batch=8, lr=5e-3, iterations=20, warmup=2, layer_decay=0.9, augment=Augment(crop_scale=(0.5, 1.0), smoothing=0.1))


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """A class folder whose classes are told apart by colour: 3 x 8 training and 3 x 4 validation images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, color in COLORS.items():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(color, 25, (20, 22, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def backbone(config: ViTConfig = CONFIG, classifier: dict | None = None) -> Backbone:
    """Untrained weights, the same each time."""
    seed_all("backbone")
    vit = ViT(config)
    init_mae(vit)
    return Backbone(config, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), vit.state_dict(), classifier)


def context(
    folder: Path, data: Path, stop_after: int | None = None, recipe: Recipe | None = RECIPE, name: str = "imagenet", **more: object
) -> EvalContext:
    """A job's context in fp32; with `stop_after` it is asked to stop after so many steps."""
    looks = [0]

    def should_stop() -> bool:
        looks[0] += 1
        return stop_after is not None and looks[0] >= stop_after

    folder.mkdir(exist_ok=True)
    session = Session(folder, 7, torch.device("cpu"), torch.float32, {name: data}, should_stop=should_stop)
    return EvalContext(session, TINY, recipe, **more)  # type: ignore[arg-type]


def test_learns_what_can_be_learnt(colors: Path, tmp_path: Path) -> None:
    """Labels out of step with images, or an untrained head, would score a third."""
    outcome = ImageNet().run(backbone(), context(tmp_path / "job", colors))
    assert set(outcome.metrics) == {m.name for m in ImageNet.columns} and outcome.metrics["top-1"] > 90
    with np.load(outcome.outcomes) as saved:
        assert 100 * saved["correct"].mean() == outcome.metrics["top-1"] and saved["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert outcome.facts["images_seen"] == 160 and outcome.facts["flops"] > 0


@pytest.mark.parametrize("stop", [1, 9, 21])
def test_stopped_at_any_moment_ends_with_the_same_number(colors: Path, tmp_path: Path, stop: int) -> None:
    """Killed in training or while scoring (after step 20): the same outcomes file, byte for byte."""
    recipe = dataclasses.replace(RECIPE, lr=1e-3, drop_path=0.2, augment=dataclasses.replace(
        RECIPE.augment, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0))
    whole = ImageNet().run(backbone(), context(tmp_path / "whole", colors, recipe=recipe))
    with pytest.raises(Interrupted):
        ImageNet().run(backbone(), context(tmp_path / "parts", colors, stop, recipe))
    assert not (tmp_path / "parts" / "outcomes.npz").exists()
    resumed = ImageNet().run(backbone(), context(tmp_path / "parts", colors, recipe=recipe))
    assert resumed.metrics == whole.metrics and resumed.facts["loss"] == whole.facts["loss"]
    assert resumed.outcomes.read_bytes() == whole.outcomes.read_bytes()


def test_shared_relative_bias_becomes_one_per_block(colors: Path, tmp_path: Path) -> None:
    """BEiT's checkpoints have a shared table; its fine-tuning trains one per block (recipes A7)."""
    config = dataclasses.replace(CONFIG, relative_bias="shared", key_bias=False, layer_scale=0.1)
    recipe = dataclasses.replace(RECIPE, iterations=2)
    ImageNet().run(backbone(config), context(tmp_path / "job", colors, recipe=recipe))
    state = torch.load(sorted((tmp_path / "job" / "checkpoint" / "train").glob("state-*.pt"))[-1], weights_only=True)
    assert {"vit.relative_bias.0.table", "vit.relative_bias.1.table"} <= set(state["objective"])


def own_head(classes: tuple[str, ...] = tuple(sorted(COLORS))) -> Backbone:
    """A checkpoint as the supervised method leaves it."""
    base = backbone()
    seed_all("head")
    return dataclasses.replace(base, classifier=Classifier(base.build(), classes, mean=base.mean, std=base.std, pooling="cls").classifier())


def test_own_classifier_is_scored_without_training(colors: Path, tmp_path: Path) -> None:
    """The supervised row of the imagenet column is the pre-training's own accuracy."""
    checkpoint, place = own_head(), context(tmp_path / "job", colors, recipe=None, overrides=Overrides(use_head=True))
    outcome = ImageNet().run(checkpoint, place)
    _, val = labelled_images("imagenet", place.session)
    model = Classifier.restore(checkpoint.build(), checkpoint.classifier, checkpoint.mean, checkpoint.std)  # type: ignore[arg-type]
    expected = predict(model, val, EvalTransform((16, 16)), place.session)
    with np.load(outcome.outcomes) as saved:
        assert saved["correct"].tolist() == (expected == val.labels).tolist()
    assert outcome.facts["images_seen"] == 0 and not (tmp_path / "job" / "checkpoint" / "train").exists()


def test_own_classifier_that_does_not_fit_is_refused(colors: Path, tmp_path: Path) -> None:
    """Equal numbers of classes in another order would give a plausible, wrong number."""
    cases = [
        (own_head(("red", "green", "blue")), ImageNet(), "knows other classes than imagenet"),
        (backbone(), ImageNet(), "left no classifier"),
        (own_head(), ImageNet(holdout=0.25), "trained on by the pre-training"),
    ]
    for checkpoint, evaluator, message in cases:
        with pytest.raises(JobFailed, match=message) as error:
            evaluator.run(checkpoint, context(tmp_path / "job", colors, recipe=None, overrides=Overrides(use_head=True)))
        assert "\n" not in str(error.value)


def test_holdout_is_scored_instead_of_val(colors: Path, tmp_path: Path) -> None:
    """Tuning must not look at val, not even read it."""
    for file in (colors / "val").glob("*/*.png"):
        file.write_bytes(b"never read")
    outcome = ImageNet(holdout=0.25).run(backbone(), context(tmp_path / "job", colors))
    assert outcome.facts["scored_images"] == 6
    for wrong in (-0.1, 1.0):
        with pytest.raises(UserError, match="holdout"):
            ImageNet(holdout=wrong)


def test_class_folder_of_the_user(colors: Path, tmp_path: Path) -> None:
    """imagefolder:DIR from the command line's word to a score, with train/ and val/ and without."""
    evaluator = build("evals", f"imagefolder:{colors}")
    assert evaluator.datasets(TINY) == (f"imagefolder:{colors}",)
    job = restore(json.loads(json.dumps(canonical(evaluator))))
    assert job.run(backbone(), context(tmp_path / "a", colors, name=f"imagefolder:{colors}")).facts["scored_images"] == 12
    flat = job.run(backbone(), context(tmp_path / "b", colors / "train", name=f"imagefolder:{colors / 'train'}"))
    assert flat.facts["scored_images"] == 5 and flat.facts["classes"] == 3


def test_folder_is_where_and_not_what(colors: Path, tmp_path: Path) -> None:
    """The same pictures at another place are the same job."""
    shutil.copytree(colors, tmp_path / "moved")
    one, other = ImageFolder.from_argument(str(colors)), ImageFolder.from_argument(str(tmp_path / "moved"))
    assert digest(one) == digest(other) and digest(dataclasses.replace(one, holdout=0.1)) != digest(one)
    assert dataclasses.replace(one, holdout=0.1).datasets(TINY) == one.datasets(TINY)
    for wrong in ("", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="is no folder"):
            ImageFolder.from_argument(wrong)


SIZES = {
    "S/16": ViTConfig(width=384, heads=6), "S/16-12h": ViTConfig(width=384), "B/16": ViTConfig(), "L/16": ViTConfig(width=1024, depth=24, heads=16),
    "H/14": ViTConfig(patch=14, width=1280, depth=32, heads=16),
}
PAPER = dataclasses.replace(TINY, family="paper")


def values(evaluator: str, size: str) -> tuple[object, ...] | None:
    """(peak lr, epochs, warm-up, layer decay, drop path, erasing, repeats, weight decay, batch, read-out) of a recipe under paper."""
    plugin = build("evals", evaluator)
    recipe = plugin.recipe(PAPER, SIZES[size])
    if recipe is None:
        return None
    a = recipe.augment
    assert recipe.sources and restore(json.loads(json.dumps(canonical(recipe)))) == recipe
    return (round(recipe.peak_lr, 9), recipe.epochs, recipe.warmup, recipe.layer_decay, recipe.drop_path, a.erasing, a.repeats, recipe.weight_decay,
            recipe.batch, plugin.read_out(PAPER))


FIGURES = [  # recipes A2, A5, A7, A11, A13 of the facts, column by column
    ("imagenet", "B/16", (2e-3, 100, 5, 0.65, 0.1, 0.25, 1, 0.05, 1024, "mean")),
    ("imagenet", "L/16", (4e-3, 50, 5, 0.75, 0.2, 0.25, 1, 0.05, 1024, "mean")),
    ("imagenet", "H/14", (4e-3, 50, 5, 0.75, 0.3, 0.25, 1, 0.05, 1024, "mean")),
    ("imagenet@mae-table9", "B/16", (4e-3, 100, 5, 0.75, 0.1, 0.0, 1, 0.05, 1024, "cls")),
    ("imagenet@mae-table9", "L/16", (4e-3, 50, 5, 0.75, 0.1, 0.0, 1, 0.05, 1024, "cls")),
    ("imagenet@mae-table9", "H/14", (4e-3, 50, 5, 0.75, 0.2, 0.0, 1, 0.05, 1024, "cls")),
    ("imagenet@beit", "B/16", (4e-3, 100, 20, 0.65, 0.1, 0.25, 3, 0.05, 1024, "mean")),
    ("imagenet@beit", "L/16", (2e-3, 50, 5, 0.75, 0.1, 0.25, 1, 0.05, 1024, "mean")),
    ("imagenet@beit", "H/14", None),
    ("imagenet@beit-repo", "L/16", (1e-3, 50, 5, 0.75, 0.2, 0.25, 1, 0.05, 1024, "mean")),
    ("imagenet@scratch", "B/16", (1.6e-3, 300, 20, None, 0.1, 0.0, 1, 0.3, 4096, "cls")),
    ("imagenet@scratch", "H/14", (1.6e-3, 200, 20, None, 0.2, 0.0, 1, 0.3, 4096, "cls")),
    ("imagenet@beit-from-22k", "B/16", (2e-5, 30, 5, 0.85, 0.1, 0.25, 1, 1e-8, 512, "mean")),
    ("imagenet@beit-from-22k", "L/16", (2e-5, 30, 5, 0.9, 0.4, 0.25, 1, 1e-8, 512, "mean")),
    ("imagenet@deit-384", "B/16", (5e-6, 30, 5, None, 0.1, 0.25, 3, 1e-8, 512, "cls")),
    ("imagenet@deit-384", "L/16", None),
    ("imagenet@384", "L/16", (5e-6, 10, 5, None, 0.1, 0.25, 3, 1e-8, 512, "mean")),
    ("imagenet@384", "B/16", (5e-6, 10, 5, None, 0.1, 0.25, 3, 1e-8, 512, "mean")),
    ("imagenet@384", "H/14", None),
    ("imagenet@mocov3", "B/16", (1e-3, 150, 5, None, 0.1, 0.25, 3, 0.05, 1024, "cls")),
    ("imagenet@mocov3", "L/16", (1e-3, 100, 5, None, 0.5, 0.25, 3, 0.05, 1024, "cls")),
    ("imagenet@mocov3", "H/14", None),
    ("imagenet@mocov3", "S/16-12h", (1e-3, 300, 5, None, 0.1, 0.25, 3, 0.05, 1024, "cls")),
    ("imagenet@mocov3", "S/16", None),
    ("imagenet@dino", "S/16", (1e-3, 300, 5, None, 0.1, 0.25, 3, 0.05, 1024, "cls")),
    ("imagenet@dino", "B/16", (1e-3, 300, 5, None, 0.1, 0.25, 3, 0.05, 1024, "cls")),
    ("imagenet@dino", "L/16", None),
    ("imagenet@448", "H/14", (4e-3, 50, 5, 0.75, 0.3, 0.25, 1, 0.05, 1024, "mean")),
    ("inat2017", "H/14", (4e-3, 50, 5, 0.75, 0.2, 0.0, 1, 0.05, 1024, "cls")),
    ("places365@448", "H/14", (4e-3, 50, 5, 0.75, 0.3, 0.25, 1, 0.05, 1024, "mean")),
    ("inat2019@deit", "B/16", (7.5e-5, 360, 5, None, 0.1, 0.1, 3, 0.05, 768, "cls")),
    ("inat2018@dino", "B/16", (1e-4, 300, 5, None, 0.1, 0.25, 3, 0.05, 1024, "cls")),
    ("cifar100", "B/16", (4e-3, 150, 20, 0.65, 0.1, 0.0, 3, 0.3, 512, "mean")),
    ("cifar100", "L/16", None),
    ("cifar100@mocov3", "B/16", (6e-4, 100, 3, None, 0.1, 0.0, 1, 0.1, 1024, "cls")),
    ("cifar100@dino", "B/16", (7.5e-6, 1000, 5, None, 0.1, 0.25, 3, 0.05, 768, "cls")),
]


@pytest.mark.parametrize("name,size,expected", FIGURES)
def test_recipes_of_the_papers(name: str, size: str, expected: tuple[object, ...] | None) -> None:
    """A wrong value here is a number that does not mean what its column says."""
    assert values(name, size) == expected


def test_no_published_recipe_goes_unchecked() -> None:
    """One without its figures above, or one that no column leads to."""
    evaluators = [build("evals", name) for name, _, expected in FIGURES if expected]
    assert {e.usual if e.by == "default" else e.by for e in evaluators} == set(PUBLISHED)


@pytest.mark.parametrize("name,expected", [  # recipes A5, A7, A11: DeiT's code warms up from 1e-6 and ends at 1e-5, its command for 384 pixels at 5e-6
    ("imagenet@deit-384", (5e-6, 512, 1e-6, 5e-6, 0.8, 1.0)), ("imagenet@384", (5e-6, 512, 1e-6, 5e-6, 0.8, 1.0)),
    ("imagenet@beit-from-22k", (2e-5, None, 0.0, 1e-6, 0.0, 0.0)), ("inat2018@dino", (5e-5, 512, 1e-6, 1e-5, 0.8, 1.0)),
    ("inat2018@deit", (7.5e-5, None, 1e-6, 1e-5, 0.8, 1.0)), ("cifar100@dino", (5e-6, 512, 1e-6, 0.0, 0.8, 1.0)),
    ("cifar100@mocov3", (3e-4, 512, 1e-6, 1e-5, 0.5, 1.0)),
])
def test_scaling_and_ends_of_what_is_trained_with_deits_code(name: str, expected: tuple[float | None, ...]) -> None:
    """lr as given, batch that it is for, warm-up's start, schedule's end, mixup, cutmix; RandAugment and smoothing are in all of them."""
    r = build("evals", name).recipe(PAPER, SIZES["B/16"])
    assert (r.lr, r.lr_batch, r.warmup_lr, r.min_lr, r.augment.mixup, r.augment.cutmix) == expected
    assert (r.augment.rand_augment, r.augment.smoothing, r.optimizer, r.betas) == ("rand-m9-mstd0.5-inc1", 0.1, "adamw", (0.9, 0.999))


@pytest.mark.parametrize(("name", "std"), [
    ("imagenet@mocov3", 0.02), ("cifar100@mocov3", 0.02), ("cifar100@dino", 0.02), ("inat2018@dino", 0.02), ("inat2019@deit", 0.02), ("imagenet@dino", 2e-5),
    ("imagenet@mae", 2e-5), ("cifar100", 2e-5), ("places365", 2e-5),
])
def test_a_new_head_starts_as_the_code_of_its_paper_has_it(name: str, std: float) -> None:
    """DeiT's code leaves timm's 0.02; MAE's and BEiT's heads, and DINO's on ImageNet (issue #31), start next to zero."""
    seed_all("head")
    model = build("evals", name).fresh_classifier(backbone(), tuple("abcdefgh"), CONFIG, RECIPE, "cls")
    assert float(model.head.weight.detach().std()) == pytest.approx(std, rel=0.2) and not model.head.bias.any()


@pytest.mark.parametrize("by", PUBLISHED)
def test_the_learning_rate_never_rises_after_its_warm_up(by: str) -> None:
    """A floor above the peak turned the schedule of DINO's CIFAR-100 around; such a recipe is refused now."""
    for vit in SIZES.values():
        if (recipe := PUBLISHED[by].recipe(vit.paper_size)) is not None:
            steps = np.linspace(10_000 * recipe.warmup / recipe.epochs + 1, 9_999, 50)
            rates = [lr_at(recipe, int(s), 10_000) for s in steps]
            assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(rates)) and max(rates) <= recipe.peak_lr * (1 + 1e-12), by
    with pytest.raises(UserError, match=r"min_lr 1e-05 lies above the peak learning rate 7\.5e-06"):
        Recipe(batch=768, lr=5e-6, lr_batch=512, epochs=1000, min_lr=1e-5)


def test_what_was_never_published_is_marked() -> None:
    """The footnotes of a table are made of these."""
    for name, words in (("inat2018", "lr, epochs"), ("imagenet@448", "all"), ("imagenet@beit", "lr"), ("cifar100@dino", "min_lr"), ("inat2019@dino", "batch"),
                        ("imagenet@scratch", "pooling")):
        recipe = build("evals", name).recipe(PAPER, SIZES["B/16"])
        assert dict(recipe.sources)[words].startswith("ours")


def test_each_variant_of_a_transfer_says_where_it_comes_from() -> None:
    """`harness list evals` showed bare field values for DINO's, DeiT's and MoCo's."""
    for name in ("imagenet", "inat2017", "inat2018", "inat2019", "places205", "cifar100", "linear"):
        plugin = build("evals", name)
        assert set(plugin.variants) == set(plugin.variant_sources), name
    assert source_of(build("evals", "cifar100@dino").recipe(PAPER, SIZES["B/16"]), ("augment", "repeats")).startswith("DINO-repo issue #144")
    assert source_of(build("evals", "inat2018@dino").recipe(PAPER, SIZES["B/16"]), ("augment", "mixup")).startswith("DeiT-paper Table 9")


def test_sizes_and_protocols_without_a_recipe() -> None:
    """No source gives one: None, and the planner says so."""
    small = dataclasses.replace(ViTConfig(), width=384, heads=6)
    for name in ("imagenet", "imagenet@beit", "inat2018", "cifar100", "partial", "linear"):
        assert build("evals", name).recipe(PAPER, small) is None
        assert build("evals", name).recipe(dataclasses.replace(TINY, family="unknown"), ViTConfig()) is None
    assert build("evals", "imagenet@beit").recipe(TINY, CONFIG) is None  # the demo has one recipe, not one per paper
    assert ImageNet(size=20).skip(CONFIG) is not None and ImageNet(size=24).skip(CONFIG) is None
    with pytest.raises(UserError, match="did you mean beit"):
        ImageNet(by="beits")


def test_groups_and_names() -> None:
    """They are promised by the command line; `paper` is what the main tables of the BEiT and MAE papers score."""
    assert group("evals", "paper") == ("ade20k", "coco", "imagenet", "linear")
    assert group("evals", "inat") == ("inat2017", "inat2018", "inat2019") and group("evals", "places") == ("places205", "places365")
    for cls in (ImageNet, INat2018, Places365, ImageFolder):
        assert issubclass(cls, FineTuning) and cls.summary and cls.source and cls.data in cls().datasets(TINY)[0]


def test_another_image_size_and_training_on_from_the_kept_model(colors: Path, tmp_path: Path) -> None:
    """BEiT's 384 goes on from the fine-tuned 224: the head is kept, positions are interpolated, and the model that was scored is the one stored."""
    first = ImageNet().run(backbone(), context(tmp_path / "first", colors))
    kept = Backbone.load(tmp_path / "first" / "checkpoint" / "backbone.pt")
    assert kept.config == CONFIG and tuple(kept.classifier["classes"]) == tuple(sorted(COLORS))  # type: ignore[index]
    model = Classifier.restore(kept.build(), kept.classifier, kept.mean, kept.std)  # type: ignore[arg-type]
    _, val = labelled_images("imagenet", context(tmp_path / "first", colors).session)
    again = predict(model, val, EvalTransform((16, 16)), context(tmp_path / "first", colors).session)
    with np.load(first.outcomes) as saved:
        assert saved["correct"].tolist() == (again == val.labels).tolist()
    larger = ImageNet(by="beit-384", size=24)
    assert larger.after == "imagenet" and ImageNet().after == ""
    still = dataclasses.replace(RECIPE, lr=1e-9, iterations=1, layer_decay=None)
    assert larger.run(kept, context(tmp_path / "second", colors, recipe=still)).metrics["top-1"] > 90  # a new head would score a third
    assert Backbone.load(tmp_path / "second" / "checkpoint" / "backbone.pt").config.size == (24, 24)
    with pytest.raises(JobFailed, match="left no classifier"):
        larger.run(backbone(), context(tmp_path / "third", colors, recipe=still))


def test_classes_by_number_are_those_of_the_sorted_names(colors: Path, tmp_path: Path) -> None:
    """Released checkpoints have no class names: their order is that of the sorted folder names."""
    outcome = ImageNet().run(own_head(("0", "1", "2")), context(tmp_path / "job", colors, recipe=None, overrides=Overrides(use_head=True)))
    named = ImageNet().run(own_head(), context(tmp_path / "named", colors, recipe=None, overrides=Overrides(use_head=True)))
    assert outcome.metrics == named.metrics


def test_planning_needs_no_torch() -> None:
    """`list` and `table` would take seconds to start."""
    modules = "evals.finetune, evals.linear, evals.partial, evals.knn, evals.robustness"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'timm', 'torchvision', 'PIL'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
