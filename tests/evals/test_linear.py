"""The linear probe: leaves the ViT alone, reads features once where it may, resumes to the same number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evals.layers import PROBES, RATES, LastBlocks, LayerProbes
from evals.linear import Linear, features, train_on_features
from evals.scoring import labelled_images
from harness.augment import EvalTransform
from harness.canonical import canonical, restore
from harness.checkpoint import Backbone
from harness.classifier import Classifier
from harness.data import ImageList
from harness.plugins import EvalContext, Session
from harness.randomness import seed_all
from harness.spec import Augment, Interrupted, JobFailed, Protocol, Recipe, UserError, ViTConfig
from harness.vit import ViT, init_mae

CONFIG = ViTConfig(size=(16, 16), patch=8, width=32, depth=2, heads=2)
TINY = Protocol("tiny", "smoke", "for tests", {"tiny": CONFIG}, "tiny")
CACHED = Linear().recipe(TINY, CONFIG)
assert CACHED is not None
CACHED = dataclasses.replace(CACHED, batch=8, lr=10.0, lr_batch=None, epochs=30)
AUGMENTED = dataclasses.replace(CACHED, epochs=40, augment=Augment(crop_scale=(0.5, 1.0)))


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """ImageNet's layout with classes told apart by colour: 2 x 12 training and 2 x 6 validation images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, color in (("blue", (30, 30, 200)), ("red", (200, 30, 30))):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(color, 25, (20, 22, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def backbone() -> Backbone:
    """Untrained weights, the same each time."""
    seed_all("backbone")
    vit = ViT(CONFIG)
    init_mae(vit)
    return Backbone(CONFIG, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), vit.state_dict())


def context(folder: Path, data: Path, recipe: Recipe = CACHED, stop_after: int | None = None, **more: object) -> EvalContext:
    """A job's context in fp32; with `stop_after` it is asked to stop after so many looks."""
    looks = [0]

    def should_stop() -> bool:
        looks[0] += 1
        return stop_after is not None and looks[0] >= stop_after

    folder.mkdir(exist_ok=True)
    session = Session(folder, 7, torch.device("cpu"), torch.float32, {"imagenet": data}, should_stop=should_stop, **more)  # type: ignore[arg-type]
    return EvalContext(session, TINY, recipe)


@pytest.mark.parametrize("recipe", [CACHED, AUGMENTED], ids=["cached", "augmented"])
def test_learns_and_resumes(colors: Path, tmp_path: Path, recipe: Recipe) -> None:
    """A probe that learns nothing from colours, or another number after a kill."""
    whole = Linear().run(backbone(), context(tmp_path / "whole", colors, recipe))
    assert whole.metrics["top-1"] > 90 and whole.facts["flops"] > 0
    for stop in (1, 2, 3):
        place = tmp_path / f"parts{stop}"
        try:
            Linear().run(backbone(), context(place, colors, recipe, stop))
        except Interrupted:
            assert not (place / "outcomes.npz").exists()
        resumed = Linear().run(backbone(), context(place, colors, recipe))
        assert resumed.metrics == whole.metrics and resumed.facts["loss"] == whole.facts["loss"]
        assert resumed.outcomes.read_bytes() == whole.outcomes.read_bytes()


def probe() -> Classifier:
    """A probe on the untrained backbone, the same each time."""
    base = backbone()
    seed_all("head")
    return Classifier(base.build(), ("blue", "red"), mean=base.mean, std=base.std, pooling="cls", probe=True, head_std=0.01)


