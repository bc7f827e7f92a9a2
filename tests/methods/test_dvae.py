"""The tokenizer: networks against DALL-E's recorded numbers, its gate, its file, and that a few steps train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_answers import check_initial_values, golden, section
from protocols_for_tests import family
from torch import Tensor

from harness.randomness import seed_all
from harness.spec import JobFailed, ViTConfig
from methods.dalle import Decoder, Encoder, load_tokenizer, map_pixels, unmap_pixels
from methods.dvae import DVAE, DVAEObjective, anneal, for_grid, perplexity

ARRAYS = golden("dalle_encoder")
WIDTH, CODES, INITIAL = (int(v) for v in ARRAYS["config/n_hid_vocab_n_init"])
ENCODERS = sorted({k.split("/")[0] for k in ARRAYS if k.startswith("encoder_blocks")})
DECODERS = sorted({k.split("/")[0] for k in ARRAYS if k.startswith("decoder_blocks")})


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DALL-E calls weights and biases w and b."""
    return {k[:-1] + {"w": "weight", "b": "bias"}[k[-1]]: v for k, v in state.items()}


@pytest.mark.parametrize("case", ENCODERS)
def test_logits_and_tokens_are_dalles(case: str) -> None:
    """Otherwise DALL-E's weights would give other tokens here."""
    encoder = Encoder(WIDTH, CODES, int(case.removeprefix("encoder_blocks")))
    encoder.load_state_dict(renamed(section(ARRAYS, f"{case}/state")), strict=True)
    pixels = torch.from_numpy(ARRAYS["pixels"])
    np.testing.assert_allclose(map_pixels(pixels).numpy(), ARRAYS["mapped"], atol=1e-6)
    with torch.no_grad():
        logits = encoder(map_pixels(pixels))
    np.testing.assert_allclose(logits.numpy(), ARRAYS[f"{case}/logits"], atol=2e-5)
    np.testing.assert_array_equal(logits.argmax(dim=1).numpy(), ARRAYS[f"{case}/tokens"])
    assert encoder.blocks.group_1.block_1.gain == pytest.approx(float(ARRAYS[f"{case}/post_gain"]))


