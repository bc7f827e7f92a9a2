"""The conformance suite: what every installed plugin must keep, ours and other people's alike.

    pytest --pyargs harness.testing                    all plugins
    pytest --pyargs harness.testing -k my-method       one of them

It runs on a CPU in seconds for each plugin, on the smallest protocol that the plugin knows and on data which that protocol makes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import default_collate

from harness import data, plugins
from harness.canonical import canonical, restore
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Session, TrainContext
from harness.randomness import generator, seed_all
from harness.samples import Samples
from harness.spec import Interrupted, Recipe, ViTConfig
from harness.train import fit
from harness.vit import ViT


def plain(kind: str) -> list[str]:
    """Installed plugins that need no argument."""
    return [n for n in plugins.installed(kind) if not hasattr(plugins.load(kind, n), "from_argument")]


def unlike(name: str) -> list[str]:
    """Variants of a method, one of those that differ from one another in numbers only (eight mask ratios are one case here)."""
    found: dict[str, str] = {}
    for variant, fields in getattr(plugins.load("methods", name), "variants", {}).items():
        found.setdefault(str(sorted((k, v if isinstance(v, (str, bool)) else "number") for k, v in fields.items())), f"{name}@{variant}")
    return list(found.values())


METHODS, EVALS = plain("methods"), plain("evals")
VARIANTS = [v for n in METHODS for v in unlike(n)]


def protocols_by_size() -> list[Any]:
    """Installed protocols, smallest backbone first."""
    found = [plugins.build("protocols", n) for n in plugins.installed("protocols")]
    return sorted(found, key=lambda s: (s.backbones[s.backbone].width, s.backbones[s.backbone].depth))


def small(setting: Any) -> ViTConfig:
    """A protocol's backbone, cut to two blocks."""
    vit: ViTConfig = setting.backbones[setting.backbone]
    return dataclasses.replace(vit, depth=2)


def choose(plugin: Any) -> tuple[Any, ViTConfig, Recipe | None]:
    """(protocol, two-block ViT, recipe) of the smallest protocol that the plugin knows."""
    for setting in protocols_by_size():
        vit = small(setting)
        if hasattr(plugin, "architecture"):
            vit = plugin.architecture(vit, setting.architecture == "published")
        recipe = plugin.recipe(setting, vit)
        if (recipe is not None or not getattr(plugin, "trains", True)) and plugin.skip(vit) is None:
            return setting, vit, recipe
    pytest.skip("no installed protocol that it knows")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function (protocol, data set) -> folder with the protocol's own data, made once."""
    root = tmp_path_factory.mktemp("data")

    def make(setting: Any, name: str) -> Path:
        if setting.generator is None:
            pytest.skip(f"protocol {setting.name} makes no data")
        folders = data.folders_below(root / setting.name)
        if name not in setting.generates:
            pytest.skip(f"protocol {setting.name} makes no {name}")
        if data.missing([name], folders):
            plugins.load("protocols", setting.generator)(root / setting.name, [name], setting.family, 1)
        return Path(folders[name])

    return make


def session(folder: Path, folders: Mapping[str, Path], stop_after: int | None = None) -> Session:
    """A CPU session in fp32; with `stop_after`, it asks to stop after that many looks at the flag."""
    looks = [0]

    def should_stop() -> bool:
        looks[0] += 1
        return stop_after is not None and looks[0] >= stop_after

    folder.mkdir(parents=True, exist_ok=True)
    return Session(folder, 7, torch.device("cpu"), torch.float32, dict(folders), should_stop=should_stop)


def shortened(recipe: Recipe, steps: int, batch: int) -> Recipe:
    """A recipe of a few steps in fp32."""
    return dataclasses.replace(recipe, epochs=None, iterations=steps, batch=batch, warmup=0.0, precision="fp32")


