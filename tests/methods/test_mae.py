"""MAE against the original's recorded numbers: masking, encoder, decoder, loss, gradients, initial values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from known_answers import (
    PRECISIONS,
    cases,
    check_gradients,
    check_groups,
    check_initial_values,
    check_loss,
    check_values,
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
from PIL import Image
from protocols_for_tests import family
from torch import Tensor, nn

from harness.augment import Normalize
from harness.optim import parameter_groups
from harness.randomness import generator, seed_all
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, ViTConfig
from harness.vit import ViT
from methods.mae import MAE, MAEObjective
from methods.targets import Components

ARRAYS, GROUPS = golden("mae_pretrain"), golden("mae_pretrain_groups")
RUNS = cases(ARRAYS, holds="loss")


def ours(original: str) -> str:
    """Our name of a parameter of the original."""
    return original if original.startswith(("decoder", "mask_token")) else f"vit.{vit_name(original)}"


def build(run: str, precision: torch.dtype = torch.float32) -> MAEObjective:
    """The recorded model in our modules."""
    state = section(ARRAYS, "state")
    vit = ViT(dataclasses.replace(vit_config(ARRAYS, state, "imgs"), positions="sincos-mae"))
    decoder = tuple(config(ARRAYS, key) for key in ("ddim", "ddepth", "dheads"))
    objective = MAEObjective(vit, config(ARRAYS, "ratio"), decoder, run == "norm", nn.Identity())
    objective.decoder_positions.copy_(state.pop("decoder_pos_embed"))
    objective.load_state_dict(translate(state, ours), strict=True)
    recipe = MAE().recipe(family("paper"), ViTConfig(positions="sincos-mae"))
    assert recipe is not None
    parameter_groups(objective, recipe, len(vit.blocks))  # freezes what the recipe freezes
    return objective.to(precision)


def given(precision: torch.dtype) -> dict[str, Tensor]:
    return {"image": torch.from_numpy(ARRAYS["imgs"]).to(precision), "noise": torch.from_numpy(ARRAYS["noise"]).to(precision)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("run", RUNS)
def test_loss_is_the_originals(run: str, precision: torch.dtype) -> None:
    """With plain and with normalised pixels. Otherwise a row called MAE is not MAE."""
    check_loss(build(run, precision)(given(precision))["loss"], ARRAYS, f"{run}/loss")


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_the_originals(run: str) -> None:
    """Of every parameter, and of no frozen one."""
    objective = build(run)
    objective(given(torch.float32))["loss"].backward()
    check_gradients(objective, ARRAYS, run, ours)
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {ours(name) for name in names(ARRAYS, "trainable_names")}
    frozen = {name for name, p in objective.named_parameters() if not p.requires_grad} | {"decoder_pos_embed"}  # a buffer here
    assert frozen == {ours(name) for name in names(ARRAYS, "frozen_names")}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mask_latent_and_prediction_are_the_originals(precision: torch.dtype) -> None:
    """The mask is that of the noise, visible tokens keep its order, predictions come row by row."""
    objective, batch = build(RUNS[0], precision), given(precision)
    order = torch.argsort(batch["noise"], dim=1)
    assert objective.kept == int(ARRAYS["len_keep"])
    np.testing.assert_array_equal(torch.argsort(order, dim=1).numpy(), ARRAYS["ids_restore"])
    with torch.no_grad():
        latent = objective.encode(batch["image"], order[:, : objective.kept])
        prediction, mask = objective.predict(batch["image"], batch["noise"])
    np.testing.assert_array_equal(mask.numpy(), ARRAYS["mask"])
    check_values(latent, ARRAYS, "latent")
    check_values(prediction, ARRAYS, "pred")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("run", "key"), [("plain", "target_first_patches"), ("norm", "target_norm_first_patches")])
def test_targets_are_the_originals(run: str, key: str, precision: torch.dtype) -> None:
    """Order of pixels within a patch and the unbiased variance."""
    index = torch.arange(ARRAYS[key].shape[1]).expand(ARRAYS[key].shape[0], -1)
    check_values(build(run, precision).target({}, given(precision)["image"], index), ARRAYS, key)


def test_position_tables_are_the_originals() -> None:
    """Both tables as the model makes them, before any state is loaded."""
    state = section(ARRAYS, "state")
    architecture = dataclasses.replace(vit_config(ARRAYS, state, "imgs"), positions="sincos-mae")
    objective = MAEObjective(ViT(architecture), 0.5, tuple(config(ARRAYS, key) for key in ("ddim", "ddepth", "dheads")), True, nn.Identity())
    torch.testing.assert_close(objective.vit.pos_embed.data, state["pos_embed"], rtol=0, atol=1e-6)
    torch.testing.assert_close(objective.decoder_positions, state["decoder_pos_embed"], rtol=0, atol=1e-6)


def test_weight_decay_is_the_originals() -> None:
    """Vectors and biases are not decayed; class and mask token are; the position tables are not trained at all."""
    depth, decoder_depth, decay = GROUPS["config_depth_decoderdepth_wd"].tolist()
    vit = ViT(ViTConfig(size=(16, 16), patch=8, width=8, depth=int(depth), heads=2, positions="sincos-mae"))
    objective = MAEObjective(vit, 0.5, (8, int(decoder_depth), 2), True, nn.Identity())
    recipe = MAE().recipe(family("paper"), ViTConfig(positions="sincos-mae"))
    assert recipe is not None
    groups = parameter_groups(objective, dataclasses.replace(recipe, weight_decay=decay), int(depth))
    rows = list(zip(names(GROUPS, "names"), *(GROUPS[key].tolist() for key in ("group", "trainable", "ndim", "weight_decay")), strict=True))
    assert all((group >= 0) == bool(trainable) for _, group, trainable, _, _ in rows)
    assert all(value == decay * group for _, group, _, _, value in rows if group >= 0)  # 0: not decayed, 1: decayed, as ours below
    check_groups(groups, {name: (value, 1.0) for name, group, _, _, value in rows if group >= 0}, ours)
    for group in groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            assert p.ndim == next(ndim for original, _, _, ndim, _ in rows if ours(original) == name)


def test_initial_values_are_the_originals() -> None:
    """A different initialisation is a different method at short budgets."""
    table = initial("mae_pretrain")
    seed_all(0, "init")
    vit = ViT(dataclasses.replace(initial_vit(table), positions="sincos-mae"))
    depth = len({name.split(".")[1] for name in table if name.startswith("decoder_blocks.")})
    objective = MAEObjective(vit, 0.5, (table["mask_token"]["shape"][-1], depth, 1), True, nn.Identity())
    values = {**dict(objective.named_parameters()), "decoder_pos_embed": objective.decoder_positions}
    assert {name for name, row in table.items() if not row["trainable"]} == {"pos_embed", "decoder_pos_embed"}
    check_initial_values({name: values[ours(name)] for name in table}, table)
    assert len(values) == len(table)


def test_sample_depends_on_its_generator_only() -> None:
    """A resumed run must draw the same crops and masks."""
    vit = ViTConfig(size=(32, 48), patch=8, width=32, depth=2, heads=2)
    recipe = MAE().recipe(family("demo"), vit)
    assert recipe is not None
    transform = MAE().transform(vit, recipe)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    first, again, other = (transform(image, generator(0, "sample", 0, i)) for i in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(first["noise"], other["noise"])
    assert first["image"].shape == (3, 32, 48) and first["image"].dtype == torch.uint8 and first["noise"].shape == (24,)


def test_decoder_follows_the_backbone_unless_set() -> None:
    """The papers' decoder for the papers' sizes; a light one for small ViTs; what a user sets wins."""
    assert MAE().decoder(ViTConfig()) == (512, 8, 16)
    assert MAE().decoder(ViTConfig(size=(64, 64), patch=8, width=192, depth=6, heads=3)) == (96, 2, 3)
    assert MAE(decoder_depth=1).decoder(ViTConfig()) == (512, 1, 16)
    assert MAE(mask_ratio=0.99).skip(ViTConfig(size=(64, 64), patch=8, width=192, heads=3)) is not None


@pytest.mark.parametrize("normalised", [True, False])
def test_the_pictures_show_the_images_what_is_visible_and_the_prediction(normalised: bool) -> None:
    """A decoder that predicts the targets themselves paints the images: patches come back to their places, scales and colours."""
    vit = ViTConfig(size=(32, 48), patch=8, width=24, depth=1, heads=2)
    objective = MAEObjective(ViT(vit), 0.75, (16, 1, 2), normalised, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    mask = torch.zeros(2, 24).index_fill(1, torch.arange(6, 24), 1.0)
    objective.predict = lambda x, noise: (objective.target({}, x, torch.arange(24).expand(2, -1)), mask)  # type: ignore[method-assign]
    sheet = torch.from_numpy(objective.pictures({"image": images, "noise": torch.rand(2, 24)})).permute(2, 0, 1)
    shown = torch.cat(list(images), dim=2)
    rows = sheet.split(32, dim=1)
    assert (rows[0].int() - shown).abs().max() <= 1 and (rows[2].int() - shown).abs().max() <= 1
    assert torch.equal(rows[1][:, :8], rows[0][:, :8]) and all(len(colour.unique()) == 1 for colour in rows[1][:, 8:])


def test_pictures_of_components_are_what_the_components_hold() -> None:
    """With all of a patch's components nothing is lost; with one, each hidden patch is the mean patch and a multiple of one pattern."""
    vit = ViTConfig(size=(32, 48), patch=8, width=24, depth=1, heads=2)
    images, every = torch.randint(0, 256, (8, 3, 32, 48), dtype=torch.uint8), torch.arange(24).expand(8, -1)
    for count, lost in ((192, False), (1, True)):
        objective = MAEObjective(ViT(vit), 0.75, (16, 1, 2), Components(8, count), Normalize(IMAGENET_MEAN, IMAGENET_STD))
        batch = {"image": images, "noise": torch.rand(8, 24)}
        objective.prepare(batch)
        objective.predict = lambda x, noise, own=objective.target: (own({}, x, every), torch.ones(8, 24))  # type: ignore[method-assign]
        rows = torch.from_numpy(objective.pictures(batch)).permute(2, 0, 1).split(32, dim=1)
        assert ((rows[2].int() - torch.cat(list(images), dim=2)).abs().max() > 50) == lost
