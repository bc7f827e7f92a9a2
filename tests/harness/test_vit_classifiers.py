"""Fine-tuning models of MAE and BEiT against the originals: features, scores, loss, gradients, layer decay, initial values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from known_answers import (
    PRECISIONS,
    Arrays,
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
from torch import Tensor, nn

from harness.classifier import FINE_TUNE_STD, Classifier
from harness.optim import layer_of, parameter_groups
from harness.randomness import seed_all
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Recipe, ViTConfig
from harness.vit import ViT, init_beit

FILES = {name: golden(name) for name in ("mae_finetune", "beit_finetune")}
RUNS = [(name, run) for name, arrays in FILES.items() for run in cases(arrays, holds="state_names")]
NO_DECAY = ("vit.pos_embed", "vit.cls_token")


def ours(original: str) -> str:
    """Our name of a parameter of the original."""
    return original if original.startswith(("head", "fc_norm")) else f"vit.{vit_name(original)}"


def classifier(vit: ViTConfig, classes: int, mean_pooling: bool) -> Classifier:
    """A model that takes images that are normalised already, as the recorded ones are."""
    model = Classifier(
        ViT(vit), classes, mean=IMAGENET_MEAN, std=IMAGENET_STD, pooling="mean" if mean_pooling else "cls", head_std=FINE_TUNE_STD
    )
    model.normalize = nn.Identity()
    return model


def recorded_state(arrays: Arrays, run: str) -> dict[str, Tensor]:
    """State of a variant. Where the file has one state for two poolings, the norm after the mean is the norm of the class token."""
    union = section(arrays, "state")
    return {key: union[key if key in union else key.replace("norm.", "fc_norm.")] for key in names(arrays, f"{run}/state_names")}


def build(name: str, run: str, precision: torch.dtype = torch.float32) -> Classifier:
    """The recorded model in our modules."""
    arrays, state = FILES[name], recorded_state(FILES[name], run)
    model = classifier(vit_config(arrays, state, "images"), config(arrays, "classes"), "fc_norm.weight" in state)
    missing, unexpected = model.load_state_dict(translate(state, ours), strict=False)
    assert not unexpected and set(missing) == ({"vit.norm.weight", "vit.norm.bias"} if model.pooling == "mean" else set())
    return model.eval().to(precision)


def given(name: str, precision: torch.dtype) -> dict[str, Tensor]:
    return {"image": torch.from_numpy(FILES[name]["images"]).to(precision), "label": torch.from_numpy(FILES[name]["labels"])}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "run"), RUNS)
def test_scores_are_the_originals(name: str, run: str, precision: torch.dtype) -> None:
    """Read-out of the class token and of the mean, with absolute positions, a bias of each block, and a shared bias."""
    model, batch = build(name, run, precision), given(name, precision)
    with torch.no_grad():
        check_values(model.features(batch["image"]), FILES[name], f"{run}/features")
        check_values(model.logits(batch["image"]), FILES[name], f"{run}/logits")
        check_loss(model(batch)["loss"], FILES[name], f"{run}/loss")


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_gradients_are_the_originals(name: str, run: str) -> None:
    """Of every parameter that the original trains, positions and bias tables included, and of no other."""
    model = build(name, run)
    model(given(name, torch.float32))["loss"].backward()
    check_gradients(model, FILES[name], run, ours)


def model_of(parameters: list[str], depth: int) -> Classifier:
    """A narrow model with the parameters of a recorded list of names."""
    shared, block = "rel_pos_bias.relative_position_bias_table" in parameters, "blocks.0.attn.relative_position_bias_table" in parameters
    vit = ViTConfig(
        size=(16, 16), patch=8, width=8, depth=depth, heads=2, positions="learned" if "pos_embed" in parameters else "none",
        relative_bias="shared" if shared else "block" if block else "none", layer_scale=0.1 if "blocks.0.gamma_1" in parameters else None,
        key_bias="blocks.0.attn.q_bias" not in parameters,
    )
    return classifier(vit, 3, "fc_norm.weight" in parameters)


def check_layers(arrays: Arrays, case: str, no_decay: tuple[str, ...]) -> None:
    """Layer, lr scale and weight decay of each parameter, and that no other is trained."""
    depth, decay, weight_decay = arrays[f"{case}/config_depth_decay_wd"].tolist()
    parameters = names(arrays, f"{case}/names")
    model = model_of(parameters, int(depth))
    recipe = Recipe(batch=1, lr=1.0, epochs=1, weight_decay=weight_decay, layer_decay=decay, no_decay=no_decay)
    columns = [arrays[f"{case}/{key}"].tolist() for key in ("weight_decay", "lr_scale", "layer_id", "ndim")]
    expected: Mapping[str, tuple[float, ...]] = dict(zip(parameters, zip(*columns, strict=True), strict=True))
    groups = parameter_groups(model, recipe, int(depth))
    check_groups(groups, {name: (row[0], row[1]) for name, row in expected.items()}, ours)
    shapes = dict(model.named_parameters())
    for name, (_, _, layer, ndim) in expected.items():
        assert layer_of(ours(name), int(depth), model.vit.config.relative_bias == "block") == layer and shapes[ours(name)].ndim == ndim, name
    for layer, value in enumerate(arrays.get(f"{case}/values", ())):
        assert math.isclose(decay ** (depth + 1 - layer), value, rel_tol=1e-12)


@pytest.mark.parametrize("case", cases(FILES["mae_finetune"], "lrd/"))
def test_layer_decay_is_maes(case: str) -> None:
    """Positions and class token are of layer 0, trained, and not decayed."""
    check_layers(FILES["mae_finetune"], f"lrd/{case}", NO_DECAY)


@pytest.mark.parametrize("case", cases(FILES["beit_finetune"], "layer_decay/"))
def test_layer_decay_is_beits(case: str) -> None:
    """A bias table has the layer of its block, and is decayed unless the skip list names it."""
    skipped = tuple(ours(name) for name in names(FILES["beit_finetune"], f"layer_decay/{case}/skip_list"))
    assert set(NO_DECAY) <= set(skipped)
    check_layers(FILES["beit_finetune"], f"layer_decay/{case}", skipped)


@pytest.mark.parametrize("family", [f for f in cases(golden("init_statistics")) if "finetune" in f])
def test_initial_values_are_the_originals(family: str) -> None:
    """A fresh model before a checkpoint is loaded: its head starts near zero, its bias tables at zero."""
    table = initial(family)
    seed_all(0, "init")
    architecture = initial_vit(table)
    model = classifier(architecture, table["head.weight"]["shape"][0], "fc_norm.weight" in table)
    if not architecture.key_bias:
        init_beit(model.vit, transfer=True)
    check_initial_values(original_parts(dict(model.named_parameters()), list(table), ours), table)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {ours(name) for name, row in table.items() if row["trainable"]}


def test_tables_of_each_block_start_as_the_shared_one() -> None:
    """The copy at the start of BEiT's fine-tuning changes no score."""
    one = ViTConfig(size=(16, 24), patch=8, width=8, depth=2, heads=2, relative_bias="shared", positions="none", key_bias=False)
    shared = classifier(one, 3, True).eval()
    nn.init.normal_(shared.vit.relative_bias[0].table)
    each = classifier(dataclasses.replace(one, relative_bias="block"), 3, True).eval()
    state = shared.state_dict()
    each.load_state_dict({**state, "vit.relative_bias.1.table": state["vit.relative_bias.0.table"]})
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(each.logits(images), shared.logits(images))
