"""iGPT's objectives: no patch sees what it predicts, codes stand where they belong, losses and starting values are the original's."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from protocols_for_tests import family
from torch import Tensor, nn

from harness.canonical import restore
from harness.plan import Planner
from harness.plugins import TrainContext, build
from harness.randomness import seed_all
from harness.request import Request
from harness.spec import UserError, ViTConfig
from harness.vit import ViT
from methods.igpt import IGPT, IGPTObjective
from methods.palette import Palette, PaletteObjective
from protocols.demo import demo
from protocols.paper import BACKBONES

TINY = ViTConfig(size=(24, 16), patch=8, width=32, depth=2, heads=2)  # 3 x 2 patches
PLUS = dataclasses.replace(TINY, positions="none", relative_bias="shared")


def objective(config: ViTConfig = TINY, codes: int = 2, most: int | None = None, colours: int = 8) -> IGPTObjective:
    """An objective whose head has something to say: it starts from zeros."""
    seed_all(3)
    made = IGPTObjective(ViT(config), 255 * torch.rand(colours, 3), codes, most, nn.Identity())
    nn.init.normal_(made.head.weight)
    if made.vit.relative_bias is not None:
        nn.init.normal_(made.vit.relative_bias[0].table)
    return made


def influence(made: IGPTObjective, mask: Tensor | None = None) -> Tensor:
    """(N, N): gradient of the scores of patch i (row) by the pixels of patch j (column), its largest size."""
    images = torch.randn(1, 3, *made.vit.config.size, requires_grad=True)
    scores, (h, w), p = made.scores(made.tokens(images, mask)), made.vit.config.grid, made.vit.config.patch
    rows = []
    for i in range(h * w):
        (gradient,) = torch.autograd.grad(scores[0, i].pow(2).sum(), images, retain_graph=True)
        rows.append(gradient.abs().reshape(3, h, p, w, p).amax(dim=(0, 2, 4)).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("fused", [True, False])  # the explicit attention is what bf16 takes on a CPU
@pytest.mark.parametrize("config", [TINY, PLUS], ids=["positions", "relative-bias"])
def test_a_patch_is_predicted_from_all_patches_before_it_and_from_none_after(config: ViTConfig, fused: bool) -> None:
    """Raster order: patch i from patches 0 .. i - 1, the first from the start token alone. A leak would make the task trivial and the features empty."""
    made = objective(config)
    for block in made.vit.blocks:
        block.attn.fused_attn = fused
    assert torch.equal(influence(made) > 0, torch.ones(6, 6, dtype=torch.bool).tril(-1))


def test_hidden_patches_are_predicted_from_all_visible_ones_and_from_none_hidden() -> None:
    made, mask = objective(most=3), torch.tensor([[False, True, False, False, True, False]])
    seen = influence(made, mask) > 0
    assert torch.equal(seen, (~mask).expand(6, 6))


def test_codes_are_in_raster_order_of_patches_and_inside_each() -> None:
    """An image painted in palette colours comes back from its codes; the first patch's codes are its own four quarters."""
    made = objective()
    ids = torch.arange(24).reshape(1, 6, 4) % 8
    images = (255 * made.paint(ids)).round()
    assert images.shape == (1, 3, 24, 16) and torch.equal(made.targets(images), ids)
    assert torch.equal(made.paint(ids)[0, :, 0, [0, 4, 8]].T * 255, made.colours[ids[0, [0, 0, 1], [0, 1, 0]]])
    assert torch.equal(made.paint(ids)[0, :, 4, 0] * 255, made.colours[ids[0, 0, 2]])


def test_losses_are_negative_log_likelihoods_of_codes() -> None:
    """Next: the mean over all codes. Masked: the mean over images of each image's own mean, as iGPT-repo has it, so that an image counts as one."""
    images = (255 * torch.rand(2, 3, 24, 16)).to(torch.uint8)
    mask = torch.tensor([[True, False, False, False, False, False], [False, True, True, False, False, True]])
    for most, given in ((None, None), (4, mask)):
        made = objective(most=most)
        with torch.no_grad():
            log_p = F.log_softmax(made.scores(made.tokens(images.float(), given)), dim=-1)
            nats = -log_p.gather(-1, made.targets(images)[..., None])[..., 0].mean(dim=2)  # (2, 6)
            wanted = nats.mean() if given is None else (nats[0, 0] + nats[1, [1, 2, 5]].mean()) / 2
            made.normalize = Float()
            assert torch.allclose(made({"image": images, **({} if given is None else {"mask": given})})["loss"], wanted, atol=1e-5)


class Float(nn.Module):
    """Pixels as they are."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float()


def test_it_starts_from_the_originals_values() -> None:
    """iGPT-repo src/model.py: every colour equally likely at first; q, k, v 1 / sqrt(D), output 1 / sqrt(D depth), MLP 0.02 at iGPT-S's width."""
    config = ViTConfig(size=(32, 32), patch=16, width=512, depth=3, heads=8)
    seed_all(5)
    made = IGPTObjective(ViT(config), torch.rand(16, 3), 2, None, Float())
    assert made({"image": torch.rand(2, 3, 32, 32)})["loss"].item() == pytest.approx(math.log(16), abs=1e-6)
    block = made.vit.blocks[1]
    parts = (block.attn.qkv, 512**-0.5), (block.attn.proj, (3 * 512) ** -0.5), (block.mlp.fc1, 0.02), (block.mlp.fc2, 0.02)
    for part, std in parts:
        assert part.weight.std().item() == pytest.approx(std, rel=0.03) and not part.bias.any()
    assert made.vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15) and made.vit.pos_embed.std().item() == pytest.approx(0.01, rel=0.1)


