"""BEiT against the original's recorded numbers: logits, loss, accuracy, gradients, weight decay, initial values; and its views and masks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

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
    original_parts,
    section,
    translate,
    vit_config,
    vit_name,
)
from PIL import Image
from protocols_for_tests import family
from torch import Tensor, nn

from harness.optim import parameter_groups
from harness.plugins import TrainContext
from harness.randomness import generator, seed_all
from harness.run import save_picture
from harness.spec import ViTConfig
from harness.vit import ViT
from methods.beit import BEiT, BEiTObjective, BEiTPixel, Pixels, Tokens
from methods.dvae import DVAE, DVAEObjective

ARRAYS = golden("beit_pretrain")
RUNS = cases(ARRAYS, holds="state_names")
SMALL = ViTConfig(size=(32, 48), patch=8, width=32, depth=2, heads=2)


class Recorded(Tokens):
    """The recorded tokens in place of a tokenizer's."""

    def __init__(self, tokens: Tensor, codes: int) -> None:
        self.tokens, self.outputs = tokens, codes

    def __call__(self, batch: Any, images: Tensor, index: Tensor) -> Tensor:
        return self.tokens.gather(1, index)


def ours(original: str) -> str:
    """Our name of a parameter of the original."""
    return original.replace("lm_head", "head") if original.startswith(("lm_head", "mask_token")) else f"vit.{vit_name(original)}"


def build(run: str, precision: torch.dtype = torch.float32) -> BEiTObjective:
    """The recorded model in our modules."""
    used = set(names(ARRAYS, f"{run}/state_names"))
    state = {key: value for key, value in section(ARRAYS, "state").items() if key in used}
    vit = ViT(vit_config(ARRAYS, state, "images"))
    targets = Recorded(torch.from_numpy(ARRAYS["token_ids"]), config(ARRAYS, "vocab"))
    objective = BEiTObjective(vit, targets, vit.config.patches, nn.Identity())
    objective.load_state_dict(translate(state, ours), strict=True)
    return objective.to(precision)


def batch(precision: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"image": torch.from_numpy(ARRAYS["images"]).to(precision), "mask": torch.from_numpy(ARRAYS["bool_masked_pos"]).bool()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("run", RUNS)
def test_logits_and_loss_are_the_originals(run: str, precision: torch.dtype) -> None:
    """Plain (the paper's tables) and with relative bias and LayerScale (the released weights)."""
    objective, given = build(run, precision), batch(precision)
    with torch.no_grad():
        logits = objective.head(objective.encode(given["image"], given["mask"]))
        result = objective(given)
    check_values(logits, ARRAYS, f"{run}/logits_all")
    check_values(logits[given["mask"]], ARRAYS, f"{run}/logits_masked")
    check_loss(result["loss"], ARRAYS, f"{run}/loss")
    assert result["accuracy"].item() == pytest.approx(float(ARRAYS[f"{run}/accuracy"]), rel=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_the_originals(run: str) -> None:
    """The fused bias is compared in its q and v parts; its k part must not move."""
    objective = build(run)
    objective(batch())["loss"].backward()
    check_gradients(objective, ARRAYS, run, ours)


@pytest.mark.parametrize("run", RUNS)
def test_parameters_and_weight_decay_are_the_originals(run: str) -> None:
    """Nothing more and nothing less is trained; mask_token and the bias table are decayed, class token and positions are not."""
    objective, recipe = build(run), BEiT().recipe(family("paper"), ViTConfig())
    assert recipe is not None
    decays = dict(zip(names(ARRAYS, f"{run}/wd_names"), ARRAYS[f"{run}/wd_values"].tolist(), strict=True))
    groups = parameter_groups(objective, dataclasses.replace(recipe, weight_decay=max(decays.values())), len(objective.vit.blocks))
    check_groups(groups, {name: (decay, 1.0) for name, decay in decays.items()}, ours)
    without_k = sum(p.numel() for p in objective.parameters()) - len(objective.vit.blocks) * objective.vit.config.width
    assert without_k == int(ARRAYS[f"{run}/num_parameters"])


@pytest.mark.parametrize("family_", [f for f in cases(golden("init_statistics")) if f.startswith("beit_pretrain")])
def test_initial_values_are_the_originals(family_: str) -> None:
    """Cut at one standard deviation, output projections scaled down with depth."""
    table = initial(family_)
    seed_all(0, "init")
    vit = ViT(initial_vit(table))
    objective = BEiTObjective(vit, Recorded(torch.zeros(1, 1, dtype=torch.long), table["lm_head.weight"]["shape"][0]), None, nn.Identity())
    check_initial_values(original_parts(dict(objective.named_parameters()), list(table), ours), table)
    assert {ours(name) for name in table} == {name for name, p in objective.named_parameters() if p.requires_grad}


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


def test_the_pictures_decode_the_predicted_tokens(tmp_path: Path) -> None:
    """A method that guesses every token paints what the tokenizer makes of its own; wrong guesses show, and only where something was hidden."""
    given, file = samples(BEiT()), tokenizer_file(tmp_path / "asset.pt", (32, 48))
    recipe = BEiT().recipe(family("demo"), SMALL)
    assert recipe is not None
    objective = BEiT().objective(ViT(SMALL, 0.5), TrainContext(SMALL, recipe, 10, {"tokenizer": file}))
    own = objective.targets(given, given["image"], torch.arange(24).expand(4, -1))
    objective.head = nn.Identity()
    for guess in (own, own.where(~given["mask"], (own + 1) % 16), own.where(given["mask"], (own + 1) % 16)):
        objective.encode = lambda images, mask, guess=guess: nn.functional.one_hot(guess, 16).float()
        sheet = torch.from_numpy(objective.pictures(given)).permute(2, 0, 1)
        rows = [row.reshape(3, 32, 4, 48).transpose(0, 2).transpose(1, 2) for row in sheet.split(32, dim=1)]  # 4 of (B, 3, H, W)
        grey = given["mask"].reshape(4, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(rows[0])
        assert torch.equal(rows[0], given["tokenizer_image"]) and (rows[1][grey] == 128).all() and torch.equal(rows[1][~grey], rows[0][~grey])
        assert torch.equal(rows[3], rows[2]) == torch.equal(guess.where(given["mask"], own), own)
    assert objective.training


def test_why_there_are_no_pictures_of_tokens_is_said(tmp_path: Path) -> None:
    """A tokenizer of before its decoder was kept still makes tokens; so does one whose file is damaged by the time that pictures are made."""
    given, file = samples(BEiT()), tokenizer_file(tmp_path / "asset.pt", (32, 48))
    content = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in content.items() if k != "decoder"}, file)
    targets = Tokens.read(file)
    prediction, whole = torch.zeros(4, 24, 16), (given, given["image"])
    assert targets.sheet(*whole, prediction, given["mask"], nn.Identity()) == "the tokenizer was made before its decoder was kept"
    file.write_bytes(b"damaged")
    assert "cannot be read" in targets.sheet(*whole, prediction, given["mask"], nn.Identity())
    nothing = BEiT(masking="none", recover="all").objective(ViT(SMALL), TrainContext(SMALL, None, 10, {"tokenizer": tokenizer_file(file, (32, 48))}))
    assert nothing.pictures(samples(BEiT(masking="none"))) == "nothing is hidden from it"
    path = tmp_path / "pictures.png"  # the words end up in the record, which the report reads
    assert save_picture(path, "nothing is hidden from it") == {"no_pictures": "nothing is hidden from it"} and not path.exists()
    assert save_picture(path, np.zeros((2, 2, 3), dtype=np.uint8)) == {} and path.exists()


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