def test_vit_stays_as_it_was(colors: Path, tmp_path: Path) -> None:
    """A probe scores frozen features: no weight of the ViT may move."""
    model = probe()
    session = context(tmp_path / "job", colors).session
    train, _ = labelled_images("imagenet", session)
    facts = train_on_features(model, train, EvalTransform((16, 16)), CACHED, session)
    before = backbone().state
    assert all(torch.equal(v, before[k]) for k, v in model.vit.state_dict().items())
    assert facts["steps"] == 90 and facts["images_seen"] == 24
    lines = [json.loads(line) for line in (session.dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 90 and lines[-1]["loss"] < lines[0]["loss"]


def test_features_are_kept_and_read_again(colors: Path, tmp_path: Path) -> None:
    """A killed job would compute them twice; another order of rows would mix up labels."""
    model, session = probe(), context(tmp_path / "job", colors).session
    train, _ = labelled_images("imagenet", session)
    x, label = features(model, train, EvalTransform((16, 16)), session)
    assert x.shape == (24, 32) and label.tolist() == train.labels.tolist()  # type: ignore[union-attr]
    for file in colors.glob("train/*/*.png"):
        file.unlink()
    again, _ = features(model, train, EvalTransform((16, 16)), session)
    assert torch.equal(x, again)


def test_skipped_images_leave_no_gap(colors: Path, tmp_path: Path) -> None:
    """With --on-bad-image skip the labels must stay beside their features."""
    (colors / "train" / "blue" / "3.png").write_bytes(b"no image")
    place = context(tmp_path / "job", colors, on_bad_image="skip")
    outcome = Linear().run(backbone(), place)
    assert outcome.metrics["top-1"] > 90 and list(place.session.skipped_images) == ["blue/3.png"] and outcome.facts["images_seen"] == 23


def test_diverged_probe_fails_in_one_line(colors: Path, tmp_path: Path) -> None:
    """A NaN must not become an accuracy."""
    with pytest.raises(JobFailed, match=r"lower lr with --set linear\.recipe\.lr") as error:
        Linear().run(backbone(), context(tmp_path / "job", colors, dataclasses.replace(CACHED, lr=1e38, optimizer="sgd", warmup=0.0)))
    assert "\n" not in str(error.value)


def test_averaged_weights_are_not_left_out_silently() -> None:
    """Training on features has no EMA: a recipe that asks for it goes by way of the images."""
    assert Linear().on_features(CACHED) and not Linear().on_features(dataclasses.replace(CACHED, ema=0.99))


def test_beits_probe_reads_a_middle_layer(colors: Path, tmp_path: Path) -> None:
    """The mean of the patch tokens after block 1, no norm, no BatchNorm (recipes A7)."""
    evaluator = Linear(by="beit", layer=1)
    base = backbone()
    model = evaluator.probe(base, ("blue", "red"), Augment()).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vit = base.build().eval()
    with torch.no_grad():
        expected = vit.run_blocks(vit.place(vit.patches(model.normalize(images))))[0][:, 1:].mean(1)
        assert torch.allclose(model.features(images), expected, atol=1e-6)
        assert torch.allclose(model.logits(images), model.head(expected), atol=1e-6)
    recipe = dataclasses.replace(evaluator.recipe(TINY, CONFIG), batch=8, epochs=30, lr=0.05)  # type: ignore[type-var]
    assert evaluator.run(base, context(tmp_path / "job", colors, recipe)).metrics["top-1"] > 90
    assert evaluator.skip(CONFIG) is None and Linear(by="beit", layer=3).skip(CONFIG) is not None
    with pytest.raises(UserError, match="belongs to BEiT's protocol"):
        Linear(layer=3)


def layer_probes() -> LayerProbes:
    """On the untrained backbone, the same each time."""
    base = backbone()
    seed_all("head")
    return LayerProbes(base.build(), 2, base.mean, base.std)


def test_beits_code_gives_each_block_a_head_that_learns_as_if_alone() -> None:
    """Class token and mean side by side, before the final norm (recipes A7)."""
    model, vit = layer_probes().train(), backbone().build().eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = vit.run_blocks(vit.place(vit.patches(model.normalize(images))))
    assert len(model.heads) == len(tokens) == 2
    for found, expected in zip(model.features(images).unbind(dim=1), tokens, strict=True):
        assert torch.allclose(found, torch.cat([expected[:, 0], expected[:, 1:].mean(1)], dim=1), atol=1e-6)
    batch = {"image": images, "label": torch.tensor([0, 1])}
    model(batch)["loss"].backward()
    for head, feature in zip(model.heads, model.features(images).unbind(dim=1), strict=True):
        alone = torch.nn.functional.cross_entropy(head(feature), batch["label"])
        assert torch.allclose(torch.autograd.grad(alone, head.weight)[0], head.weight.grad, atol=1e-6)
    assert all(p.grad is None for p in model.vit.parameters())


def test_a_probe_on_every_block_learns_and_resumes(colors: Path, tmp_path: Path) -> None:
    """Stopped in training, while choosing, or while scoring: the same number, which is that of the chosen block."""
    recipe = Recipe(batch=8, lr=0.05, iterations=30, frozen=("vit.*",), decay_vectors=True)
    whole = Linear(by="beit-repo").run(backbone(), context(tmp_path / "whole", colors, recipe))
    facts = whole.facts
    assert whole.metrics["top-1"] == pytest.approx(facts["top1_by_layer"][facts["layer"] - 1]) and whole.metrics["top-1"] > 80
    assert facts["held_out_images"] == 1 and facts["scored_images"] == 12
    for stop in (9, 31, 32):
        place = tmp_path / f"parts{stop}"
        with pytest.raises(Interrupted):
            Linear(by="beit-repo").run(backbone(), context(place, colors, recipe, stop))
        resumed = Linear(by="beit-repo").run(backbone(), context(place, colors, recipe))
        assert resumed.outcomes.read_bytes() == whole.outcomes.read_bytes()
        assert {**resumed.facts, "seconds": 0} == {**facts, "seconds": 0}


def test_val_has_no_say_in_which_block_counts(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held out, block 2 is right; on val, block 1 would be better. The images that choose are not trained on."""
    trained: list[str] = []

    def fit(model: object, images: ImageList, *more: object) -> dict[str, float]:
        trained.extend(images.files)
        return {"steps": 1}

    def score(model: object, images: ImageList, transform: object, session: object, stage: str, **more: object) -> tuple[np.ndarray, np.ndarray]:
        assert stage == "predict" or not set(images.files) & set(trained)
        right, wrong, half = images.labels, 1 - images.labels, np.where(np.arange(len(images)) % 2, images.labels, 1 - images.labels)
        return np.arange(len(images)), np.stack([wrong, right] if stage == "choose" else [right, half], axis=1)

    monkeypatch.setattr("evals.layers.fit", fit)
    monkeypatch.setattr("evals.layers.score", score)
    outcome = Linear(by="beit-repo").run(backbone(), context(tmp_path / "job", colors))
    assert (outcome.facts["layer"], outcome.facts["held_out_by_layer"], outcome.facts["top1_by_layer"]) == (2, [0.0, 100.0], [100.0, 50.0])
    assert outcome.metrics["top-1"] == 50.0 and len(trained) == 23


def test_recipe_of_beits_code() -> None:
    """run_linear_eval.py's defaults: AdamW, lr 1e-3 x batch / 256, 100 epochs, weight decay 1e-4 on all; what is ours is marked; no ViT-H, no layer."""
    evaluator, large = Linear(by="beit-repo"), ViTConfig(width=1024, depth=24, heads=16)
    recipe = evaluator.recipe(dataclasses.replace(TINY, family="paper"), large)
    assert recipe is not None and (recipe.peak_lr, recipe.epochs, recipe.batch, recipe.weight_decay, recipe.decay_vectors) == (4e-3, 100, 1024, 1e-4, True)
    assert (recipe.optimizer, recipe.warmup, recipe.min_lr, recipe.augment) == ("adamw", 0.0, 0.0, Augment(crop_scale=(0.08, 1.0)))
    assert {words for words, source in recipe.sources if source.startswith("ours")} == {"batch", "schedule, augment", "layer"}
    assert evaluator.recipe(dataclasses.replace(TINY, family="paper"), ViTConfig(patch=14, width=1280, depth=32, heads=16)) is None
    assert evaluator.recipe(TINY, CONFIG) is not None and evaluator.recipe(dataclasses.replace(TINY, family="unknown"), large) is None
    with pytest.raises(UserError, match="belongs to BEiT's protocol"):
        Linear(by="beit-repo", layer=3)


def test_recipe_of_beits_probe() -> None:
    """BEiT-paper App. D: lr 4e-3 absolute, 50 epochs, weight decay 1e-4; ViT-B and ViT-L, no ViT-H."""
    paper, beit = dataclasses.replace(TINY, family="paper"), Linear(by="beit")
    recipe = beit.recipe(paper, ViTConfig(width=1024, depth=24, heads=16))
    assert recipe is not None and (recipe.peak_lr, recipe.epochs, recipe.weight_decay, recipe.batch, recipe.optimizer) == (4e-3, 50, 1e-4, 1024, "adamw")
    assert beit.recipe(paper, ViTConfig(patch=14, width=1280, depth=32, heads=16)) is None
    assert Linear().recipe(paper, ViTConfig(patch=14, width=1280, depth=32, heads=16)).peak_lr == pytest.approx(6.4)  # type: ignore[union-attr]


def test_recipes_of_mocos_and_dinos_probes() -> None:
    """SGD without decay: MoCo v3 lr 3 x batch / 256, 90 epochs; DINO 0.001 x batch / 256, 100 epochs; DINO trains no ViT-L."""
    paper, sizes = dataclasses.replace(TINY, family="paper"), [ViTConfig(width=384), ViTConfig(), ViTConfig(width=1024, depth=24, heads=16)]
    for by, lr, epochs, has in (("mocov3", 12.0, 90, [True, True, True]), ("dino", 4e-3, 100, [True, True, False])):
        found = [Linear(by=by).recipe(paper, vit) for vit in sizes]  # type: ignore[arg-type]
        assert [r is not None for r in found] == has and found[1] is not None
        assert (found[1].peak_lr, found[1].epochs, found[1].weight_decay, found[1].optimizer, found[1].warmup) == (pytest.approx(lr), epochs, 0, "sgd", 0)
        assert Linear(by=by).recipe(paper, CONFIG) is None and Linear(by=by).recipe(TINY, CONFIG) is not None  # type: ignore[arg-type]


def test_dinos_probe_reads_the_last_class_tokens_of_narrow_vits_and_the_mean_of_wide_ones() -> None:
    """DINO-repo eval_linear.py: n = 4 for ViT-S; n = 1 and the mean of the patches for ViT-B; the final norm over each."""
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for width, heads in ((32, 2), (448, 7)):
        config = dataclasses.replace(CONFIG, width=width, heads=heads, depth=5)
        checkpoint = Backbone(config, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), ViT(config).state_dict())
        probe = Linear(by="dino").probe(checkpoint, ("a", "b"), Augment())
        assert isinstance(probe, LastBlocks) and isinstance(probe.batch_norm, torch.nn.Identity)
        vit = probe.vit
        with torch.no_grad():
            x = vit.place(vit.patches(probe.normalize(images)))
            each = [vit.norm(x := block(x)) for block in vit.blocks]
            wanted = torch.cat([e[:, 0] for e in each[1:]], dim=1) if width == 32 else torch.cat([each[-1][:, 0], each[-1][:, 1:].mean(dim=1)], dim=1)
            assert torch.allclose(probe.features(images), wanted, atol=1e-5) and probe.logits(images).shape == (3, 2)
        assert all(p.requires_grad == name.startswith("head.") for name, p in probe.named_parameters())


@pytest.mark.parametrize("by", ["mocov3", "dino"])
def test_rivals_probes_learn_and_score(colors: Path, tmp_path: Path, by: str) -> None:
    recipe = dataclasses.replace(CACHED, optimizer="sgd", lr=1.0)
    assert Linear(by=by).run(backbone(), context(tmp_path / "job", colors, recipe)).metrics["top-1"] == 100.0  # type: ignore[arg-type]


def test_recipes() -> None:
    """Table 10 for ViT-B/16 at 224 pixels: lr 0.1 x 16384 / 256 = 6.4; nothing for others; the ViT frozen everywhere."""
    paper, base = dataclasses.replace(TINY, family="paper"), ViTConfig()
    table = Linear().recipe(paper, base)
    assert table is not None and table.peak_lr == pytest.approx(6.4) and (table.optimizer, table.epochs, table.warmup) == ("lars", 90, 10)
    assert Linear().recipe(paper, CONFIG) is None and Linear().recipe(dataclasses.replace(TINY, family="unknown"), base) is None
    for family in ("demo", "smoke", "paper"):
        recipe = Linear().recipe(dataclasses.replace(TINY, family=family), base)
        assert recipe is not None and recipe.frozen == ("vit.*",) and recipe.weight_decay == 0 and recipe.sources
        assert restore(json.loads(json.dumps(canonical(recipe)))) == recipe
    with pytest.raises(UserError, match="holdout"):
        Linear(holdout=1.5)


@pytest.mark.parametrize("by", ["igpt", "igpt-masked"])
def test_igpts_probe_reads_the_mean_of_the_patches_after_the_next_norm(by: str) -> None:
    """Causal where it was pre-trained so: there a later patch changes nothing of the one before it, but the mean still sees all of them."""
    checkpoint = backbone()
    probe = PROBES[by](checkpoint.build(), 2, checkpoint.mean, checkpoint.std).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    vit = probe.vit
    with torch.no_grad():
        x = vit.place(vit.patches(probe.normalize(images)))
        for i, norm in enumerate((vit.blocks[1].norm1, vit.norm)):
            x = vit.blocks[i](x, is_causal=by == "igpt")
            assert torch.allclose(probe.features(images)[:, i], norm(x)[:, 1:].mean(dim=1), atol=1e-5)
        assert probe.logits(images).shape == (3, 2 * len(RATES), 2)


def test_a_head_of_a_rate_learns_as_with_that_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of rate 0.1 at a learning rate of 2 scores as one of rate 1 at 0.2; without that, one learning rate would be tried six times."""
    batch = {"image": torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8), "label": torch.arange(8) % 3}
    scores = []
    for rate, lr in ((0.1, 2.0), (1.0, 0.2)):
        monkeypatch.setattr(PROBES["igpt"], "rates", (rate,))
        probe = PROBES["igpt"](backbone().build(), 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        for head in probe.heads:
            torch.nn.init.zeros_(head.weight)
        optimizer = torch.optim.SGD(probe.heads.parameters(), lr=lr, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            probe(batch)["loss"].backward()
            optimizer.step()
        scores.append(probe.logits(batch["image"]).detach())
    assert torch.allclose(scores[0], scores[1], atol=1e-4) and scores[0].std() > 0.1


def test_igpts_probe_chooses_block_and_learning_rate_on_images_that_it_was_not_trained_on(
    colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of few images is held out; the chosen head is scored on val, whatever val says of the others."""
    trained: list[object] = []

    def fit(model: LayerProbes, images: ImageList, *rest: object) -> dict[str, object]:
        trained.extend(images.files)
        return {}

    def score(model: LayerProbes, images: ImageList, transform: object, session: Session, stage: str, **more: object) -> tuple[np.ndarray, np.ndarray]:
        assert stage == "predict" or (not set(images.files) & set(trained) and len(images) == 2)
        rows = np.stack([1 - images.labels] * 2 * len(RATES), axis=1)  # all wrong but for
        rows[:, len(RATES) + 2 if stage == "choose" else 0] = images.labels
        return np.arange(len(images)), rows

    monkeypatch.setattr("evals.layers.fit", fit)
    monkeypatch.setattr("evals.layers.score", score)
    recipe = Linear(by="igpt").recipe(TINY, CONFIG)
    assert recipe is not None
    outcome = Linear(by="igpt").run(backbone(), context(tmp_path / "job", colors, dataclasses.replace(recipe, augment=Augment())))
    assert (outcome.facts["layer"], outcome.facts["lr"], outcome.metrics["top-1"]) == (2, pytest.approx(3.0), 0.0)
    assert outcome.facts["held_out_by_layer"] == [0.0, 100.0] and outcome.facts["top1_by_layer"] == [100.0, 0.0] and len(trained) == 22


@pytest.mark.parametrize("augment", [CACHED.augment, AUGMENTED.augment], ids=["cached", "augmented"])
def test_igpts_probe_learns_and_resumes_to_the_same_number(colors: Path, tmp_path: Path, augment: Augment) -> None:
    recipe = Linear(by="igpt").recipe(TINY, CONFIG)
    assert recipe is not None
    recipe = dataclasses.replace(recipe, batch=8, iterations=30, augment=augment)
    whole = Linear(by="igpt").run(backbone(), context(tmp_path / "whole", colors, recipe))
    assert whole.metrics["top-1"] >= 90 and whole.facts["images_seen"] == (22 if augment == CACHED.augment else 240)
    for stop in (1, 2, 7):  # the features of 22 images are one batch, of which one look is taken
        try:
            Linear(by="igpt").run(backbone(), context(tmp_path / f"parts{stop}", colors, recipe, stop))
        except Interrupted:
            assert not (tmp_path / f"parts{stop}" / "outcomes.npz").exists()
        resumed = Linear(by="igpt").run(backbone(), context(tmp_path / f"parts{stop}", colors, recipe))
        assert {k: v for k, v in resumed.facts.items() if k != "seconds"} == {k: v for k, v in whole.facts.items() if k != "seconds"}
        assert resumed.metrics == whole.metrics


def test_recipe_of_igpts_probe() -> None:
    """recipes A15: SGD with momentum 0.9, 1M iterations, learning rates 30, 10, 3, ...; what A15 does not have is marked as ours."""
    recipe = Linear(by="igpt").recipe(dataclasses.replace(TINY, family="paper"), ViTConfig())
    assert recipe is not None and (recipe.optimizer, recipe.momentum, recipe.iterations, recipe.weight_decay) == ("sgd", 0.9, 1_000_000, 0.0)
    assert [round(recipe.peak_lr * rate, 4) for rate in RATES] == [30, 10, 3, 1, 0.3, 0.1]
    assert {words for words, source in recipe.sources if source.startswith("ours")} == {"batch, schedule, weight_decay, augment"}
    assert Linear(by="igpt").recipe(dataclasses.replace(TINY, family="paper"), CONFIG) is None
    assert Linear(by="igpt").recipe(TINY, CONFIG) == Linear(by="igpt-masked").recipe(TINY, CONFIG)
