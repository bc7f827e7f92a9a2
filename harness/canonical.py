"""Dataclasses as canonical JSON and back: what keys are made of, what job files hold, what --set parses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pkgutil
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from harness.spec import UserError


def canonical(value: Any) -> Any:
    """A value as JSON-ready data: dataclasses become {"class": "module:Name", field: ...} with every default filled in.

    A field with metadata {"identity": False} says where something lies, not what it is, and is left out.
    """
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):  # 50 and 50.0 are the same number and must be the same key
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.init and f.metadata.get("identity", True)]
        body = {f.name: canonical(getattr(value, f.name)) for f in fields}
        return {"class": f"{type(value).__module__}:{type(value).__qualname__}", **body}
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} has no canonical form")


def canonical_json(value: Any, done: bool = False) -> str:
    """Canonical JSON text: sorted keys, no spaces, shortest floats that round-trip. `done`: the value has its canonical form already."""
    return json.dumps(value if done else canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any, done: bool = False) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON: the key of a job."""
    return hashlib.sha256(canonical_json(value, done).encode()).hexdigest()[:16]


def restore(data: Any) -> Any:
    """The inverse of `canonical` for dataclasses: looks the class up by its path and restores nested values by their types."""
    if isinstance(data, Mapping) and "class" in data:
        cls: Any = pkgutil.resolve_name(str(data["class"]))
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(data) - known - {"class"}:
            raise UserError(f"{data['class']} has no field {', '.join(sorted(unknown))}: made by another version of the plugin")
        return cls(**{k: _typed(restore(v), hints[k]) for k, v in data.items() if k != "class"})
    if isinstance(data, Mapping):
        return {k: restore(v) for k, v in data.items()}
    if isinstance(data, list):
        return [restore(v) for v in data]
    return data


def _typed(value: Any, hint: Any) -> Any:
    """JSON has no tuples: give a list back as the tuple that the field's type asks for, nested ones included."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next((a for a in args if typing.get_origin(a) is tuple), None) if isinstance(value, list) else None
        return _typed(value, hint) if hint is not None else value
    if origin is tuple and isinstance(value, list):
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        return tuple(_typed(v, h) for v, h in zip(value, inner, strict=True))
    return value


def parse_as(text: str, hint: Any) -> Any:
    """Text of a `--set` value as the type of its field. Raises ValueError when it is no such value."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        for arg in args:
            if arg is not type(None):
                try:
                    return parse_as(text, arg)
                except ValueError:
                    continue
        raise ValueError(text)
    if origin is Literal:
        for arg in args:
            if str(arg) == text:
                return arg
        raise ValueError(f"{text} (one of {', '.join(map(str, args))})")
    if origin is tuple:
        parts = [p for p in text.strip("()[] ").split(",") if p.strip()]
        inner = [args[0]] * len(parts) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(parts):
            raise ValueError(text)
        return tuple(parse_as(p.strip(), h) for p, h in zip(parts, inner, strict=True))
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(text)
    if hint in (int, float):
        number = hint(text)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(text)
        return number
    if hint is str:
        return text
    raise ValueError(f"a value of type {hint} cannot be set from the command line")
