"""The --set KEY=VALUE overrides: typed, refused when unknown, and remembered as deviations from the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from harness.canonical import parse_as
from harness.spec import JobFailed, Recipe, UserError, fields_of_type, suggest


class Settings:
    """The --set KEY=VALUE overrides: PLUGIN.FIELD, PLUGIN.recipe.FIELD or PLUGIN.recipe.augment.FIELD."""

    def __init__(self, words: Sequence[str]) -> None:
        self.values: dict[str, str] = {}
        self.used: set[str] = set()
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or key.count(".") < 1:
                raise UserError(f"--set {word}: expected NAME.FIELD=VALUE, as in mae.mask_ratio=0.6")
            if key in self.values:
                raise UserError(f"--set {key}: given twice: give it once")
            self.values[key] = value

    def apply(self, prefix: str, target: Any) -> tuple[Any, tuple[str, ...]]:
        """(target with its overrides, what deviates). Nested dataclasses (augment) are reached by another dot.

        Raises:
            UserError: no such field, a value of the wrong type, or one that the target refuses.
        """
        notes: list[str] = []
        for key, text in self.values.items():
            if not key.startswith(prefix + "."):
                continue
            path = key[len(prefix) + 1 :].split(".")
            if path[0] == "recipe" and not isinstance(target, Recipe):
                continue
            chain = [target]
            for part in path[:-1]:
                inner = getattr(chain[-1], part, None)
                if not dataclasses.is_dataclass(inner):
                    raise UserError(f"--set {key}: {prefix} has no part {part!r}: {suggest(part, fields_of_type(chain[-1]))}")
                chain.append(inner)
            types = fields_of_type(chain[-1])
            if path[-1] not in types:
                raise UserError(f"--set {key}: {prefix} has no field {path[-1]!r}: {suggest(path[-1], types)}")
            try:
                value: Any = parse_as(text, types[path[-1]])
            except ValueError as error:
                raise UserError(f"--set {key}={text}: not a value of type {type_name(types[path[-1]])} ({error})") from error
            old = getattr(chain[-1], path[-1])
            if value != old:
                notes.append(f"{key}={text} (recipe: {old}; {source_of(target, path)})")
            try:
                for owner, part in zip(reversed(chain), reversed(path), strict=True):
                    value = dataclasses.replace(owner, **{part: value})
            except ValueError as error:
                raise UserError(f"--set {key}={text}: {error}") from error
            target = value
            self.used.add(key)
        return target, tuple(notes)

    def refusal(self, prefix: str, reason: str) -> JobFailed | UserError:
        """Why a plugin cannot run here, to be raised: its cells are skipped, but where the user has set a field of it that is an error of the request."""
        own = next((key for key in self.values if key.startswith(prefix + ".")), None)
        return JobFailed(reason) if own is None else UserError(f"--set {own}={self.values[own]}: {reason}")

    def unused(self) -> list[str]:
        """Keys that no part of the plan took."""
        return sorted(set(self.values) - self.used)


def source_of(target: Any, path: Sequence[str]) -> str:
    """Where a recipe's or a plugin's own value comes from, as it says itself; the most specific of a recipe's `sources` counts."""
    if not isinstance(target, Recipe):
        return str(getattr(target, "source", "")) or "no source given"
    told = {word.strip(): source for words, source in reversed(target.sources) for word in words.split(",")}
    names = [".".join(path), path[-1], path[0], *(["length"] if path[-1] in ("epochs", "iterations") else []), "all"]
    return next((told[name] for name in names if name in told), "no source given")


def type_name(hint: Any) -> str:
    """A type as a user reads it."""
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
