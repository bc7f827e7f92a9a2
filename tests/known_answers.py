"""Known answers recorded from the original code, and how our modules are compared with them.

The folder is $HARNESS_GOLDEN or tests/golden; the CSV files are constants and always those of tests/golden. An absent file is an error, not a skip.
Another set has other sizes, seeds, settings and cases: everything is read from the arrays.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.spec import ViTConfig

OWN = Path(__file__).resolve().parent / "golden"
FOLDER = Path(os.environ.get("HARNESS_GOLDEN") or OWN)
PRECISIONS = (torch.float32, torch.float64)

Arrays = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------------------------------ reading


def golden(name: str) -> Arrays:
    """All arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def golden_csv(name: str) -> list[dict[str, str]]:
    """Rows of one CSV file."""
    with open(OWN / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def config(arrays: Arrays, key: str) -> Any:
    """A scalar `config/<key>`."""
    return arrays[f"config/{key}"].item()


def section(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
    """Tensors of all keys under `prefix/`, the prefix cut off."""
    return {key[len(prefix) + 1 :]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"{prefix}/")}


def names(arrays: Arrays, key: str) -> list[str]:
    """An array of strings."""
    return [str(n) for n in arrays[key]]


def cases(arrays: Arrays, prefix: str = "", holds: str = "") -> list[str]:
    """What stands between `prefix` and the next slash in all keys, sorted; with `holds`, only cases that have such a key."""
    found = {key.removeprefix(prefix).split("/")[0] for key in arrays if key.startswith(prefix) and "/" in key.removeprefix(prefix)}
    return sorted(case for case in found if not holds or f"{prefix}{case}/{holds}" in arrays)


# ------------------------------------------------------------------------------------------- the originals' models in our words


def vit_config(arrays: Arrays, state: Mapping[str, Any], images: str) -> ViTConfig:
    """The architecture of a recorded ViT: height and width are those of the images, what it has beside blocks is told by the keys of its state."""
    shared, block = "rel_pos_bias.relative_position_bias_table" in state, "blocks.0.attn.relative_position_bias_table" in state
    return ViTConfig(
        size=arrays[images].shape[-2:], patch=config(arrays, "p"), width=config(arrays, "dim"), depth=config(arrays, "depth"),
        heads=config(arrays, "heads"), mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / config(arrays, "dim"),
        positions="learned" if "pos_embed" in state else "none", relative_bias="shared" if shared else "block" if block else "none",
        layer_scale=0.1 if "blocks.0.gamma_1" in state else None,
        key_bias="blocks.0.attn.q_bias" not in state,
    )


def vit_name(original: str) -> str:
    """Name of a ViT's parameter within our ViT. BEiT's q_bias and v_bias are both qkv.bias."""
    parts = original.split(".")
    if original.endswith("relative_position_bias_table"):
        return f"relative_bias.{parts[1] if parts[0] == 'blocks' else 0}.table"
    for old, new in {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "q_bias": "qkv.bias", "v_bias": "qkv.bias"}.items():
        original = original.replace(old, new)
    return original


def translate(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """A recorded state in our names; q and v biases are fused with a k part of zeros, index tables are left out."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("relative_position_index") or key.endswith("v_bias"):
            continue
        if key.endswith("q_bias"):
            value = torch.cat([value, torch.zeros_like(value), state[key.replace("q_bias", "v_bias")]])
        ours[rename(key)] = value
    return ours


def original_parts(values: Mapping[str, Tensor], recorded: list[str], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Tensors by our names -> by the recorded names; q_bias and v_bias are the first and last third of a fused bias, whose k part must be zero."""
    found = {}
    for name in recorded:
        value = values[rename(name)]
        if name.endswith(("q_bias", "v_bias")):
            q, k, v = value.chunk(3)
            assert not k.any(), f"{name}: the k part is {k.abs().max()}"
            value = q if name.endswith("q_bias") else v
        found[name] = value
    return found


# ---------------------------------------------------------------------------------------------------------------- comparing


def check_values(ours: Tensor, arrays: Arrays, key: str) -> None:
    """Logits, predictions, features: README's tolerances; in float64 the recorded float64 values where there are any."""
    ours = ours.detach()
    if ours.dtype == torch.float64 and f"{key}_float64" in arrays:
        np.testing.assert_allclose(ours.numpy(), arrays[f"{key}_float64"], rtol=1e-9, atol=1e-12, err_msg=key)
    np.testing.assert_allclose(ours.numpy(), arrays[key], rtol=1e-5, atol=2e-5, err_msg=key)


def check_loss(ours: Tensor, arrays: Arrays, key: str) -> None:
    """A loss, by README's tolerances."""
    exact = ours.dtype == torch.float64 and f"{key}_float64" in arrays
    recorded, rtol = (float(arrays[f"{key}_float64"]), 1e-10) if exact else (float(arrays[key]), 2e-6)
    assert abs(ours.item() - recorded) <= rtol * abs(recorded), f"{key}: {ours.item()!r}, the original's {recorded!r}"


def check_gradients(module: nn.Module, arrays: Arrays, run: str, rename: Callable[[str], str], atol: float = 1e-6) -> None:
    """All gradients as recorded: which parameters have one, their norms, sums and some whole. `rename` maps the original's names to ours."""
    given = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    recorded = names(arrays, f"{run}/grad_names")
    assert {rename(name) for name in recorded} == set(given)
    ours = original_parts(given, recorded, rename)
    for name, norm, total in zip(recorded, arrays[f"{run}/grad_norms"], arrays[f"{run}/grad_sums"], strict=True):
        grad = ours[name].double()
        if norm >= 1e-5:  # smaller ones are zero in exact arithmetic
            assert abs(grad.norm().item() - norm) <= 1e-4 * norm + 1e-6, name
        assert abs(grad.sum().item() - total) <= 1e-5 * norm * grad.numel() ** 0.5 + 1e-6, name
    for name, grad in section(arrays, f"{run}/grad").items():
        np.testing.assert_allclose(ours[name].numpy(), grad.numpy(), rtol=1e-4, atol=atol, err_msg=name)


def check_groups(groups: list[dict[str, Any]], expected: Mapping[str, tuple[float, float]], rename: Callable[[str], str]) -> None:
    """Weight decay and lr scale of exactly the parameters that the original trains: name -> (weight decay, lr scale)."""
    ours = {name: (group["weight_decay"], group["lr_scale"]) for group in groups for name in group["names"]}
    assert set(ours) == {rename(name) for name in expected}
    for name, (decay, scale) in expected.items():
        assert ours[rename(name)][0] == decay, f"{name}: weight decay {ours[rename(name)][0]}, the original's {decay}"
        assert math.isclose(ours[rename(name)][1], scale, rel_tol=1e-12), f"{name}: lr scale {ours[rename(name)][1]}, the original's {scale}"


# ----------------------------------------------------------------------------------------------------------- initial values


def initial(family: str) -> dict[str, dict[str, Any]]:
    """Statistics of a freshly initialised original by parameter name: shape, mean, rms, absmax, trainable."""
    arrays = golden("init_statistics")
    columns = {key: arrays[f"{family}/{key}"] for key in ("shapes", "mean", "rms", "absmax", "trainable")}
    table = {}
    for i, name in enumerate(names(arrays, f"{family}/names")):
        row = {key: column[i] for key, column in columns.items()}
        table[name] = {**row, "shape": tuple(int(n) for n in str(row["shapes"]).split("x"))}
    return table


def initial_vit(table: Mapping[str, Mapping[str, Any]]) -> ViTConfig:
    """An architecture that has the parameters of a recorded initialisation.

    The grid of a bias table is the squarest of its size; without one the number of heads shows in no parameter, and the grid in no shape.
    """
    width, _, patch, _ = table["patch_embed.proj.weight"]["shape"]
    tables = [name for name in table if name.endswith("relative_position_bias_table")]
    if tables:
        rows, heads = table[tables[0]]["shape"]
        tall = max(n for n in range(1, rows, 2) if (rows - 3) % n == 0 and n * n <= rows - 3)
        grid = ((tall + 1) // 2, ((rows - 3) // tall + 1) // 2)
    else:
        patches, heads = table["pos_embed"]["shape"][1] - 1, 1
        tall = max(n for n in range(1, patches + 1) if patches % n == 0 and n * n <= patches)
        grid = (tall, patches // tall)
    return ViTConfig(
        size=(grid[0] * patch, grid[1] * patch), patch=patch, width=width, heads=heads, mlp_ratio=table["blocks.0.mlp.fc1.bias"]["shape"][0] / width,
        depth=len({n.split(".")[1] for n in table if n.startswith("blocks.")}), positions="learned" if "pos_embed" in table else "none",
        relative_bias="none" if not tables else "shared" if tables[0].startswith("rel_pos_bias") else "block",
        layer_scale=float(table["blocks.0.gamma_1"]["mean"]) if "blocks.0.gamma_1" in table else None, key_bias="blocks.0.attn.q_bias" not in table,
    )


def check_initial_values(values: Mapping[str, Tensor], table: Mapping[str, Mapping[str, Any]]) -> None:
    """Mean, mean square and bound of every parameter, as far as two random draws of n elements can differ. `values`: by the original's names.

    Constants are equal. A law with an end (largest / rms below 2 in many elements: uniform, or cut at one deviation) ends at the same place;
    the largest of n normal numbers varies by about rms / sqrt(2 log n).
    """
    assert set(values) == set(table)
    for name, row in table.items():
        value, rms = values[name].detach().double(), float(row["rms"])
        assert tuple(value.shape) == row["shape"], f"{name}: shape {tuple(value.shape)}, the original's {row['shape']}"
        n, mean, largest = value.numel(), value.mean().item(), value.abs().max().item()
        if math.isclose(rms, abs(float(row["mean"])), rel_tol=1e-6) or rms == 0:
            assert torch.allclose(value, torch.full_like(value, float(row["mean"])), rtol=1e-6, atol=0), f"{name} is not {row['mean']} everywhere"
            continue
        assert abs(mean - row["mean"]) <= 5 * rms * (2 / n) ** 0.5, f"{name}: mean {mean:.5f}, the original's {row['mean']:.5f}"
        found = value.pow(2).mean().sqrt().item()
        assert abs(found - rms) <= 5 / (2 * n) ** 0.5 * 2**0.5 * rms, f"{name}: rms {found:.5f}, the original's {rms:.5f}"
        bounded = row["absmax"] < 2 * rms and n >= 200
        slack = (30 / n + 1e-3) * row["absmax"] if bounded else 10 * rms / (2 * math.log(n + 1)) ** 0.5
        assert abs(largest - row["absmax"]) <= slack, f"{name}: largest {largest:.5f}, the original's {row['absmax']:.5f}"
