"""BEiT and DINO at once: both losses on one ViT, the same in parts of a batch, and recipes that say what is ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from protocols_for_tests import family
from torch.utils.data import default_collate

from harness import plugins
from harness.plugins import TrainContext
from harness.randomness import generator, seed_all
from harness.spec import UserError, ViTConfig
from harness.vit import ViT
from methods.beit import BEiT
from methods.dino import DINO
from methods.multitask import BEiTDINO, BEiTDINOObjective
from protocols.paper import BACKBONES, paper

TINY = ViTConfig(size=(32, 32), patch=8, width=32, depth=2, heads=2)
METHOD = BEiTDINO(BEiT(target="pixels", mask_patches=90, mask_minimum=30), DINO(local_crops=2, prototypes=16))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[BEiTDINOObjective, dict[str, Any]]:
    """Objective and four samples whose masks hide different numbers of patches."""
    from PIL import Image

    recipe = METHOD.recipe(family("smoke"), TINY)
    assert recipe is not None
    sample = METHOD.transform(TINY, recipe)
    noise = generator(0, "image").integers(0, 255, (40, 40, 3), dtype="uint8")
    batch = default_collate([{**sample(Image.fromarray(noise), generator(i, "sample")), "bad": torch.tensor(-1)} for i in range(4)])
    batch["mask"][0, :8] = False  # BEiT's generator may give up early
    assert len(set(batch["mask"].sum(1).tolist())) > 1
    seed_all(0, "init")
    return METHOD.objective(ViT(TINY), TrainContext(TINY, recipe, 12)).double().eval(), {k: v for k, v in batch.items() if k != "bad"}


def test_both_train_one_vit_and_a_batch_in_parts_gives_the_same_loss(trained: tuple[BEiTDINOObjective, dict[str, Any]]) -> None:
    """Weighed by hidden patches, as BEiT's alone, DINO's part would depend on how many processes share a batch."""
    objective, batch = trained
    assert objective.vit is objective.beit.vit is objective.dino.vit
    assert not any(n.startswith(("beit.vit", "dino.vit")) for n, _ in objective.named_parameters())  # a recipe's patterns say vit.*
    whole = objective(batch, 0.5)
    assert "weight" not in whole
    halves = [objective({k: v[half] for k, v in batch.items()}, 0.5)["loss"] for half in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, whole["loss"])
    masked, crops = objective.beit(batch, 0.5), objective.dino(batch, 0.5)
    places = 4 * objective.beit.limit  # type: ignore[operator]
    torch.testing.assert_close(whole["loss"], masked["loss"] * masked["weight"] / places + crops["loss"])
    assert masked["weight"] < places
    before = [p.clone() for p in objective.dino.teacher.parameters()]
    whole["loss"].backward()
    with torch.no_grad():
        for p in objective.vit.parameters():
            p.add_(0.1)
    objective.after_step(0.5)
    assert any(not torch.equal(a, b) for a, b in zip(before, objective.dino.teacher.parameters(), strict=True))


def test_recipe_is_beits_and_says_what_no_source_gives() -> None:
    recipe, beits = (plugins.build("methods", n).recipe(paper, BACKBONES["vit-b16"]) for n in ("beit-dino", "beit@300"))
    told = dict(recipe.sources)
    assert (recipe.epochs, recipe.batch, recipe.peak_lr, recipe.clip) == (300, beits.batch, beits.peak_lr, beits.clip)
    assert told["epochs"].startswith("BEiT-paper Table") and any(s.startswith("ours") for w, s in recipe.sources if w == "all")
    assert BEiTDINO(beit=BEiT(relative_bias=True)).skip(ViTConfig(relative_bias="shared", positions="none"))
    with pytest.raises(UserError, match="share mean and std"):
        BEiTDINO(beit=BEiT(mean=(0.5, 0.5, 0.5)))
