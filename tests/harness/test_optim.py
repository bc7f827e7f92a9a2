"""Layer decay, weight decay exemptions, schedules, LARS, clipping and EMA do what the recipes say."""

from __future__ import annotations

import io
import math
from fractions import Fraction

import pytest
import torch
from known_answers import cases, golden
from torch import nn

from harness.optim import LARS, Ema, apply_schedule, build_optimizer, clip_gradients, layer_of, lr_at, parameter_groups, weight_decay_at
from harness.spec import Recipe, UserError, ViTConfig
from harness.vit import ViT

MAE, BEIT = golden("mae_finetune"), golden("beit_finetune")
RECIPE = Recipe(batch=1024, lr=5e-4, lr_batch=256, epochs=100, warmup=5, min_lr=1e-6, layer_decay=0.65, no_decay=("vit.pos_embed", "vit.cls_token"))


class Holder(nn.Module):
    """What `fit` is given: a module that holds the lent ViT as `vit`."""

    def __init__(self, relative_bias: str = "none") -> None:
        super().__init__()
        self.vit = ViT(ViTConfig(size=(16, 16), patch=8, width=8, depth=3, heads=2, relative_bias=relative_bias))  # type: ignore[arg-type]
        self.head = nn.Linear(8, 4)


def by_name(groups: list[dict]) -> dict[str, dict]:
    """Parameter name -> its group."""
    return {name: group for group in groups for name in group["names"]}


def test_layer_decay_is_maes() -> None:
    """recipes A2: cls, pos, patch_embed 0; block i is i+1; the rest L+1; scale = ld ** (L+1-id)."""
    groups = by_name(parameter_groups(Holder(), RECIPE, 3))
    expected = {
        "vit.cls_token": 4, "vit.pos_embed": 4, "vit.patch_embed.proj.weight": 4, "vit.blocks.0.attn.qkv.weight": 3, "vit.blocks.2.mlp.fc2.bias": 1,
        "vit.norm.weight": 0, "head.weight": 0,
    }
    for name, power in expected.items():
        assert groups[name]["lr_scale"] == pytest.approx(0.65**power), name
    assert set(groups) == {n for n, _ in Holder().named_parameters()}
    assert sum(len(g["params"]) for g in parameter_groups(Holder(), RECIPE, 3)) == len(groups)


def test_relative_bias_tables_belong_to_their_block() -> None:
    """BEiT's code: a table of one block has its layer; one shared table has the head's (recipes A7)."""
    groups = by_name(parameter_groups(Holder("block"), RECIPE, 3))
    assert groups["vit.relative_bias.1.table"]["lr_scale"] == pytest.approx(0.65**2) and groups["vit.relative_bias.1.table"]["decays"]
    assert by_name(parameter_groups(Holder("shared"), RECIPE, 3))["vit.relative_bias.0.table"]["lr_scale"] == 1.0
    assert layer_of("vit.mask_token", 3) == 0 and layer_of("decoder.blocks.0.weight", 3) == 4


def test_weight_decay_exemptions() -> None:
    """Vectors are exempt unless decay_vectors; no_decay names others (MAE pre-training decays cls_token, fine-tuning does not)."""
    groups = by_name(parameter_groups(Holder(), RECIPE, 3))
    assert groups["head.weight"]["weight_decay"] == 0.05
    assert [groups[n]["weight_decay"] for n in ("head.bias", "vit.norm.weight", "vit.pos_embed", "vit.cls_token")] == [0.0] * 4
    everything = by_name(parameter_groups(Holder(), Recipe(batch=1, lr=1.0, epochs=1, decay_vectors=True), 3))
    assert all(g["weight_decay"] == 0.05 for g in everything.values()) and len({id(g) for g in everything.values()}) == 1
    assert everything["vit.cls_token"]["lr_scale"] == 1.0


def test_frozen_parameters_take_no_gradient() -> None:
    """A probe whose ViT moves is no probe."""
    module = Holder()
    groups = parameter_groups(module, Recipe(batch=1, lr=1.0, epochs=1, frozen=("vit.*",)), 3)
    assert set(by_name(groups)) == {"head.weight", "head.bias"}
    assert not any(p.requires_grad for p in module.vit.parameters())
    with pytest.raises(UserError, match="nothing to train"):
        parameter_groups(Holder(), Recipe(batch=1, lr=1.0, epochs=1, frozen=("*",)), 3)
    with pytest.raises(UserError, match=r"'vti\.\*' matches no parameter"):
        parameter_groups(Holder(), Recipe(batch=1, lr=1.0, epochs=1, frozen=("vti.*",)), 3)


