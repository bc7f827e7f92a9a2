"""What the ablation tables vary: masks with the right patches, crops of the right size, PCA's coefficients, mask tokens that the encoder sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from protocols_for_tests import family

from harness.plugins import TrainContext
from harness.randomness import generator, seed_all
from harness.spec import UserError, ViTConfig
from harness.vit import ViT
from methods import ablations
from methods.beit import BEiT
from methods.mae import MAE
from methods.masking import BlockMask, block_mask, fixed_size_box, grid_mask
from methods.targets import Components

SMALL = ViTConfig(size=(32, 48), patch=8, width=32, depth=2, heads=2)
PAPER = ViTConfig()


def sample(method: MAE, number: int = 0, vit: ViTConfig = PAPER) -> dict[str, torch.Tensor]:
    recipe = method.recipe(family("demo"), vit)
    assert recipe is not None
    picture = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    return method.transform(vit, recipe)(Image.fromarray(picture), generator(0, "sample", number))


@pytest.mark.parametrize(("masking", "ratio"), [("random", 0.75), ("block", 0.5), ("block", 0.75), ("grid", 0.75)])
def test_the_encoder_sees_as_many_patches_whatever_the_mask(masking: str, ratio: float) -> None:
    """Block-wise masks hide fewer than asked for: the rest is hidden at random, none of a block is shown."""
    method = MAE(masking=masking, mask_ratio=ratio)  # type: ignore[arg-type]
    noise = sample(method)["noise"]
    kept = int(196 * (1 - ratio))
    hidden = torch.argsort(noise, stable=True)[kept:]
    assert noise.shape == (196,) and noise.dtype == torch.float32
    if masking == "grid":
        rows, columns = (p for p in np.nonzero(np.isin(np.arange(196), hidden, invert=True).reshape(14, 14)))
        assert len(rows) == 49 and len(set(rows % 2)) == len(set(columns % 2)) == 1
    elif masking == "block":
        assert ((noise >= 1).sum() <= 196 - kept) and (noise[hidden] >= 1).float().mean() > 0.8


def test_grid_masks_are_random_from_image_to_image() -> None:
    masks = {grid_mask(generator(i), 4, 6).tobytes() for i in range(40)}
    assert len(masks) == 4 and all(np.frombuffer(m, dtype=bool).sum() == 18 for m in masks)


def test_block_masks_at_75_percent_need_few_random_patches() -> None:
    """The share that is not block-wise is what our reading of "block 75" adds to BEiT's masks."""
    counts = [block_mask(generator(i), BlockMask(14, 14, 147, 16)).sum() for i in range(200)]
    assert 135 < np.mean(counts) <= 147


def test_crops_of_fixed_size() -> None:
    """Table 1e: "none" is the central crop, the same each time; "crop, fixed size" moves."""
    assert fixed_size_box(256, 512, (224, 224), 7 / 8, None) == (16, 144, 224, 224)
    boxes = [fixed_size_box(256, 512, (224, 224), 7 / 8, generator(i)) for i in range(30)]
    assert {b[2:] for b in boxes} == {(224, 224)} and len(set(boxes)) > 20 and all(b[0] <= 32 and b[1] <= 288 for b in boxes)
    none = MAE(augmentation="none")
    assert torch.equal(sample(none, 0)["image"], sample(none, 1)["image"])
    assert not torch.equal(sample(MAE(augmentation="crop-fixed"), 0)["image"], sample(MAE(augmentation="crop-fixed"), 1)["image"])


def test_pca_targets_are_the_coefficients_of_largest_variance() -> None:
    """Against numpy's singular values, and saved with the objective: a resumed run must predict the same directions."""
    torch.manual_seed(0)
    images = torch.randn(6, 3, 16, 16) + torch.linspace(-3, 3, 16)
    target = Components(4, 5)
    index = torch.arange(16).expand(6, -1)
    coefficients = target({}, images, index)
    patches = images.reshape(6, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(96, 48).numpy()
    singular = np.linalg.svd(patches - patches.mean(axis=0), compute_uv=False)[:5]
    np.testing.assert_allclose(coefficients.flatten(0, 1).norm(dim=0).numpy(), singular, rtol=1e-4)
    other = Components(4, 5)
    other.load_state_dict(target.state_dict())
    assert torch.equal(other({}, images[:2], index[:2]), coefficients[:2])


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_where_mask_tokens_enter(where: str) -> None:
    """Table 1c: with mask tokens the encoder's work is four times as large, and hidden pixels still must not reach it."""
    seed_all(0, "init")
    method = MAE(mask_tokens=where)  # type: ignore[arg-type]
    recipe = method.recipe(family("demo"), SMALL)
    assert recipe is not None
    objective = method.objective(ViT(SMALL), TrainContext(SMALL, recipe, 1))
    lengths: list[int] = []
    objective.vit.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    images, noise = torch.rand(2, 3, 32, 48), torch.rand(2, 24)
    first, mask = objective.predict(images, noise)
    assert lengths == [25 if where == "encoder" else 7]
    hidden = mask[0].reshape(4, 6).repeat_interleave(8, 0).repeat_interleave(8, 1).bool()
    changed = images.clone()
    changed[0, :, hidden] += 1.0
    torch.testing.assert_close(objective.predict(changed, noise)[0][0], first[0])
    changed[0, :, ~hidden] += 1.0
    assert not torch.allclose(objective.predict(changed, noise)[0][0], first[0], atol=1e-4)


def test_every_row_has_a_source_and_changes_something() -> None:
    for rows, method in ((ablations.MAE, MAE()), (ablations.BEIT, BEiT())):
        for name, (fields, source) in rows.items():
            assert any(getattr(method, field) != value for field, value in fields.items()), name
            assert "paper" in source or "repo" in source, name
    with pytest.raises(UserError, match="grid masking hides"):
        MAE(masking="grid", mask_ratio=0.5)