class Trial:
    """One method set up on a two-block ViT with images, assets and an objective of its own."""

    def __init__(self, name: str, made: Any, tmp: Path) -> None:
        self.method = plugins.build("methods", name)
        self.setting, self.config, recipe = choose(self.method)
        if recipe is None:
            pytest.skip("it has nothing to train")
        self.recipe = shortened(recipe, 4, 8)
        name = self.method.datasets(self.setting)[0]
        self.images = data.read_images(name, "train", made(self.setting, name)).subset(range(32))
        self.transform = self.method.transform(self.config, self.recipe)
        self.classes = self.images.classes if self.images.labels is not None else ()
        self.assets = {role: self.make_asset(a.maker, tmp / role) for role, a in self.method.assets(self.setting, self.config).items() if a.maker}

    def make_asset(self, maker: Any, path: Path) -> Path:
        """An untrained asset: the file's format is what counts here."""
        seed_all(7, "asset")
        recipe = shortened(maker.recipe(self.setting, self.config), 4, 8)
        maker.objective(None, TrainContext(self.config, recipe, 4, classes=self.classes)).save_asset(path)
        return path

    def objective(self) -> Any:
        """A fresh objective, the same each time."""
        seed_all(7, "init")
        vit = ViT(self.config, self.recipe.drop_path)
        return self.method.objective(vit, TrainContext(self.config, self.recipe, 4, self.assets, self.classes))

    def batch(self) -> dict[str, Tensor]:
        """Eight samples."""
        samples = Samples(self.images, self.transform, 7, 32, False)
        batch: dict[str, Tensor] = default_collate([samples[i] for i in range(8)])
        batch.pop("bad")
        return batch


@pytest.fixture
def trial(request: pytest.FixtureRequest, made: Any, tmp_path: Path) -> Iterator[Trial]:
    """The method named by the parameter, set up."""
    yield Trial(request.param, made, tmp_path)


@pytest.mark.parametrize("kind,name", [(k, n) for k in ("methods", "evals") for n in plain(k)])
def test_fields_survive_json(kind: str, name: str) -> None:
    """A plugin that does not would run under another configuration than its key says."""
    plugin = plugins.build(kind, name)
    assert restore(json.loads(json.dumps(canonical(plugin)))) == plugin
    for variant in getattr(plugin, "variants", {}):
        other = plugins.build(kind, f"{name}@{variant}")
        assert restore(json.loads(json.dumps(canonical(other)))) == other != plugin


@pytest.mark.parametrize("name", plain("methods"))
def test_is_tuned_by_variants_that_exist(name: str) -> None:
    """A method that names another would end a run in the middle of its plan."""
    method = plugins.build("methods", name)
    for setting in protocols_by_size():
        for evaluator in plain("evals"):
            variant = method.transfer(evaluator, setting, small(setting)).variant
            assert not variant or variant in plugins.build("evals", evaluator).variants, (evaluator, variant)


@pytest.mark.parametrize("kind,name", [(k, n) for k in ("methods", "evals") for n in plain(k)])
def test_says_what_it_is(kind: str, name: str) -> None:
    """`list` and the skipped cells of a table read these."""
    plugin = plugins.build(kind, name)
    assert isinstance(plugin.version, int) and plugin.summary and plugin.source
    for setting in protocols_by_size():
        reason = plugin.skip(small(setting))
        assert reason is None or (isinstance(reason, str) and reason)
        recipe = plugin.recipe(setting, small(setting))
        if recipe is not None:
            assert restore(json.loads(json.dumps(canonical(recipe)))) == recipe


