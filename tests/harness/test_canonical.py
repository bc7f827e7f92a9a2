"""Canonical JSON: equal settings must have equal keys, other settings other keys."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from harness.canonical import canonical, canonical_json, digest, parse_as, restore
from harness.spec import Augment, Recipe, UserError, ViTConfig


def test_a_value_written_as_integer_or_float_is_the_same() -> None:
    """`--set mae.recipe.warmup=50` must find the pre-training that the recipe's own 50 made."""
    recipe = Recipe(batch=8, lr=1e-3, epochs=2, warmup=50)
    assert digest(recipe) == digest(dataclasses.replace(recipe, warmup=50.0, epochs=2.0))


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"warmup": 1.0}, {"augment": Augment(flip=0.0)}, {"no_decay": ("a",)}, {"sources": (("lr", "ours"),)}])
def test_every_field_enters_the_key(change: dict) -> None:
    recipe = Recipe(batch=8, lr=1e-3, epochs=2)
    assert digest(recipe) != digest(dataclasses.replace(recipe, **change))


def test_restored_values_have_their_types() -> None:
    vit = ViTConfig(size=(64, 32), patch=8, relative_bias="shared", layer_scale=0.1)
    back = restore(json.loads(canonical_json(vit)))
    assert back == vit and isinstance(back.size, tuple)
    recipe = Recipe(batch=8, lr=1e-3, epochs=2, augment=Augment(color_jitter=(0.4, 0.4, 0.4)), sources=(("lr", "ours"),))
    assert restore(json.loads(canonical_json(recipe))) == recipe


def test_a_field_of_another_version_is_named() -> None:
    with pytest.raises(UserError, match="no field colour"):
        restore({**canonical(ViTConfig()), "colour": 1})


def test_values_without_canonical_form_are_refused() -> None:
    """A key made from repr() of an object would change from run to run."""
    with pytest.raises(TypeError):
        canonical(object())
    with pytest.raises(ValueError):
        canonical_json({"lr": math.nan})


@pytest.mark.parametrize("text,hint,value", [
    ("1e-3", float, 1e-3), ("3", int, 3), ("none", float | None, None), ("0.5", float | None, 0.5), ("true", bool, True),
    ("0.2,1.0", tuple[float, float], (0.2, 1.0)), ("a,b", tuple[str, ...], ("a", "b")), ("x", str, "x"),
])
def test_set_values_by_type(text: str, hint: object, value: object) -> None:
    assert parse_as(text, hint) == value


@pytest.mark.parametrize("text,hint", [("x", int), ("1.5", int), ("nan", float), ("inf", float), ("maybe", bool), ("1", tuple[float, float])])
def test_set_values_of_a_wrong_type(text: str, hint: object) -> None:
    with pytest.raises(ValueError):
        parse_as(text, hint)