def test_cosine_with_warm_up() -> None:
    """MAE's rule per step: linear from 0 over the warm-up, half a cosine to min_lr; 5e-4 x 1024 / 256 = 2e-3 at the peak."""
    total = 1000
    assert lr_at(RECIPE, 0, total) == 0.0
    assert lr_at(RECIPE, 25, total) == pytest.approx(1e-3)
    assert lr_at(RECIPE, 50, total) == pytest.approx(2e-3)
    assert lr_at(RECIPE, 525, total) == pytest.approx(1e-6 + (2e-3 - 1e-6) / 2)
    assert lr_at(RECIPE, total, total) == pytest.approx(1e-6)


@pytest.mark.parametrize("case", cases(MAE, "lr_sched/"))
def test_cosine_is_maes(case: str) -> None:
    """At whole steps of an epoch so finely divided that the recorded epochs are steps; of a plain group and of one with a scale."""
    peak, low, warmup, epochs = MAE[f"lr_sched/{case}/config_lr_min_warmup_epochs"].tolist()
    at = [Fraction(e).limit_denominator(100_000) for e in MAE[f"lr_sched/{case}/epoch"].tolist()]
    per_epoch = math.lcm(*(e.denominator for e in at), Fraction(epochs).denominator)
    recipe, total = Recipe(batch=1, lr=peak, min_lr=low, warmup=warmup, epochs=epochs), round(epochs * per_epoch)
    scaled = {key: float(key.rpartition("_")[2]) for key in MAE if key.startswith(f"lr_sched/{case}/lr_of_group_with_scale_")}
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": s, "decays": False} for s in (1.0, *scaled.values())], lr=1.0)
    for i, epoch in enumerate(at):
        apply_schedule(optimizer, recipe, int(epoch * per_epoch), total)
        for key, group in zip((f"lr_sched/{case}/lr", *scaled), optimizer.param_groups, strict=True):
            assert math.isclose(group["lr"], MAE[key][i], rel_tol=1e-12, abs_tol=1e-15 * peak), f"epoch {epoch}: {group['lr']!r}, {MAE[key][i]!r}"


@pytest.mark.parametrize("case", cases(BEIT, "cosine_scheduler/"))
def test_stepwise_cosine_is_beits(case: str) -> None:
    """Step by step, and the sum over all: warm-up with both ends, a cosine that never reaches its end; weight decay by the same rule."""
    recorded = {key.rpartition("/")[2]: value for key, value in BEIT.items() if key.startswith(f"cosine_scheduler/{case}/")}
    base, final, epochs, iterations, warmup, start, steps = recorded["config_base_final_epochs_iters_warmupepochs_start_warmupsteps"].tolist()
    total = int(recorded["length"])
    assert total == epochs * iterations
    length = {"iterations": total, "warmup": steps} if steps > 0 else {"epochs": epochs, "warmup": warmup}
    recipe = Recipe(batch=1, lr=base, min_lr=final, warmup_lr=start, schedule="cosine-stepwise", weight_decay=base, weight_decay_end=final, **length)
    for step, value in zip(recorded["index"].tolist(), recorded["value"].tolist(), strict=True):
        assert math.isclose(lr_at(recipe, step, total), value, rel_tol=1e-12), step
        if length["warmup"] == 0:
            assert math.isclose(weight_decay_at(recipe, step, total), value, rel_tol=1e-12), step
    assert math.isclose(math.fsum(lr_at(recipe, step, total) for step in range(total)), float(recorded["sum"]), rel_tol=1e-10)


def test_other_schedules() -> None:
    """Poly after the warm-up (mmseg's), steps in the recipe's own unit, constant."""
    poly = Recipe(batch=16, lr=1e-4, iterations=160, warmup=15, warmup_lr=1e-10, schedule="poly")
    assert lr_at(poly, 0, 160) == pytest.approx(1e-10) and lr_at(poly, 15, 160) == pytest.approx(1e-4) and lr_at(poly, 160, 160) == 0.0
    assert lr_at(poly, 87, 160) == pytest.approx(1e-4 * (1 - 72 / 145))
    steps = Recipe(batch=2, lr=1.0, epochs=12, schedule="step", steps=(8, 11))
    assert [lr_at(steps, s, 120) for s in (79, 80, 110)] == pytest.approx([1.0, 0.1, 0.01])
    assert lr_at(Recipe(batch=2, lr=0.3, epochs=1, schedule="constant"), 7, 10) == 0.3


