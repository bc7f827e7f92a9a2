"""MoCo v3 against the original's recorded numbers: loss, encoders, momentum update, schedules, positions, initial values; and on two processes."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from known_answers import (
    PRECISIONS,
    Arrays,
    cases,
    check_gradients,
    check_initial_values,
    check_loss,
    config,
    golden,
    initial,
    initial_vit,
    names,
    section,
    translate,
    vit_config,
    vit_name,
)
from protocols_for_tests import family
from torch import Tensor, nn

from harness.optim import lr_at, parameter_groups
from harness.positions import sincos_positions
from harness.randomness import seed_all
from harness.spec import ViTConfig
from harness.vit import ViT
from methods.mocov3 import MoCoV3, MoCoV3Objective, contrast
from methods.teacher import rising

ARRAYS, POSITIONS = golden("mocov3_loss"), golden("mae_pos_embed")
RECIPE = MoCoV3().recipe(family("paper"), ViTConfig(positions="sincos-moco"))
assert RECIPE is not None


def ours(original: str) -> str:
    """Our name of a parameter of the original."""
    where, _, rest = original.partition(".")
    if where == "predictor":
        return original
    side = "" if where == "base_encoder" else "teacher."
    return f"{side}projector.{rest[5:]}" if rest.startswith("head.") else f"{side}vit.{vit_name(rest)}"


def of_base(arrays: Arrays) -> dict[str, Tensor]:
    """The ViT of the queries by its own names."""
    state = {k.removeprefix("base_encoder."): v for k, v in section(arrays, "state").items() if k.startswith("base_encoder.")}
    return {k: v for k, v in state.items() if not k.startswith("head.")}


def build() -> MoCoV3Objective:
    """The recorded model in our modules, in train mode, frozen as the recipe freezes it, its encoder of the keys having followed once."""
    vit = ViT(dataclasses.replace(vit_config(ARRAYS, of_base(ARRAYS), "x1"), positions="sincos-moco"))
    objective = MoCoV3Objective(vit, config(ARRAYS, "mlp"), config(ARRAYS, "out"), config(ARRAYS, "T"), config(ARRAYS, "m"), nn.Identity())
    objective.load_state_dict(translate(section(ARRAYS, "state"), ours), strict=True)
    parameter_groups(objective, RECIPE, len(vit.blocks))
    objective.after_step(0.0)
    return objective.train()


def views() -> Tensor:
    return torch.stack([torch.from_numpy(ARRAYS["x1"]), torch.from_numpy(ARRAYS["x2"])])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", cases(ARRAYS, holds="temperature"))
def test_contrastive_loss_is_the_originals(case: str, precision: torch.dtype) -> None:
    """With its gradients; the keys have none."""
    given = {k: torch.from_numpy(ARRAYS[f"{case}/{k}"]).to(precision).requires_grad_() for k in ("q1", "q2", "k1", "k2")}
    tau = float(ARRAYS[f"{case}/temperature"])
    parts = [contrast(given[q], given[k], tau)[0] for q, k in (("q1", "k2"), ("q2", "k1"))]
    loss = parts[0] + parts[1]
    check_loss(loss, ARRAYS, f"{case}/loss")
    if precision == torch.float32:
        check_loss(parts[0], ARRAYS, f"{case}/loss_q1_k2")
        check_loss(parts[1], ARRAYS, f"{case}/loss_q2_k1")
        loss.backward()
        for q in ("q1", "q2"):
            np.testing.assert_allclose(given[q].grad.numpy(), ARRAYS[f"{case}/grad_{q}"], rtol=1e-4, atol=1e-6)
        assert given["k1"].grad is None and given["k2"].grad is None


def test_model_loss_and_gradients_are_the_originals() -> None:
    """The encoder of the keys follows before they are made; neither it nor the patch projection gets a gradient."""
    objective = build()
    with torch.no_grad():
        (q1, q2), (k1, k2) = objective.vectors(views())
    for name, value in (("q1", q1), ("q2", q2), ("k1", k1), ("k2", k2)):
        np.testing.assert_allclose(value.numpy(), ARRAYS[f"model/{name}"], rtol=0, atol=1e-4, err_msg=name)
    loss = objective({"views": views().transpose(0, 1)})["loss"]
    assert math.isclose(loss.item(), float(ARRAYS["model/loss"]), rel_tol=1e-5)
    loss.backward()
    # README gives q and k five times what others have, since batch norm over a tiny batch amplifies rounding; with one thread on Zen 3 one value is 1.5e-6 off.
    check_gradients(objective, ARRAYS, "model", ours, atol=5e-6)
    without = {name for name, p in objective.named_parameters() if p.grad is None}
    assert without == {ours(name) for name in names(ARRAYS, "model/names_without_gradient")}


def test_encoder_of_the_keys_ends_as_the_originals() -> None:
    """Parameters follow with momentum; statistics of its batch norms are those of its own passes."""
    objective = build()
    objective({"views": views().transpose(0, 1)})
    state = objective.state_dict()
    for name, total, norm in zip(*(ARRAYS[f"model/momentum_after_{k}"] for k in ("names", "sum", "norm")), strict=True):
        value = state[ours(f"momentum_encoder.{name}")].double()
        assert abs(value.norm().item() - norm) <= 1e-5 * norm + 1e-6 and abs(value.sum().item() - total) <= 1e-5 * norm * value.numel() ** 0.5 + 1e-5, name
    for where, recorded in (("momentum", "model/momentum_after"), ("base", "model/base_after")):
        for name, value in section(ARRAYS, recorded).items():
            np.testing.assert_allclose(state[ours(f"{where}_encoder.{name}")].numpy(), value.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", cases(ARRAYS, "momentum_schedule/"))
def test_momentum_schedule_is_the_originals(case: str) -> None:
    epochs, start = ARRAYS[f"momentum_schedule/{case}/config_epochs_m"].tolist()
    for epoch, m in zip(ARRAYS[f"momentum_schedule/{case}/epoch"], ARRAYS[f"momentum_schedule/{case}/m"], strict=True):
        assert math.isclose(rising(start, epoch / epochs), m, rel_tol=1e-12)


def test_lr_schedule_is_the_originals() -> None:
    """The paper's recipe has these very values."""
    peak, warmup, epochs = ARRAYS["lr_schedule/config_lr_warmup_epochs"].tolist()
    recipe = dataclasses.replace(RECIPE, lr=peak, lr_batch=None, warmup=warmup, epochs=epochs)
    steps = 1_000_000
    for epoch, lr in zip(ARRAYS["lr_schedule/epoch"], ARRAYS["lr_schedule/lr"], strict=True):
        step = epoch / epochs * steps
        assert math.isclose(lr_at(recipe, step, steps), lr, rel_tol=1e-9, abs_tol=1e-15), epoch  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [key for key in POSITIONS if key.startswith("mocov3/")])