@pytest.mark.parametrize("trial", METHODS + VARIANTS, indirect=True)
def test_objective_trains_the_lent_vit(trial: Trial) -> None:
    """The loss is finite, every ViT parameter that the recipe does not freeze gets a gradient, and ten SGD steps lower the loss."""
    from fnmatch import fnmatch

    objective, batch = trial.objective(), trial.batch()
    objective.train()
    losses = []
    frozen = [n for n, _ in objective.named_parameters() if any(fnmatch(n, pattern) for pattern in trial.recipe.frozen)]
    for name, p in objective.named_parameters():
        p.requires_grad_(p.requires_grad and name not in frozen)
    trained = [p for p in objective.parameters() if p.requires_grad]
    without = {n for n, p in objective.vit.named_parameters() if p.requires_grad}
    for _ in range(11):
        seed_all(7, "step")  # masks, crops, dropped paths and teachers are held fixed
        loss = objective(batch, 0.5)["loss"]
        assert loss.ndim == 0 and math.isfinite(loss.item())
        losses.append(loss.item())
        objective.zero_grad()
        loss.backward()
        without &= {n for n, p in objective.vit.named_parameters() if p.grad is None or not p.grad.any()}
        norm = torch.sqrt(torch.stack([p.grad.pow(2).sum() for p in trained if p.grad is not None]).sum())
        with torch.no_grad():
            for p in trained:
                if p.grad is not None:
                    p -= 0.02 * p.grad / (norm + 1e-12)
    assert not without, f"ViT parameters without a gradient, or with one that is always zero: {sorted(without)}"
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("trial", METHODS + VARIANTS, indirect=True)
def test_exported_vit_loads_into_timm(trial: Trial) -> None:
    """The exported weights are the ViT's and nothing else, and timm computes the same features from them."""
    objective = trial.objective()
    vit = objective.export() if hasattr(objective, "export") else objective.vit
    assert set(vit.state_dict()) == set(ViT(vit.config).state_dict())
    if vit.config.relative_bias != "none":
        return  # timm's VisionTransformer cannot hold it
    c = vit.config
    other = VisionTransformer(img_size=c.size, patch_size=c.patch, embed_dim=c.width, depth=c.depth, num_heads=c.heads, mlp_ratio=c.mlp_ratio,
                              init_values=c.layer_scale, num_classes=0)
    other.load_state_dict(vit.state_dict(), strict=True)
    images = torch.randn(2, 3, *c.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(other.eval()(images), vit.eval()(images), atol=1e-5)


@pytest.mark.parametrize("trial", METHODS + VARIANTS, indirect=True)
def test_resumed_training_equals_uninterrupted(trial: Trial, tmp_path: Path) -> None:
    """A method that keeps state outside its module, or draws from elsewhere, would end in other weights after a kill."""
    ends = []
    for name, stop in (("whole", None), ("parts", 2)):
        objective = trial.objective()
        place = session(tmp_path / name, {}, stop)
        if stop is not None:
            with pytest.raises(Interrupted):
                fit(objective, trial.images, trial.transform, trial.recipe, place)
            objective, place = trial.objective(), session(tmp_path / name, {})
        fit(objective, trial.images, trial.transform, trial.recipe, place)
        ends.append(objective.vit.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize("name", METHODS + VARIANTS)
def test_transform_draws_from_its_generator_alone(name: str, made: Any, tmp_path: Path) -> None:
    """The same place in a run must give the same sample, whatever was drawn before it."""
    trial = Trial(name, made, tmp_path)
    image = data.load_rgb(trial.images.path(0))
    first = trial.transform(image, generator(1, "sample"))
    seed_all("something else")
    second = trial.transform(image, generator(1, "sample"))
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", EVALS)
def test_evaluator_returns_its_metrics_also_when_resumed(name: str, made: Any, tmp_path: Path) -> None:
    """A table column without a number, a score outside 0..100, or another number after a kill."""
    evaluator = plugins.build("evals", name)
    if getattr(evaluator, "after", ""):
        pytest.skip(f"it goes on from the model of {evaluator.after}")
    if getattr(evaluator, "needs_classifier", False):
        pytest.skip("it scores a classifier that a checkpoint brings with it")
    setting, config, recipe = choose(evaluator)
    folders = {s: made(setting, s) for s in evaluator.datasets(setting)}
    seed_all(7, "init")
    checkpoint = Backbone(config, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ViT(config).state_dict())
    recipe = None if recipe is None else shortened(recipe, 3, 4)

    def outcome(folder: Path, stop: int | None) -> Any:
        return evaluator.run(checkpoint, EvalContext(session(folder, folders, stop), setting, recipe))

    whole = outcome(tmp_path / "whole", None)
    assert set(whole.metrics) == {m.name for m in evaluator.columns}
    assert all(-1e-6 <= v <= 100 + 1e-6 for v in whole.metrics.values())
    assert whole.outcomes is None or whole.outcomes.is_file()
    with pytest.raises(Interrupted):
        outcome(tmp_path / "parts", 2)
    assert outcome(tmp_path / "parts", None).metrics == whole.metrics


@pytest.mark.parametrize("name", [n for n in EVALS if hasattr(plugins.load("evals", n), "golden")])
def test_known_answers(name: str, tmp_path: Path) -> None:
    """An evaluator that misses what it says itself would fill a table with wrong numbers."""
    answers = plugins.build("evals", name).golden(tmp_path)
    assert answers and all(0 <= a.tolerance < 20 for a in answers)  # a wider one would let anything pass
    assert [a for a in answers if not abs(a.score - a.expected) <= a.tolerance] == []
