"""Known answers recorded from the original code: $HARNESS_GOLDEN or tests/golden. An absent file is an error, not a skip."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(os.environ.get("HARNESS_GOLDEN", Path(__file__).resolve().parents[1] / "golden"))


def golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def config(arrays: dict[str, np.ndarray], key: str) -> int | float:
    """A scalar `config/<key>`."""
    return arrays[f"config/{key}"].item()


def section(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """Tensors of all keys under `prefix/`, the prefix cut off."""
    return {key[len(prefix) + 1 :]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"{prefix}/")}


def check_gradients(module: nn.Module, arrays: dict[str, np.ndarray], run: str, original: dict[str, str]) -> None:
    """Norms and sums of all gradients as recorded. `original` maps our parameter names to the original's."""
    ours = {original.get(name, name): p.grad for name, p in module.named_parameters() if p.grad is not None}
    names = [str(n) for n in arrays[f"{run}/grad_names"]]
    for name, norm, total in zip(names, arrays[f"{run}/grad_norms"], arrays[f"{run}/grad_sums"], strict=True):
        grad = ours[name]
        assert abs(grad.norm().item() - norm) <= 1e-4 * norm + 1e-6, name
        assert abs(grad.double().sum().item() - total) <= 1e-5 * norm * grad.numel() ** 0.5 + 1e-6, name
    for name, grad in section(arrays, f"{run}/grad").items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def check_initial_values(module: nn.Module, family: str, original: dict[str, str]) -> None:
    """Mean square, bound and constants of every parameter as the original's single draw allows (5 / sqrt(2 n) relative)."""
    arrays = golden("init_statistics")
    ours = {original.get(name, name): p for name, p in module.named_parameters()}
    for name, rms, absmax in zip(*(arrays[f"{family}/{k}"] for k in ("names", "rms", "absmax")), strict=True):
        if str(name) not in ours:
            continue
        value = ours.pop(str(name)).detach().double()
        tolerance = 5 / (2 * value.numel()) ** 0.5 * 2**0.5  # both sides are one draw
        assert abs(value.pow(2).mean().sqrt().item() - rms) <= tolerance * rms, f"{name}: rms {value.pow(2).mean().sqrt():.5f}, original {rms:.5f}"
        assert value.abs().max().item() <= absmax * 1.6 + 1e-12, name
    assert not ours, f"the original has no {sorted(ours)}"
