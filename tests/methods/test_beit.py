"""BEiT against the original's recorded numbers: logits, loss, accuracy, gradients, weight decay, initial values; and its views and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_answers import check_gradients, check_initial_values, config, golden, section
from PIL import Image
from protocols_for_tests import family
from torch import Tensor, nn

from harness.optim import parameter_groups
from harness.plugins import TrainContext
from harness.randomness import generator, seed_all
from harness.spec import ViTConfig
from harness.vit import ViT
from methods.beit import BEiT, BEiTObjective, BEiTPixel, Pixels, Tokens
from methods.dvae import DVAE, DVAEObjective

ARRAYS = golden("beit_pretrain")
RUNS = sorted({k.split("/")[0] for k in ARRAYS if k.endswith("/state_names")})
SMALL = ViTConfig(size=(32, 48), patch=8, width=32, depth=2, heads=2)


class Recorded(Tokens):
    """The recorded tokens in place of a tokenizer's."""

    def __init__(self, tokens: Tensor, codes: int) -> None:
        self.tokens, self.outputs = tokens, codes

    def __call__(self, batch: Any, images: Tensor, index: Tensor) -> Tensor:
        return self.tokens.gather(1, index)


def build(run: str) -> tuple[BEiTObjective, dict[str, str]]:
    """The recorded model in our modules, and original names of our parameters."""
    names = {str(n) for n in ARRAYS[f"{run}/state_names"]}
    state = {k: v for k, v in section(ARRAYS, "state").items() if k in names}
    size, width = int(config(ARRAYS, "img")), int(config(ARRAYS, "dim"))
    scaled, shared = "blocks.0.gamma_1" in names, "rel_pos_bias.relative_position_bias_table" in names
    vit = ViT(ViTConfig(
        size=(size, size), patch=int(config(ARRAYS, "p")), width=width, depth=int(config(ARRAYS, "depth")), heads=int(config(ARRAYS, "heads")),
        layer_scale=0.1 if scaled else None, relative_bias="shared" if shared else "none", key_bias=False,
    ))
    objective = BEiTObjective(vit, Recorded(torch.from_numpy(ARRAYS["token_ids"]), int(config(ARRAYS, "vocab"))), vit.config.patches, nn.Identity())
    state.pop("rel_pos_bias.relative_position_index", None)
    q = {k: state.pop(k) for k in list(state) if k.endswith("q_bias")}
    for key, value in q.items():
        v = state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v])
    state.setdefault("pos_embed", torch.zeros_like(vit.pos_embed))
    heads = {"lm_head.weight": "head.weight", "lm_head.bias": "head.bias", "mask_token": "mask_token"}
    inner = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "rel_pos_bias.relative_position_bias_table": "relative_bias.0.table"}
    ours = {}
    for key in state:
        name = heads.get(key, f"vit.{key}")
        for old, new in inner.items():
            name = name.replace(old, new)
        ours[name] = key
    objective.load_state_dict({name: state[key] for name, key in ours.items()}, strict=True)
    vit.pos_embed.requires_grad_("pos_embed" in names)
    return objective, ours


def batch() -> dict[str, Tensor]:
    return {"image": torch.from_numpy(ARRAYS["images"]), "mask": torch.from_numpy(ARRAYS["bool_masked_pos"]).bool()}


