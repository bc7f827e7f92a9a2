"""MAE against the original's recorded numbers: masking, encoder, decoder, loss, gradients, initial values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_answers import check_gradients, check_initial_values, config, golden, section
from PIL import Image
from torch import nn

from harness.randomness import generator, seed_all
from harness.spec import ViTConfig
from harness.vit import ViT
from methods.mae import MAE, MAEObjective


def build(arrays: dict[str, np.ndarray], normalised: bool) -> MAEObjective:
    """The recorded model in our modules."""
    size, patch = int(config(arrays, "img")), int(config(arrays, "p"))
    vit = ViT(ViTConfig(
        size=(size, size), patch=patch, width=int(config(arrays, "dim")), depth=int(config(arrays, "depth")), heads=int(config(arrays, "heads")),
        positions="sincos-mae",
    ))
    decoder = (int(config(arrays, "ddim")), int(config(arrays, "ddepth")), int(config(arrays, "dheads")))
    objective = MAEObjective(vit, float(config(arrays, "ratio")), decoder, normalised, nn.Identity())
    state = section(arrays, "state")
    torch.testing.assert_close(objective.decoder_positions, state.pop("decoder_pos_embed"), atol=1e-6, rtol=0)
    ours = {k if k.startswith(("decoder", "mask_token")) else f"vit.{k}": v for k, v in state.items()}
    objective.load_state_dict(ours, strict=True)
    vit.pos_embed.requires_grad_(False)
    return objective


NAMES = {name: name.removeprefix("vit.") for name, _ in build(golden("mae_pretrain"), True).named_parameters()}


@pytest.mark.parametrize("run", ["plain", "norm"])
def test_loss_and_gradients_are_the_originals(run: str) -> None:
    """Otherwise a row called MAE is not MAE."""
    arrays = golden("mae_pretrain")
    objective = build(arrays, run == "norm")
    batch = {"image": torch.from_numpy(arrays["imgs"]), "noise": torch.from_numpy(arrays["noise"])}
    loss = objective(batch)["loss"]
    torch.testing.assert_close(loss.detach(), torch.from_numpy(arrays[f"{run}/loss"]), rtol=2e-6, atol=0)
    loss.backward()
    check_gradients(objective, arrays, run, NAMES)
    assert {NAMES[n] for n, p in objective.named_parameters() if p.grad is not None} == {str(n) for n in arrays["trainable_names"]}
    objective = build(arrays, run == "norm").double()
    batch = {key: value.double() for key, value in batch.items()}
    assert objective(batch)["loss"].item() == pytest.approx(float(arrays[f"{run}/loss_float64"]), rel=1e-10)


def test_mask_latent_and_prediction_are_the_originals() -> None:
    """The mask is that of the noise, visible tokens keep its order, predictions come row by row."""
    arrays = golden("mae_pretrain")
    objective = build(arrays, True)
    images, noise = torch.from_numpy(arrays["imgs"]), torch.from_numpy(arrays["noise"])
    order = torch.argsort(noise, dim=1)
    assert objective.kept == int(arrays["len_keep"])
    np.testing.assert_array_equal(torch.argsort(order, dim=1).numpy(), arrays["ids_restore"])
    with torch.no_grad():
        latent = objective.encode(images, order[:, : objective.kept])
        prediction, mask = objective.predict(images, noise)
        exact = build(arrays, True).double().encode(images.double(), order[:, : objective.kept])
    np.testing.assert_array_equal(mask.numpy(), arrays["mask"])
    np.testing.assert_allclose(latent.numpy(), arrays["latent"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(prediction.numpy(), arrays["pred"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(exact.numpy(), arrays["latent_float64"], rtol=1e-9)


@pytest.mark.parametrize(("normalised", "key"), [(False, "target_first_patches"), (True, "target_norm_first_patches")])
def test_targets_are_the_originals(normalised: bool, key: str) -> None:
    """Order of pixels within a patch and the unbiased variance."""
    arrays = golden("mae_pretrain")
    expected = arrays[key]
    index = torch.arange(expected.shape[1]).expand(expected.shape[0], -1)
    target = build(arrays, normalised).targets(torch.from_numpy(arrays["imgs"]), index)
    np.testing.assert_allclose(target.numpy(), expected, atol=2e-5, rtol=1e-5)


def test_initial_values_are_the_originals() -> None:
    """A different initialisation is a different method at short budgets."""
    seed_all(0, "init")
    vit = ViT(ViTConfig(size=(64, 64), patch=16, width=192, depth=2, heads=4, positions="sincos-mae"))
    objective = MAEObjective(vit, 0.75, (96, 2, 4), True, nn.Identity())
    names = {name: name.removeprefix("vit.") for name, _ in objective.named_parameters()}
    check_initial_values(objective, "mae_pretrain", names)


def test_sample_depends_on_its_generator_only() -> None:
    """A resumed run must draw the same crops and masks."""
    vit = ViTConfig(size=(32, 48), patch=8, width=32, depth=2, heads=2)
    from protocols_for_tests import family

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