@pytest.mark.parametrize("case", DECODERS)
def test_reconstruction_is_dalles(case: str) -> None:
    decoder = Decoder(WIDTH, CODES, int(case.removeprefix("decoder_blocks")), INITIAL)
    decoder.load_state_dict(renamed(section(ARRAYS, f"{case}/state")), strict=True)
    tokens = torch.from_numpy(ARRAYS[f"{case}/input_tokens"])
    with torch.no_grad():
        output = decoder(torch.nn.functional.one_hot(tokens, CODES).permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(output.numpy(), ARRAYS[f"{case}/output"], atol=2e-5)
    np.testing.assert_allclose(unmap_pixels(torch.sigmoid(output[:, :3])).numpy(), ARRAYS[f"{case}/reconstruction"], atol=2e-5)


def test_pixel_maps_are_dalles() -> None:
    for name, function in (("map", map_pixels), ("unmap", unmap_pixels)):
        ramp = torch.from_numpy(ARRAYS["unmap/input"])
        np.testing.assert_allclose(function(ramp).numpy(), ARRAYS[f"{name}/output"], atol=1e-6)


def test_initial_values_are_dalles() -> None:
    seed_all(0, "init")
    for module, case in ((Encoder(24, 256, 2), "dalle_encoder"), (Decoder(24, 256, 2, 16), "dalle_decoder")):
        names = {n: n.replace("weight", "w").replace("bias", "b") for n, _ in module.named_parameters()}
        check_initial_values(module, case, names)


def colours(count: int, size: int = 32) -> Tensor:
    """Images of four flat quadrants in random colours, uint8 (count, 3, size, size)."""
    rng = np.random.default_rng(count)
    cells = rng.integers(0, 256, (count, 3, 2, 2)).repeat(size // 2, axis=2).repeat(size // 2, axis=3)
    return torch.from_numpy(cells.astype(np.uint8))


def small(**changes: Any) -> DVAE:
    base = {"size": (32, 32), "codes": 32, "width": 8, "blocks": 1, "initial": 16, "kl_weight": 0.0, "usage_weight": 20.0, "spread": 10.0}
    return DVAE(**{**base, **changes})


@pytest.fixture(scope="module")
def trained() -> DVAEObjective:
    """A few steps from the data-dependent start."""
    seed_all(0, "init")
    objective = DVAEObjective(small())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    images = colours(32)
    for step in range(30):
        seed_all(0, step)
        losses = objective({"image": images}, step / 30)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert all(torch.isfinite(v) for v in losses.values()) and losses["temperature"] < 0.1
    return objective


def test_start_from_images_uses_the_codebook_and_sees_colours() -> None:
    """From DALL-E's random start one code wins everywhere, and a run of a minute never gets out of that."""
    seed_all(0, "init")
    objective = DVAEObjective(small())
    images = {"image": colours(32)}
    before = objective(images, 0.5)
    after = objective(images, 0.0)
    assert before["perplexity"] < 8 < after["perplexity"] and after["recon"] < before["recon"] - 0.5
    with pytest.raises(ValueError, match="at least 6 channels"):
        DVAEObjective(small(initial=4))(images, 0.0)


def test_gate_passes_a_tokenizer_that_sees_colours(trained: DVAEObjective) -> None:
    scores = trained.check([{"image": colours(16)}])
    assert scores["perplexity"] >= 3.2 and scores["mse"] < scores["mean_colour_mse"] and scores["codes_used"] <= scores["codes"] == 32


def test_gate_fails_one_code_for_everything_and_no_images(trained: DVAEObjective) -> None:
    """A collapsed codebook would make BEiT's targets constant, without a word."""
    collapsed = DVAEObjective(small())
    torch.nn.init.zeros_(collapsed.encoder.blocks.output.conv.weight)
    with pytest.raises(JobFailed, match="perplexity is under 10 %"):
        collapsed.check([{"image": colours(16)}])
    blind = DVAEObjective(small())
    blind.encoder.load_state_dict(trained.encoder.state_dict())
    with pytest.raises(JobFailed, match="no better than each image's mean colour"):
        blind.check([{"image": colours(16)}])
    with pytest.raises(JobFailed, match="held out"):
        blind.check([])


def test_file_gives_the_same_tokens_and_damage_is_named(trained: DVAEObjective, tmp_path: Path) -> None:
    path, images = tmp_path / "asset.pt", colours(4)
    trained.save_asset(path)
    tokenizer = load_tokenizer(path)
    codes, _ = trained.reconstruct(images)
    assert torch.equal(tokenizer(images), codes.flatten(1)) and tokenizer(images).shape == (4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer(images), codes.flatten(1))
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert trained.pictures({"image": images}).shape == (64, 128, 3)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(JobFailed, match=r"asset\.pt is no readable tokenizer"):
        load_tokenizer(path)
    torch.save({"format": 99}, path)
    with pytest.raises(JobFailed, match="format 99"):
        load_tokenizer(path)


def test_schedule_and_perplexity() -> None:
    assert [anneal(1.0, 0.0, f) for f in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert perplexity(torch.full((8,), 3)).item() == pytest.approx(8) and perplexity(torch.tensor([5, 0, 0])).item() == pytest.approx(1)


def test_input_is_eight_pixels_a_patch() -> None:
    """Whatever the patch of the ViT, its grid gets one token a patch; no plan is made where no recipe exists."""
    vit = ViTConfig(size=(96, 64), patch=16, width=96, heads=3)
    assert for_grid(family("demo"), vit).size == (48, 32)
    assert for_grid(family("paper"), ViTConfig()) == DVAE()
    assert DVAE().recipe(family("paper"), ViTConfig()) is None and DVAE().recipe(family("smoke"), vit) is not None
