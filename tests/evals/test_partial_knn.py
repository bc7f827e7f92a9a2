"""Partial fine-tuning moves what it says and nothing else; k-NN votes as DINO does."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evals.knn import KNN, vote
from evals.partial import Partial
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Session, build
from harness.randomness import seed_all
from harness.spec import Interrupted, Protocol, UserError, ViTConfig
from harness.vit import ViT, init_mae

CONFIG = ViTConfig(size=(16, 16), patch=8, width=32, depth=3, heads=2)
TINY = Protocol("tiny", "smoke", "for tests", {"tiny": CONFIG}, "tiny")


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """Classes told apart by colour: 2 x 12 training and 2 x 6 validation images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, color in (("blue", (30, 30, 200)), ("red", (200, 30, 30))):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(color, 25, (20, 22, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def backbone(config: ViTConfig = CONFIG) -> Backbone:
    """Untrained weights, the same each time."""
    seed_all("backbone")
    vit = ViT(config)
    init_mae(vit)
    return Backbone(config, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), vit.state_dict())


def session(folder: Path, data: Path, stop_after: int | None = None) -> Session:
    looks = [0]

    def should_stop() -> bool:
        looks[0] += 1
        return stop_after is not None and looks[0] >= stop_after

    folder.mkdir(exist_ok=True)
    return Session(folder, 7, torch.device("cpu"), torch.float32, {"imagenet": data}, should_stop=should_stop)


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, relative_bias="shared", layer_scale=0.1, key_bias=False)], ids=["plain", "beit"])
@pytest.mark.parametrize("blocks,moved", [
    (0.0, set()), (0.5, {"blocks.2.norm2", "blocks.2.mlp", "blocks.2.ls2"}), (1.0, {"blocks.2", "relative_bias.2"}),
    (2.0, {"blocks.1", "blocks.2", "relative_bias.1", "relative_bias.2"}),
])
def test_what_is_trained(config: ViTConfig, blocks: float, moved: set[str], colors: Path, tmp_path: Path) -> None:
    """A frozen parameter that moves, or a trained one that does not, is another point of Figure 9."""
    evaluator = dataclasses.replace(Partial(blocks=blocks), pooling="mean")
    recipe = evaluator.recipe(TINY, config)
    assert recipe is not None
    recipe = dataclasses.replace(recipe, iterations=3, batch=8, lr=1e-2, warmup=0.0, precision="fp32", drop_path=0.0)
    evaluator.run(backbone(config), EvalContext(session(tmp_path / "job", colors), TINY, recipe))
    target = dataclasses.replace(config, relative_bias="block") if config.relative_bias == "shared" else config
    before = backbone(config).build(target).state_dict()
    state = torch.load(sorted((tmp_path / "job" / "checkpoint" / "train").glob("state-*.pt"))[-1], weights_only=True)["objective"]
    changed = {k for k, v in before.items() if not torch.equal(v, state[f"vit.{k}"])}
    expected = {k for k in before if any(k.startswith(m + ".") for m in moved)}
    assert changed == expected if config.key_bias else changed <= expected and {k.rsplit(".", 2)[0] for k in changed} >= {m for m in moved if "mlp" in m}


def test_the_norm_before_a_class_token_belongs_to_the_last_block() -> None:
    """With no block trained it stays, as in a linear probe."""
    paper = dataclasses.replace(TINY, family="paper")
    large = ViTConfig(width=1024, depth=24, heads=16)
    for name, frozen in (("partial@0", True), ("partial@0.5", False), ("partial@4", False)):
        recipe = build("evals", name).recipe(paper, large)
        assert ("vit.norm.*" in recipe.frozen) == frozen and recipe.peak_lr == pytest.approx(4e-3) and recipe.epochs == 50
        assert dict(recipe.sources)["epochs, layer_decay"].startswith("ours")
    assert sum(p.startswith("vit.blocks.") for p in build("evals", "partial@4").recipe(paper, large).frozen) == 20
    assert build("evals", "partial@24").skip(ViTConfig()) is not None and build("evals", "partial@12").skip(ViTConfig()) is None
    with pytest.raises(UserError, match="whole number"):
        Partial(blocks=1.5)


def test_neighbours_vote_by_similarity() -> None:
    """Two near neighbours of one class outvote one nearer neighbour of another only if the temperature lets them."""
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.436], [0.9, -0.436], [0.0, 1.0]]) * torch.tensor([[3.0], [1.0], [2.0], [1.0]])  # lengths do not count
    label, query = torch.tensor([0, 1, 1, 2]), torch.tensor([[5.0, 0.0]])
    assert 2 * math.exp(0.9 / 0.2) > math.exp(1 / 0.2) and 2 * math.exp(0.9 / 0.07) < math.exp(1 / 0.07)
    assert vote(query, bank, label, 3, 20, 0.2).tolist() == [1] and vote(query, bank, label, 3, 20, 0.07).tolist() == [0]
    assert vote(query, bank, label, 3, 1, 0.2).tolist() == [0]


def test_knn_learns_colours_and_resumes(colors: Path, tmp_path: Path) -> None:
    """Features out of step with labels, or another number after a kill."""
    whole = KNN(k=5).run(backbone(), EvalContext(session(tmp_path / "whole", colors), TINY, None))
    assert whole.metrics["top-1"] > 90 and whole.facts["neighbours"] == 5
    for stop in (1, 2, 3):
        with pytest.raises(Interrupted):
            KNN(k=5).run(backbone(), EvalContext(session(tmp_path / f"parts{stop}", colors, stop), TINY, None))
        resumed = KNN(k=5).run(backbone(), EvalContext(session(tmp_path / f"parts{stop}", colors), TINY, None))
        assert resumed.outcomes.read_bytes() == whole.outcomes.read_bytes()  # type: ignore[union-attr]
    for wrong in ({"k": 0}, {"temperature": 0.0}, {"holdout": 1.0}):
        with pytest.raises(UserError):
            KNN(**wrong)
