"""The tokenizer: networks against DALL-E's recorded numbers, its gate, its file, and that a few steps train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_answers import PRECISIONS, cases, check_initial_values, check_values, golden, initial, names, section
from protocols_for_tests import family
from torch import Tensor, nn

from harness.randomness import seed_all
from harness.spec import JobFailed, ViTConfig
from methods.dalle import Decoder, Encoder, load_tokenizer, map_pixels, unmap_pixels
from methods.dvae import DVAE, DVAEObjective, anneal, for_grid, perplexity

ARRAYS = golden("dalle_encoder")
WIDTH, CODES, INITIAL = (int(v) for v in ARRAYS["config/n_hid_vocab_n_init"])
ENCODERS, DECODERS = cases(ARRAYS, holds="logits"), cases(ARRAYS, holds="reconstruction")


def ours(original: str) -> str:
    """DALL-E calls weights and biases w and b."""
    return original[:-1] + {"w": "weight", "b": "bias"}[original[-1]]


def load(module: nn.Module, case: str, precision: torch.dtype) -> None:
    module.load_state_dict({ours(key): value for key, value in section(ARRAYS, f"{case}/state").items()}, strict=True)
    module.to(precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", ENCODERS)
def test_logits_and_tokens_are_dalles(case: str, precision: torch.dtype) -> None:
    """Stage by stage. Otherwise DALL-E's weights would give other tokens here."""
    encoder, found = Encoder(WIDTH, CODES, int(case.removeprefix("encoder_blocks"))), {}
    load(encoder, case, precision)
    stages = names(ARRAYS, f"{case}/stage_names")
    for name in stages:
        encoder.blocks.get_submodule(name).register_forward_hook(lambda module, given, output, name=name: found.update({name: output}))
    pixels = torch.from_numpy(ARRAYS["pixels"]).to(precision)
    np.testing.assert_allclose(map_pixels(pixels).numpy(), ARRAYS["mapped"], atol=1e-6)
    with torch.no_grad():
        logits = encoder(torch.from_numpy(ARRAYS["mapped"]).to(precision))
    for name, mean, shape in zip(stages, ARRAYS[f"{case}/mean_abs_after_stage"], ARRAYS[f"{case}/stage_shapes"].tolist(), strict=True):
        assert list(found[name].shape) == shape and found[name].abs().mean().item() == pytest.approx(mean, rel=1e-5), name
    check_values(logits, ARRAYS, f"{case}/logits")
    np.testing.assert_array_equal(logits.argmax(dim=1).numpy(), ARRAYS[f"{case}/tokens"])
    best = logits.topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).min().item() == pytest.approx(float(ARRAYS[f"{case}/min_top2_margin"]), abs=4e-5)
    assert encoder.blocks.group_1.block_1.gain == pytest.approx(float(ARRAYS[f"{case}/post_gain"]), rel=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", DECODERS)
def test_reconstruction_is_dalles(case: str, precision: torch.dtype) -> None:
    decoder = Decoder(WIDTH, CODES, int(case.removeprefix("decoder_blocks")), INITIAL)
    load(decoder, case, precision)
    tokens = torch.from_numpy(ARRAYS[f"{case}/input_tokens"])
    with torch.no_grad():
        output = decoder(nn.functional.one_hot(tokens, CODES).permute(0, 3, 1, 2).to(precision))
    check_values(output, ARRAYS, f"{case}/output")
    check_values(unmap_pixels(torch.sigmoid(output[:, :3])), ARRAYS, f"{case}/reconstruction")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pixel_maps_are_dalles(precision: torch.dtype) -> None:
    """Both on a ramp that leaves [0, 1]."""
    ramp = torch.from_numpy(ARRAYS["unmap/input"]).to(precision)
    for name, function in (("map", map_pixels), ("unmap", unmap_pixels)):
        np.testing.assert_allclose(function(ramp).numpy(), ARRAYS[f"{name}/output"], atol=1e-6)


@pytest.mark.parametrize("case", [f for f in cases(golden("init_statistics")) if f.startswith("dalle")])
def test_initial_values_are_dalles(case: str) -> None:
    table = initial(case)
    blocks = len({name.split(".")[2] for name in table if name.startswith("blocks.group_1.")})
    first, last = table["blocks.input.w"]["shape"], table["blocks.output.conv.w"]["shape"]
    seed_all(0, "init")
    module = Encoder(first[0], last[0], blocks) if case == "dalle_encoder" else Decoder(last[1], first[1], blocks, first[0])
    values = dict(module.named_parameters())
    assert len(values) == len(table) and all(row["trainable"] for row in table.values())
    check_initial_values({name: values[ours(name)] for name in table}, table)


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