def test_masks_hide_each_patch_with_the_papers_probability() -> None:
    """p = 0.15 (recipes A15), independently: the number varies as a binomial's; at least one, so that every image has a loss."""
    method, config = build("methods", "igpt@masked"), ViTConfig(size=(64, 64), patch=8, width=32, depth=1, heads=2)
    recipe = method.recipe(family("smoke"), config)
    sample = method.transform(config, recipe)
    masks = np.stack([sample(Image.new("RGB", (70, 70)), np.random.default_rng(i))["mask"].numpy() for i in range(400)])
    counts = masks.sum(axis=1)
    assert masks.mean() == pytest.approx(0.15, abs=0.01) and counts.std() == pytest.approx(math.sqrt(64 * 0.15 * 0.85), rel=0.15)
    assert counts.min() >= 1 and counts.max() <= method.limit(64) == 24
    assert (masks.mean(axis=0) > 0.07).all() and "mask" not in IGPT().transform(config, recipe)(Image.new("RGB", (70, 70)), np.random.default_rng(0))


@pytest.mark.parametrize("name", ["igpt", "igpt@masked"])
def test_pictures_show_images_codes_and_what_is_predicted(name: str, tmp_path: Path) -> None:
    """The prediction that is shown is the likeliest colour; what is not hidden is shown as it is."""
    method = build("methods", name)
    PaletteObjective(Palette(8)).save_asset(tmp_path / "asset.pt")
    recipe = method.recipe(family("smoke"), TINY)
    made = method.objective(ViT(TINY), TrainContext(TINY, recipe, 4, {"palette": tmp_path / "asset.pt"}))
    batch = {"image": torch.randint(0, 256, (2, 3, 24, 16), dtype=torch.uint8), "mask": torch.tensor([[True] + 5 * [False]] * 2)}
    sheet = made.pictures(batch if name == "igpt@masked" else {"image": batch["image"]})
    assert sheet.shape == (72, 32, 3) and sheet.dtype == np.uint8
    images, codes, predicted = np.split(sheet, 3)
    assert np.array_equal(images[:, :16], batch["image"][0].permute(1, 2, 0).numpy())
    first = (made.colours[0]).round().to(torch.uint8).numpy()  # of equal scores the first
    hidden = np.zeros((24, 32), dtype=bool)
    hidden[:8, :8] = hidden[:8, 16:24] = True
    hidden |= name == "igpt"
    assert (predicted[hidden] == first).all() and np.array_equal(predicted[~hidden], codes[~hidden])


def test_recipe_and_assets_of_the_paper() -> None:
    """recipes A15: Adam (0.9, 0.95), batch 128, 1M iterations, which are 100 epochs, a warm-up of one; the learning rate is marked as ours."""
    recipe = IGPT().recipe(family("paper"), BACKBONES["vit-b16"])
    assert recipe is not None and (recipe.batch, recipe.epochs, recipe.warmup, recipe.betas, recipe.weight_decay) == (128, 100, 1, (0.9, 0.95), 0)
    assert (recipe.min_lr, recipe.drop_path, recipe.clip, recipe.augment.flip) == (0, 0, None, 0)
    assert recipe.epochs * (1_281_167 // recipe.batch) == pytest.approx(1e6, rel=2e-3)
    assert {words for words, source in recipe.sources if source.startswith("ours")} == {"lr"}
    assert IGPT().recipe(family("paper"), TINY) is None and IGPT().recipe(family("unknown"), TINY) is None
    assert IGPT().assets(family("paper"), BACKBONES["vit-h14"])["palette"].maker == Palette(512, (224, 224), (64, 64))
    assert "do not fit" in (IGPT(codes=9).skip(TINY) or "") and IGPT().skip(TINY) is None
    with pytest.raises(UserError, match="igpt's mask_ratio"):
        IGPT(mask_ratio=0)


def test_it_names_its_own_probe_under_every_protocol() -> None:
    """Any other would read the class token, which has seen no image before it."""
    masked = build("methods", "igpt@masked")
    for setting in (demo, family("paper")):
        assert [m.transfer("linear", setting, TINY).variant for m in (IGPT(), masked)] == ["igpt", "igpt-masked"]
    assert IGPT().transfer("imagenet", family("paper"), TINY).source.startswith("ours")
    assert "causal" in IGPT().notes(TINY)[0] and "causal" not in masked.notes(TINY)[0]


def test_both_objectives_share_a_palette_and_each_is_probed_as_it_was_trained(tmp_path: Path) -> None:
    """The column keeps its name; one k-means serves both rows."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "imagenet" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "imagenet" / split / name / "1.png")
    plan = Planner(Request(("igpt", "igpt@masked"), ("linear",), protocol="paper", data=str(tmp_path))).plan()
    assert sorted(n.kind for n in plan.nodes) == ["asset", "evaluate", "evaluate", "pretrain", "pretrain"]
    found = [(cell.about["eval"], restore(cell.node.identity["plugin"]).by) for cell in plan.cells if cell.node is not None]
    assert found == [("linear", "igpt"), ("linear", "igpt-masked")]
