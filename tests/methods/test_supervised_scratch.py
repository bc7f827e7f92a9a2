"""The two rows without a pretext task."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from protocols_for_tests import family

from harness import plugins
from harness.checkpoint import Backbone
from harness.plugins import TrainContext
from harness.randomness import seed_all
from harness.spec import UserError, ViTConfig
from harness.vit import ViT
from methods.scratch import Scratch
from methods.supervised import Supervised

SMALL = ViTConfig(size=(32, 32), patch=8, width=32, depth=2, heads=2)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_supervised_trains_every_parameter_that_it_does_not_freeze(pooling: str) -> None:
    """A final norm that no one trained would spoil what reads it."""
    method = Supervised(pooling=pooling)  # type: ignore[arg-type]
    recipe = method.recipe(family("demo"), SMALL)
    assert recipe is not None and ("vit.norm.*" in recipe.frozen) == (pooling == "mean")
    vit = ViT(SMALL)
    objective = method.objective(vit, TrainContext(SMALL, recipe, 10, classes=("a", "b", "c")))
    batch = {"image": torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8), "label": torch.tensor([0, 1, 2, 0])}
    objective(batch, 0.5)["loss"].backward()
    assert {n for n, p in vit.named_parameters() if p.grad is None} == ({"norm.weight", "norm.bias"} if pooling == "mean" else set())


def test_supervised_scores_its_own_classifier_on_its_own_task_only() -> None:
    method = Supervised()
    assert method.transfer("imagenet", family("demo"), ViTConfig()).use_head and not method.transfer("ade20k", family("demo"), ViTConfig()).use_head
    recipe = method.recipe(family("smoke"), SMALL)
    assert recipe is not None
    with pytest.raises(UserError, match="no labels"):
        method.objective(ViT(SMALL), TrainContext(SMALL, recipe, 10))


def test_scratch_only_initialises_and_differs_by_seed() -> None:
    method, states = Scratch(), []
    for seed in (0, 0, 1):
        seed_all(seed, "init")
        vit = ViT(SMALL)
        recipe = Supervised().recipe(family("smoke"), SMALL)
        assert recipe is not None and method.objective(vit, TrainContext(SMALL, recipe, 0)) is None
        states.append(vit.blocks[0].attn.qkv.weight.detach().clone())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_scratch_is_trained_from_scratch_under_paper() -> None:
    """Its imagenet cell is no fine-tune of random weights, and it is what `supervised` trains by, read-out and start of the head included."""
    scratch, supervised, vit = Scratch(), Supervised(), ViTConfig()
    assert scratch.transfer("imagenet", family("paper"), vit).variant == "scratch"
    assert not scratch.transfer("ade20k", family("paper"), vit).variant and not scratch.transfer("imagenet", family("demo"), vit).variant
    evaluator = plugins.build("evals", "imagenet@scratch")
    ours, theirs = evaluator.recipe(family("paper"), vit), supervised.recipe(family("paper"), vit)
    assert ours == theirs and (ours.weight_decay, ours.ema, ours.epochs) == (0.3, 0.9999, 300)
    assert evaluator.read_out(family("paper")) == supervised.pooling == "cls"
    checkpoint, recipe = Backbone(SMALL, scratch.mean, scratch.std, ViT(SMALL).state_dict()), replace(ours, drop_path=0.0)
    torch.manual_seed(0)
    heads = [plugins.build("evals", n).fresh_classifier(checkpoint, tuple("abcd"), SMALL, recipe, "cls").head for n in ("imagenet@scratch", "imagenet@beit")]
    assert [round(float(h.weight.detach().std()), 5) for h in heads] == [pytest.approx(0.02, rel=0.2), pytest.approx(2e-5, rel=0.5)]
    mean = Supervised(pooling="mean").recipe(family("paper"), vit)
    assert mean is not None and next(s for what, s in mean.sources if what == "pooling").startswith("MAE-repo")