@pytest.mark.parametrize("run", RUNS)
def test_logits_and_loss_are_the_originals(run: str) -> None:
    """Plain (the paper's tables) and with relative bias and LayerScale (the released weights)."""
    objective, _ = build(run)
    given = batch()
    with torch.no_grad():
        logits = objective.head(objective.encode(given["image"], given["mask"]))
    np.testing.assert_allclose(logits.numpy(), ARRAYS[f"{run}/logits_all"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(logits[given["mask"]].numpy(), ARRAYS[f"{run}/logits_masked"], atol=2e-5, rtol=1e-5)
    result = objective(given)
    torch.testing.assert_close(result["loss"].detach(), torch.from_numpy(ARRAYS[f"{run}/loss"]), rtol=2e-6, atol=0)
    assert result["accuracy"].item() == pytest.approx(float(ARRAYS[f"{run}/accuracy"]))


@pytest.mark.parametrize("run", RUNS)
def test_loss_in_double_precision(run: str) -> None:
    """The sharpest test: single precision would hide a small slip."""
    objective, _ = build(run)
    given = batch()
    loss = objective.double()({**given, "image": given["image"].double()})["loss"]
    assert loss.item() == pytest.approx(float(ARRAYS[f"{run}/loss_float64"]), rel=1e-10)


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_the_originals(run: str) -> None:
    """The fused bias is compared in its q and v parts; its k part must not move."""
    objective, names = build(run)
    objective(batch())["loss"].backward()
    width = objective.vit.config.width
    split = nn.Module()
    for name, p in objective.named_parameters():
        if p.grad is None:
            continue
        parts = {names[name]: p.grad}
        if name.endswith("qkv.bias"):
            assert not p.grad[width : 2 * width].any()
            parts = {names[name].replace("qkv.bias", "q_bias"): p.grad[:width], names[name].replace("qkv.bias", "v_bias"): p.grad[2 * width :]}
        for original, grad in parts.items():
            held = nn.Parameter(torch.zeros_like(grad))
            held.grad = grad
            split.register_parameter(original.replace(".", "/"), held)
    check_gradients(split, ARRAYS, run, {n: n.replace("/", ".") for n, _ in split.named_parameters()})


@pytest.mark.parametrize("run", RUNS)
def test_weight_decay_is_the_originals(run: str) -> None:
    """mask_token and the bias table are decayed, class token and positions are not."""
    objective, names = build(run)
    recipe = BEiT().recipe(family("paper"), ViTConfig())
    assert recipe is not None
    ours: dict[str, float] = {}
    for group in parameter_groups(objective, recipe, objective.vit.config.depth):
        ours.update({names[n]: group["weight_decay"] for n in group["names"]})
    for name, value in zip(ARRAYS[f"{run}/wd_names"], ARRAYS[f"{run}/wd_values"], strict=True):
        name = str(name).replace("q_bias", "qkv.bias").replace("v_bias", "qkv.bias")
        assert ours[name] == value, name


@pytest.mark.parametrize("family_", ["beit_pretrain_abs", "beit_pretrain_rel"])
def test_initial_values_are_the_originals(family_: str) -> None:
    """Cut at one standard deviation, output projections scaled down with depth."""
    seed_all(0, "init")
    plain = family_.endswith("abs")
    vit = ViT(ViTConfig(
        size=(64, 64), patch=16, width=192, depth=4, heads=4, layer_scale=None if plain else 0.1, relative_bias="none" if plain else "shared",
        key_bias=False,
    ))
    objective = BEiTObjective(vit, Recorded(torch.zeros(1, 16, dtype=torch.long), 512), 16, nn.Identity())
    recorded = {str(n) for n in golden("init_statistics")[f"{family_}/names"]}
    names = {}
    for name, _ in objective.named_parameters():
        original = name.removeprefix("vit.").replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2").replace("head.", "lm_head.")
        names[name] = original.replace("relative_bias.0.table", "rel_pos_bias.relative_position_bias_table").replace("qkv.bias", "q_bias")
    for name in [n for n, original in names.items() if original not in recorded]:
        assert name == "vit.pos_embed" or (".blocks." in name and int(name.split(".")[2]) >= 2), name  # blocks that the recorded model has not
    kept = nn.Module()
    for name, p in objective.named_parameters():
        if names[name] in recorded:
            kept.register_parameter(names[name].replace(".", "/"), p)
    check_initial_values(kept, family_, {n: n.replace("/", ".") for n, _ in kept.named_parameters()})


def tokenizer_file(path: Path, size: tuple[int, int]) -> Path:
    seed_all(0, "tokenizer")
    DVAEObjective(DVAE(size=size, codes=16, width=8, blocks=1, initial=8)).save_asset(path)
    return path


def samples(method: BEiT, count: int = 4) -> dict[str, Tensor]:
    recipe = method.recipe(family("demo"), SMALL)
    assert recipe is not None
    transform = method.transform(SMALL, recipe)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)
    made = [transform(Image.fromarray(pixels), generator(0, "sample", i)) for i in range(count)]
    again = transform(Image.fromarray(pixels), generator(0, "sample", 0))
    assert all(torch.equal(made[0][k], again[k]) for k in again)
    return {k: torch.stack([m[k] for m in made]) for k in made[0]}


@pytest.mark.parametrize("method", [BEiT(), BEiT(masking="random"), BEiT(masking="none", recover="all"), BEiTPixel(), BEiTPixel(normalise_pixels=True)])
def test_every_vit_parameter_is_trained_and_the_tokenizer_is_not(method: BEiT, tmp_path: Path) -> None:
    """The tokenizer must be neither in the optimiser nor in checkpoints; the two views show the same box."""
    given = samples(method)
    recipe = method.recipe(family("demo"), SMALL)
    assert recipe is not None
    assets = {"tokenizer": tokenizer_file(tmp_path / "asset.pt", (32, 48))} if method.assets(family("demo"), SMALL) else {}
    vit = ViT(SMALL)
    objective = method.objective(vit, TrainContext(SMALL, recipe, 10, assets))
    result = objective(given, 0.5)
    result["loss"].backward()
    assert torch.isfinite(result["loss"]) and all(p.grad is not None for p in vit.parameters())
    outside = {n.split(".")[0] for n in objective.state_dict()} - {"vit"}
    assert outside == {"mask_token", "head"}
    assert ("tokenizer_image" in given) == (method.target == "tokens")
    hidden = given["mask"].sum(dim=1)
    assert (hidden <= method.blocks(SMALL).target).all() and (hidden.min() > 0) == (method.masking != "none")


def test_views_share_the_box_and_have_eight_pixels_a_patch() -> None:
    """A token must describe the patch that it is the target of: with patch 8 both views are the same picture up to the filter."""
    given = samples(BEiT())
    assert given["image"].shape == given["tokenizer_image"].shape == (4, 3, 32, 48)
    a, b = given["image"].float(), given["tokenizer_image"].float()
    assert not torch.equal(a, b) and (a - b).abs().mean() < 0.25 * a.std()


def test_pixel_loss_is_the_mean_over_hidden_patches() -> None:
    """By hand, with another number of hidden patches in each image."""
    target, prediction = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    loss = Pixels(2, False).loss(prediction, target, valid)["loss"]
    torch.testing.assert_close(loss, ((prediction - target) ** 2)[valid].mean())


def test_skip_and_paper_values() -> None:
    assert BEiT().skip(ViTConfig(size=(32, 32), patch=16)) is not None and BEiT(masking="none").skip(ViTConfig()) is not None
    paper = BEiT().recipe(family("paper"), ViTConfig())
    assert paper is not None and (paper.batch, paper.peak_lr, paper.epochs, paper.min_lr, paper.clip) == (2048, 1.5e-3, 800, 1e-5, 3.0)
    assert BEiT().recipe(family("elsewhere"), ViTConfig()) is None