def test_positions_are_mocos(key: str) -> None:
    """Row first: MAE's table with its halves swapped."""
    table = POSITIONS[key]
    side = math.isqrt(len(table) - 1)
    np.testing.assert_allclose(sincos_positions(table.shape[1], (side, side), "sincos-moco")[0].numpy(), table, rtol=0, atol=1e-6)


def test_initial_values_are_the_originals() -> None:
    """Of the ViT, whose random patch projection stays; of the heads; and the encoder of the keys starts as the same numbers."""
    table = initial("mocov3")
    base = {n.removeprefix("base_encoder."): row for n, row in table.items() if n.startswith("base_encoder.")}
    seed_all(0, "init")
    vit = ViT(dataclasses.replace(initial_vit(base), positions="sincos-moco"))
    objective = MoCoV3Objective(vit, base["head.0.weight"]["shape"][0], base["head.6.weight"]["shape"][0], 0.2, 0.99, nn.Identity())
    parameter_groups(objective, RECIPE, len(vit.blocks))
    values = dict(objective.named_parameters())
    check_initial_values({name: values[ours(name)] for name in table}, table)
    assert len(values) == len(table) and all(values[ours(n)].requires_grad == bool(row["trainable"]) for n, row in table.items())
    assert all(torch.equal(values[n.removeprefix("teacher.")], p) for n, p in values.items() if n.startswith("teacher."))


def test_vits_heads_and_sizes() -> None:
    """ViT-S has 12 heads; a size that the sources do not train has no recipe."""
    small, narrow = ViTConfig(width=384, heads=6), ViTConfig(size=(64, 64), patch=8, width=96, depth=4, heads=3)
    method = MoCoV3()
    assert method.architecture(small, True).heads == 12 and method.architecture(small, False) == small
    assert method.recipe(family("paper"), method.architecture(small, True)) is not None and method.recipe(family("paper"), small) is None
    assert method.recipe(family("paper"), ViTConfig(patch=14, width=1280, depth=32, heads=16)) is None
    assert method.widths(ViTConfig()) == (4096, 256) and method.widths(narrow) == (384, 64)


def test_two_processes_make_one_batch(tmp_path: Path) -> None:
    """Uneven parts of a batch on two processes: same loss, same gradients, same statistics as the whole on one, keys and batch norms being of all."""
    script, root = Path(__file__).with_name("moco_processes.py"), str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    whole, *parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "0", "1"))
    for part in parts:
        assert torch.allclose(part["loss"], whole["loss"], rtol=1e-12)
        for kind in ("gradients", "buffers"):
            for name, value in whole[kind].items():
                torch.testing.assert_close(part[kind][name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
