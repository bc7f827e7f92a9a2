"""Files of other people's weights, read without running anything in them: torch's .pth and .pkl, and safetensors.

A pickle is a program. Here it may build tensors, plain containers and an `argparse.Namespace`, and nothing else: `read_weights` leaves the
work to torch's own restricted reader, `read_module` also reads whole pickled modules by putting `Inert` in the place of their classes.
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from harness.spec import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of torch's format before 1.6
CONTAINERS = (
    "torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.upsampling.Upsample",
)


class Refused(Exception):
    """A pickle asks for something that weights have no need of; the text is its name."""


class Inert:
    """What stands for a pickled object of a class that is not to be run: it only remembers the attributes."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Refused("a module without a dictionary of attributes")
        self.__dict__.update(state)


def kind_of(path: Path) -> str:
    """"zip" (torch since 1.6), "pickle" (torch before, or any pickle) or "safetensors", by the first bytes.

    Raises:
        UserError: the file is missing, cannot be read, or is none of these.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): name a file of weights") from error
    if head[:4] == b"PK\x03\x04":
        return "zip"
    if head[:1] == b"\x80":
        return "pickle"
    if head[8:9] == b"{":
        return "safetensors"
    raise UserError(f"{path}: no checkpoint: expected a .pth or .pkl of torch, or safetensors")


def read_weights(path: Path) -> Any:
    """What a torch or safetensors file holds: tensors in dicts and lists, plain values, `argparse.Namespace`.

    Raises:
        UserError: the file is missing, damaged, or asks for anything else.
    """
    kind = kind_of(path)
    try:
        if kind == "safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if kind == "pickle":  # torch's reader calls a pickle that is none of torch's damaged, whatever it asks for
            with open(path, "rb") as stream:
                _read_magic(stream)
        return _load(path, [argparse.Namespace])
    except Exception as error:
        raise explained(path, error) from error


def read_module(path: Path, classes: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pickled whole module as (tensors by dotted name, plain attributes of the outermost object).

    Args:
        classes: dotted names of the classes that may occur besides torch's containers; an `Inert` stands for each.

    Raises:
        UserError: the file is missing, damaged, or asks for anything else.
    """
    kind, allowed = kind_of(path), {*classes, *CONTAINERS}
    try:
        if kind == "zip":
            found = _load(path, [(Inert, name) for name in sorted(allowed)])
        elif kind == "pickle":
            with open(path, "rb") as stream:
                found = _read_legacy(stream, allowed)
        else:
            raise Refused("safetensors, where a pickled module is expected")
        if not isinstance(found, Inert):
            raise Refused(f"a {type(found).__name__} in place of a module")
        return _tensors(found, ""), {k: v for k, v in vars(found).items() if isinstance(v, (bool, int, float, str))}
    except Exception as error:
        raise explained(path, error) from error


def explained(path: Path, error: Exception) -> UserError:
    """One line for what a reader said."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, Refused) or asked:
        what = asked.group(1) if asked else str(error)
        return UserError(f"{path}: refused: it holds {what}, which a file of weights has no need of: get the weights as a plain state dict or as safetensors")
    return UserError(f"{path}: damaged or no checkpoint ({type(error).__name__}): download it again")


def _load(path: Path, allowed: list[Any]) -> Any:
    import torch

    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
        warnings.simplefilter("ignore")  # old storages and layouts: torch's remarks on its own history
        return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(module: Inert, prefix: str) -> dict[str, Any]:
    """Parameters and buffers of a module and those below it."""
    import torch

    state = vars(module)
    found = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{prefix}{name}"] = value.detach()
    for name, below in (state.get("_modules") or {}).items():
        if isinstance(below, Inert):
            found |= _tensors(below, f"{prefix}{name}.")
    return found


def _read_magic(stream: IO[bytes]) -> None:
    """The first header. Raises Refused, naming what any other pickle asks for."""
    if _Plain(stream).load() != LEGACY_MAGIC:
        raise Refused("a pickle that is none of torch's")


def _read_legacy(stream: IO[bytes], allowed: Collection[str]) -> Any:
    """torch's format before 1.6: three headers, the object, the keys of its storages, the storages (int64 count, then the values)."""
    import torch

    storages: dict[str, torch.Tensor] = {}
    _read_magic(stream)
    for _ in range(2):
        _Plain(stream).load()
    found = _Legacy(stream, allowed, storages).load()
    for key in _Plain(stream).load():
        flat = storages[key]
        count = int.from_bytes(stream.read(8), sys.byteorder)
        raw = bytearray(stream.read(count * flat.element_size()))
        if count != len(flat) or len(raw) != count * flat.element_size():
            raise EOFError(f"storage {key}")
        if count:
            flat.copy_(torch.frombuffer(raw, dtype=flat.dtype))
    return found


class _Plain(pickle.Unpickler):
    """Numbers, text and containers only."""

    def find_class(self, module: str, name: str) -> Any:
        raise Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("a storage in a header")


class _Legacy(_Plain):
    """The object itself: tensors become views of flat tensors that are filled afterwards."""

    def __init__(self, stream: IO[bytes], allowed: Collection[str], storages: dict[str, Any]) -> None:
        import torch

        super().__init__(stream)
        self.storages = storages
        dtypes = {"Float": torch.float32, "Half": torch.float16, "Double": torch.float64, "Long": torch.int64}
        types = {f"{name}Storage": dtype for name, dtype in dtypes.items()}
        self.allowed: Mapping[str, Any] = {
            "collections.OrderedDict": OrderedDict, "torch.device": torch.device, "torch._utils._rebuild_tensor_v2": _view,
            "torch._utils._rebuild_parameter": _parameter, "__builtin__.set": set, "builtins.set": set,
            **{f"torch.{k}": v for k, v in types.items()}, **dict.fromkeys(allowed, Inert),
        }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise Refused(f"{module}.{name}")
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        import torch

        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) == 4 and pid[1] is Inert:
            return Inert  # with the source code of its class, which nobody reads
        if not (isinstance(pid, tuple) and pid[:1] == ("storage",) and len(pid) == 6 and isinstance(pid[1], torch.dtype) and pid[5] is None):
            raise Refused("an unknown kind of stored data")
        return self.storages.setdefault(pid[2], torch.empty(pid[4], dtype=pid[1]))


def _view(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: Any, *rest: Any) -> Any:
    return data
