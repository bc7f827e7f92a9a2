"""Taps and rescaling of BEiT's segmentation backbone: our ViT and Pyramid with its recorded weights give its recorded maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from known_answers import PRECISIONS, check_values, golden, names, section, vit_config
from torch import Tensor, nn

from evals.openmmlab.foreign import openmmlab
from harness.vit import ViT
from weights.keys import STYLES, rename
from weights.loading import place_bias


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    with openmmlab():
        yield


def pyramid(arrays: dict[str, Any], dtype: torch.dtype) -> Any:
    """The recorded model as ours, by the conversion that `weights:` uses. Its backbone has no final norm: none is applied to the taps."""
    from evals.openmmlab.backbone import Pyramid, scales_for

    state = section(arrays, "state")
    steps = {key: value for key, value in state.items() if key.startswith("fpn")}
    ours, left_out = rename({key: value for key, value in state.items() if key not in steps}, STYLES["beit"], "upernet_taps.npz")
    assert all(key.endswith("relative_position_index") for key in left_out)
    vit = ViT(vit_config(arrays, state, "images"))
    lost = vit.load_state_dict(place_bias(ours), strict=False)
    assert (lost.unexpected_keys, lost.missing_keys) == ([], ["norm.weight", "norm.bias"])
    model = Pyramid(vit, tuple(arrays["config/taps"].tolist()), scales_for(vit.config.patch), "batch").eval()
    for i, step in enumerate(model.steps):
        # every step of the original is a sequence, ours is one where there is more than one layer
        cut = f"fpn{i + 1}." if isinstance(step, nn.Sequential) else f"fpn{i + 1}.0."
        step.load_state_dict({key.removeprefix(cut): value for key, value in steps.items() if key.startswith(f"fpn{i + 1}.")}, strict=True)
    return model.to(dtype)


def test_no_recorded_parameter_is_left_out() -> None:
    arrays = golden("upernet_taps")
    assert set(names(arrays, "names")) == set(section(arrays, "state"))


@pytest.mark.parametrize("dtype", PRECISIONS)
@torch.no_grad()
def test_taps_and_maps_are_the_originals(dtype: torch.dtype) -> None:
    """No norm on the taps, the class token in the sequence and not in the maps, LayerScale wherever the file has one, a bias per block."""
    arrays = golden("upernet_taps")
    model, images = pyramid(arrays, dtype), torch.from_numpy(arrays["images"]).to(dtype)
    for tap, found in zip(model.taps, model.vit.features(images, model.taps), strict=True):
        check_values(found, arrays, f"tap{tap}")
    maps: tuple[Tensor, ...] = model(images)
    assert tuple(maps[0].shape) == tuple(arrays["fpn1_shape"])
    check_values(maps[0][:, :, ::2, ::3], arrays, "fpn1")
    check_values(maps[0][:, :, :4, :4], arrays, "fpn1_crop_top_left")
    places = maps[0].shape[-1] * maps[0].shape[-2]
    torch.testing.assert_close(maps[0].double().sum((0, 2, 3)), torch.from_numpy(arrays["fpn1_sum_per_channel"]), rtol=1e-5, atol=2e-5 * places)
    for i in (2, 3, 4):
        check_values(maps[i - 1], arrays, f"fpn{i}")