def test_weight_decay_schedule_leaves_exempt_parameters_alone() -> None:
    """DINO's 0.04 -> 0.4: vectors must stay at 0."""
    recipe = Recipe(batch=1, lr=1.0, epochs=1, weight_decay=0.04, weight_decay_end=0.4)
    assert [weight_decay_at(recipe, s, 100) for s in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    optimizer = build_optimizer(parameter_groups(Holder(), recipe, 3), recipe)
    apply_schedule(optimizer, recipe, 50, 100)
    assert {round(g["weight_decay"], 6) for g in optimizer.param_groups} == {0.0, 0.22}
    assert all(g["lr"] == pytest.approx(lr_at(recipe, 50, 100)) for g in optimizer.param_groups)


def test_schedule_reaches_each_layer() -> None:
    """Without the scale, layer decay would be a no-operation after the first step."""
    optimizer = build_optimizer(parameter_groups(Holder(), RECIPE, 3), RECIPE)
    apply_schedule(optimizer, RECIPE, 50, 1000)
    group = by_name(optimizer.param_groups)["vit.blocks.0.attn.qkv.weight"]
    assert group["lr"] == pytest.approx(2e-3 * 0.65**3)


def test_lars_is_the_papers_update() -> None:
    """By hand for one matrix and one vector: trust 0.001 x |w| / |g + wd w| on the matrix, plain momentum SGD on the vector."""
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
    start, bias, gradients = w.detach().clone(), b.detach().clone(), [torch.randn(3, 4) for _ in range(2)]
    optimizer = LARS([{"params": [w, b]}], lr=0.5, momentum=0.9, weight_decay=0.1)
    velocity, bias_velocity = torch.zeros(3, 4), torch.zeros(4)
    for g in gradients:
        w.grad, b.grad = g.clone(), g[0].clone()
        update = g + 0.1 * start
        velocity = 0.9 * velocity + 0.001 * start.norm() / update.norm() * update
        bias_velocity = 0.9 * bias_velocity + g[0]
        start, bias = start - 0.5 * velocity, bias - 0.5 * bias_velocity
        optimizer.step()
    assert torch.allclose(w, start, atol=1e-6) and torch.allclose(b, bias, atol=1e-6)


def test_lars_moves_weights_that_start_at_zero() -> None:
    """A trust ratio of 0 would hold a zero-initialised head there for ever."""
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    LARS([{"params": [w]}], lr=1.0).step()
    assert torch.equal(w.data, -torch.ones(2, 2))


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_optimisers_go_on_from_their_state(name: str) -> None:
    """A resumed job must take the same next step; also that the state survives torch's safe loader."""
    recipe = Recipe(batch=1, lr=0.01, epochs=1, optimizer=name, layer_decay=0.5)  # type: ignore[arg-type]

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    one = Holder()
    first = build_optimizer(parameter_groups(one, recipe, 3), recipe)
    step(one, first, 0)
    two = Holder()
    two.load_state_dict(one.state_dict())
    second = build_optimizer(parameter_groups(two, recipe, 3), recipe)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second.load_state_dict(torch.load(stream, weights_only=True))
    step(one, first, 1)
    step(two, second, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_clipping() -> None:
    """Global clipping is torch's; per-tensor clipping bounds each norm (DINO's)."""
    def gradients(recipe: Recipe) -> tuple[list[torch.Tensor], float]:
        parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 4.0]), torch.full((2, 2), 0.25)
        return [p.grad for p in parameters[:2]], float(clip_gradients(parameters, recipe))  # type: ignore[misc]

    free, norm = gradients(Recipe(batch=1, lr=1.0, epochs=1))
    assert norm == pytest.approx(math.sqrt(25.25)) and free[0][2] == 4.0
    clipped, norm = gradients(Recipe(batch=1, lr=1.0, epochs=1, clip=1.0))
    assert norm == pytest.approx(math.sqrt(25.25)) and float(torch.cat([g.flatten() for g in clipped]).norm()) == pytest.approx(1.0, abs=1e-5)
    each, _ = gradients(Recipe(batch=1, lr=1.0, epochs=1, clip=1.0, clip_mode="tensor"))
    assert float(each[0].norm()) == pytest.approx(1.0, abs=1e-5) and float(each[1].norm()) == pytest.approx(0.5)
    assert float(clip_gradients([nn.Parameter(torch.zeros(1))], Recipe(batch=1, lr=1.0, epochs=1))) == 0.0


def test_ema_averages_and_resumes() -> None:
    """The supervised row is the average's accuracy, batch norm statistics included."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema, expected = Ema(module, 0.9), module[0].weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            module[0].weight.add_(1.0)
        module(torch.randn(4, 2))
        ema.update(module)
        expected = 0.9 * expected + 0.1 * module[0].weight.detach()
    other = Ema(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 0.9)
    other.load_state_dict(ema.state_dict())
    other.copy_to(module)
    assert torch.allclose(module[0].weight, expected, atol=1e-6) and module[1].num_batches_tracked == 3
    with pytest.raises(KeyError):
        ema.load_state_dict({})
    with pytest.raises(UserError):
        Ema(module, 1.0)
