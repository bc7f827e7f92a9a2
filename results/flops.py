"""FLOPs of a training before it has run: its objective, built and stepped once without numbers, as the worker would step it.

The plugin contract is all that this knows: the same calls as `harness.run` and `harness.train` make, so that what another method needs is counted without
being named here. Parameters are built on torch's meta device and stepped as fake tensors, which have shapes and no memory: a ViT-L/16 takes two seconds. What
makes targets besides the images (a tokenizer) is an untrained one, since its shapes are what counts. On the CPU the count is the worker's to the last digit
(tests/results/test_flops.py). Fused attention, as on a GPU, multiplies once more on the way back: the worker counts up to 2 % more there at the papers' sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from harness.jobs import Node

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SIDE = 256  # pixels of the picture that stands for all


def step_flops(node: Node, classes: Sequence[str]) -> float | None:
    """FLOPs of one step, forward and backward, of a pretrain or asset node with a recipe (multiply and add = 2; matmuls, convolutions, attention: what
    `harness.metrics.count_flops` counts in the worker). None where that cannot be known so: a file that it needs is not there, or what it does depends on
    numbers.

    Args:
        classes: names of the classes of its images, () where these have no labels.
    """
    import torch

    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")  # weights that are loaded into tensors without numbers
            return _counted(node, classes, Path(folder))
    except Exception:  # whatever a plugin may raise where it is asked for a step without data
        return None


def _counted(node: Node, classes: Sequence[str], folder: Path) -> float:
    """See `step_flops`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from harness.metrics import count_flops
    from harness.optim import parameter_groups
    from harness.vit import choose_attention

    recipe, cpu = node.recipe, torch.device("cpu")
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    needed = assets(node, classes, folder)
    with torch.device("meta" if "vit" in node.identity else "cpu"):  # what is no ViT is small, and may begin with numbers (a palette's colours)
        built: Any = objective(node, classes, needed)
    vit = getattr(built, "vit", None)
    parameter_groups(built, recipe, 0 if vit is None else len(vit.blocks))  # freezes what the recipe freezes
    choose_attention(built.train(), cpu, dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)  # sizes that numbers decide (a bincount's) are symbols
    without_numbers(built, mode)
    samples = sample(node, bool(classes))
    facts: dict[str, Any] = {"flops_per_step": None}
    with mode:
        images = {name: torch.empty((recipe.batch, *shape), dtype=kind) for name, (shape, kind) in samples.items()}
        if hasattr(built, "prepare"):
            built.prepare(images)
        with count_flops(facts), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            built(images, 0.0 if recipe.iterations == 1 else 1e-9)["loss"].backward()  # the worker counts its second step
    return float(facts["flops_per_step"])


def objective(node: Node, classes: Sequence[str], needed: Mapping[str, Path]) -> Any:
    """What the worker would train for a node, from untrained weights."""
    from harness.canonical import restore
    from harness.plugins import TrainContext
    from harness.vit import ViT

    config, recipe = restore(node.identity["vit"]) if "vit" in node.identity else None, node.recipe
    vit = ViT(config, recipe.drop_path) if config is not None else None
    return restore(node.identity["plugin"]).objective(vit, TrainContext(config, recipe, recipe.iterations or 1, needed, tuple(classes)))


def assets(node: Node, classes: Sequence[str], folder: Path) -> dict[str, Path]:
    """What a node needs besides images: its files, and untrained ones of what nodes before it would make, in `folder`."""
    found = {role: Path(path) for role, path in node.where.get("files", {}).items()}
    for role, parent in node.parents.items():
        if role != "parent":  # that one is a ViT to go on from
            (below := folder / role).mkdir()
            found[role] = below / "asset.pt"
            objective(parent, classes, assets(parent, classes, below)).save_asset(found[role])
    return found


def sample(node: Node, labelled: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what a node's transform makes of a picture, which stands for all."""
    import numpy as np
    import torch
    from PIL import Image

    from harness.canonical import restore
    from harness.randomness import generator

    config = restore(node.identity["vit"]) if "vit" in node.identity else None
    transform = restore(node.identity["plugin"]).transform(config, node.recipe)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    found = {**transform(picture, generator(0, "sample")), **({"label": torch.tensor(0)} if labelled else {})}
    return {name: (tuple(value.shape), value.dtype) for name, value in found.items()}


def without_numbers(module: nn.Module, mode: Any) -> None:
    """Have fake tensors on the CPU in place of a module's parameters and buffers: a device that autocast knows, which meta is not."""
    import torch

    def fake(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return mode.from_tensor(tensor.detach())
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = None if p is None else torch.nn.Parameter(fake(p), requires_grad=p.requires_grad)
        for name, b in part._buffers.items():
            part._buffers[name] = None if b is None else fake(b)
