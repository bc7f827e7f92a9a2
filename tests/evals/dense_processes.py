"""Trains and scores a tiny UperNet and a tiny ViTDet in N processes: `python dense_processes.py N FOLDER`. Run by test_dense_processes.py.

torch is imported once and the processes are forked before it has any threads.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dense_faults import faults

from evals.openmmlab.ade20k import ADE20K
from evals.openmmlab.coco import COCO
from evals.openmmlab.foreign import openmmlab
from harness.checkpoint import Backbone, States
from harness.plugins import EvalContext, Session
from harness.randomness import seed_all
from harness.spec import Outcome, Protocol, Recipe, ViTConfig
from harness.vit import ViT

VIT = ViTConfig(size=(32, 32), patch=8, width=16, depth=4, heads=2)
SETTING = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")
EVALUATORS: dict[str, Any] = {"ade20k": ADE20K(channels=8), "coco": COCO(by="vitdet", side=64)}
RECIPE = Recipe(batch=5, lr=0.02, iterations=3, optimizer="sgd", weight_decay=0.05, clip=1.0)  # Adam's first steps would make much of rounding


def evaluate(name: str, folder: Path, data: Path, recipe: Recipe = RECIPE, **session: Any) -> Outcome:
    """Three steps of five images, and the scores. Without dropout: each process draws its own."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    seed_all("tiny")
    checkpoint = Backbone(VIT, (0.5,) * 3, (0.25,) * 3, ViT(VIT).state_dict())
    lent = Session(folder, 3, torch.device("cpu"), torch.float32, {name: data}, **session)
    with openmmlab():
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    with_dropout = BaseDecodeHead.cls_seg
    BaseDecodeHead.cls_seg = lambda self, features: self.conv_seg(features)
    try:
        found: Outcome = EVALUATORS[name].run(checkpoint, EvalContext(lent, SETTING, recipe))
    finally:
        BaseDecodeHead.cls_seg = with_dropout
    return found


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The model of a job's newest state."""
    state = States(folder / "checkpoint" / "train").latest()
    assert state is not None
    found: dict[str, torch.Tensor] = state[1]["model"]
    return found


def process(rank: int, count: int, place: Path) -> None:
    """One of them; all have the same folder, as the processes of a job have."""
    dist.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=count)
    for name in EVALUATORS:
        found = evaluate(name, place / f"{name}-together", place / name)
        torch.save({"metrics": dict(found.metrics), "facts": found.facts}, place / f"{name}-{rank}.pt")
    once = iter([torch.OutOfMemoryError("as a GPU would")] if rank else [])
    with faults(fail=lambda places: next(once, None)):
        short = evaluate("coco", place / "coco-short", place / "coco", replace(RECIPE, iterations=1), on_oom="halve")
    evaluate("coco", place / "coco-small", place / "coco", replace(RECIPE, iterations=1), micro_batch=2)
    with faults(nan=(6,)):  # the second step, the second process's part
        lost = evaluate("ade20k", place / "ade20k-lost", place / "ade20k", replace(RECIPE, iterations=2), nan_restarts=1)
    torch.save((short.facts["out_of_memory"], lost.facts["deviations"]), place / f"told-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    total, place = int(sys.argv[1]), Path(sys.argv[2])
    children = []
    for rank in range(total):
        if (child := os.fork()) == 0:
            process(rank, total, place)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
