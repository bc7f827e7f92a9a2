"""The files of a checkpoint: a single one, or those of a folder that transformers or timm saved, its weights in one piece or in several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.pickles import read_weights
from harness.spec import UserError
from weights.keys import listed, unwrap

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there; in several pieces NAME.index.json says which tensor lies where
BESIDE = {"config": "config.json", "preprocessor": "preprocessor_config.json"}


def files_of(path: Path) -> dict[str, Path]:
    """Role -> file: "weights" first, or "weights-1", "weights-2", ... and their "index"; of a folder also "config" and "preprocessor".

    Raises:
        UserError: nothing is there, a folder without weights or config.json, or with some pieces only.
    """
    if path.is_file():
        return {"weights": path}
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder: name a checkpoint, or a timm model")
    for name in WEIGHTS:
        if (path / name).is_file():
            weights = {"weights": path / name}
            break
        if (index := path / f"{name}.index.json").is_file():
            weights = {**pieces(index), "index": index}
            break
    else:
        raise UserError(f"{path}: no {' or '.join(WEIGHTS)} in it: name a folder that transformers or timm saved")
    if not (path / BESIDE["config"]).is_file():
        raise UserError(f"{path}: no config.json in it: name a folder that transformers or timm saved, or the file of weights itself")
    return {**weights, **{role: path / name for role, name in BESIDE.items() if (path / name).is_file()}}


def pieces(index: Path) -> dict[str, Path]:
    """Role -> file of the pieces that an index names. Raises UserError when one is not there, or lies elsewhere."""
    names = sorted(set(places_of(index).values()))
    if outside := [n for n in names if Path(n).name != n]:
        raise UserError(f"{index}: names {listed(outside)}, a file outside the folder: download the folder again")
    if missing := [n for n in names if not (index.parent / n).is_file()]:
        raise UserError(f"{index.parent}: no {listed(missing)} in it, of the {len(names)} pieces in {index.name}: download what is missing")
    return {f"weights-{number}": index.parent / name for number, name in enumerate(names, 1)}


def places_of(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of the file that it lies in. Raises UserError when the index does not say it."""
    places = read_config(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise UserError(f"{index}: no weight_map of tensors and files in it: download it again")
    return places


def read_state(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """(state dict, what lies beside it) of the weights in the files that `files_of` found; pieces are put together.

    Raises:
        UserError: a file is damaged or malicious, has no state dict, or a piece has other tensors than its index says.
    """
    if "index" not in files:
        return unwrap(read_weights(files["weights"]), str(files["weights"]))
    places, whole = places_of(files["index"]), dict[str, Tensor]()
    for path in (p for role, p in files.items() if role.startswith("weights-")):
        state, _ = unwrap(read_weights(path), str(path))
        if different := sorted(set(state) ^ {k for k, name in places.items() if name == path.name}):
            raise UserError(f"{path}: its tensors are not those that {files['index'].name} says: {listed(different)}: download the folder again")
        whole |= state
    return whole, {}


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({type(error).__name__}): download it again") from error
    if not isinstance(body, dict):
        raise UserError(f"{path}: holds no JSON object: download it again")
    return body


def sha256(path: Path) -> str:
    """Of a file's content."""
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size)


@lru_cache
def _sha256(path: Path, changed: int, size: int) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(2**20):
            total.update(piece)
    return total.hexdigest()
