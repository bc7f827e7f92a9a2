"""Trains a tiny BEiT on pixels, sharded among two processes or whole in one, stopped and killed on the way: `python shards.py FOLDER`. Run by test_sharding.py.

The folder has images; it gets NAME-<rank>.pt (weights, lines of the log) of each training. torch is imported once, and every training is forked from here.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import RECIPE, SMALL

from harness import checkpoint
from harness.data import ImageList
from harness.plugins import Session, TrainContext
from harness.randomness import seed_all
from harness.spec import Interrupted
from harness.train import fit
from harness.vit import ViT
from methods.beit import BEiT

# what a sharded training could get wrong: a bias of keys that a hook holds at zero, frozen or not, a table for all blocks, clipping, an EMA, layer decay
CONFIG = dataclasses.replace(SMALL, key_bias=False, positions="none", relative_bias="shared")
RECIPES = {
    mode: dataclasses.replace(
        RECIPE, iterations=4, optimizer="adamw", lr=0.01, eps=1e-3, ema=0.5, layer_decay=0.7, clip=0.05, clip_mode=mode,
        frozen=("vit.cls_token", "vit.blocks.0.attn.*"),
    ) for mode in ("global", "tensor")
}


def train(folder: Path, images: Path, lines: list[str], stop: int | None, mode: str, poison: int | None, **fields: Any) -> dict[str, torch.Tensor]:
    """Weights of the ViT after four steps; the loss of the `poison`-th, restarts counted, is not finite. Raises Interrupted after `stop` steps."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    seed_all(3, "init")
    method, recipe, steps = BEiT(target="pixels", mask_patches=150), RECIPES[mode], itertools.count(1)
    objective = method.objective(ViT(CONFIG), TrainContext(CONFIG, recipe, 4))
    calls = itertools.count(1)
    objective.register_forward_hook(lambda module, given, output: output | {"loss": output["loss"] * (torch.nan if next(calls) == poison else 1)})
    files = ImageList(images, sorted(p.name for p in images.glob("*.png")), None, ())
    session = Session(folder, 3, torch.device("cpu"), torch.float32, {}, log=lines.append, should_stop=lambda: next(steps) == stop, **fields)
    fit(objective, files, method.transform(CONFIG, recipe), recipe, session)
    return dict(objective.vit.state_dict())


def one(rank: int, count: int, place: Path, name: str, folder: str, stop: int | None, dies: bool, fields: dict[str, Any]) -> int:
    """Exit code of a process of a training; with `dies` the last one is killed before it writes the second state."""
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{place / f'meeting-{name}'}", rank=rank, world_size=count)
    if dies and rank == count - 1:
        write, calls = checkpoint.write_atomically, itertools.count(1)
        checkpoint.write_atomically = lambda path, how: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 2 else write(path, how)
    lines: list[str] = []
    try:
        torch.save((train(place / folder, place / "images", lines, stop, shard=count > 1, **fields), lines), place / f"{name}-{rank}.pt")
    except Interrupted:
        return 130
    except Exception:
        traceback.print_exc()
        for thread in threading.enumerate():  # as a process does that ends: what is being written is finished
            if thread.name == "states":
                thread.join()
        return 1
    return 0


def run(count: int, place: Path, name: str, folder: str = "", stop: int | None = None, dies: bool = False, **fields: Any) -> list[int]:
    """Exit codes of a training on so many processes, in a folder of its own or that of another one."""
    fields = {"mode": "global", "poison": None, **fields}
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            os._exit(one(rank, count, place, name, folder or name, stop, dies, fields))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    assert run(1, place, "whole") == [0] and run(2, place, "sharded") == [0, 0]
    assert run(1, place, "whole-tensor", mode="tensor") == [0] and run(2, place, "sharded-tensor", mode="tensor") == [0, 0]
    assert run(2, place, "stopped", stop=2) == [130, 130] and run(1, place, "joined", "stopped") == [0]
    assert run(1, place, "alone", stop=2) == [130] and run(2, place, "split", "alone") == [0, 0]
    burst: dict[str, Any] = {"poison": 3, "nan_restarts": 1, "checkpoint_every_s": 0.0}
    assert run(1, place, "whole-burst", **burst) == [0] and run(2, place, "sharded-burst", **burst) == [0, 0]
    assert run(2, place, "killed", dies=True, checkpoint_every_s=0.0) == [1, -signal.SIGKILL]
    (place / "left").write_text("\n".join(sorted(p.name for p in (place / "killed" / "checkpoint" / "train").iterdir())))
    assert run(2, place, "after", "killed") == [0, 0]
