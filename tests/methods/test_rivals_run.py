"""MoCo v3 and DINO through the command line: what they leave, and what the fairness audit says of their crops."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def test_the_audit_tells_how_many_crops_each_method_saw(harness: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """Two of MoCo v3, two large and ten small of DINO: what makes a comparison with MAE unfair at the same number of epochs."""
    rng = np.random.default_rng(0)
    for name, colour in (("blue", (30, 30, 200)), ("red", (200, 30, 30))):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.clip(rng.normal(colour, 25, (70, 80, 3)), 0, 255).astype(np.uint8)).save(tmp_path / "classes" / name / f"{i}.png")
    scoring = ("--evals", "imagefolder:classes", "--set", "imagefolder:classes.recipe.iterations=1", "--set", "imagefolder:classes.recipe.batch=4")
    short = [word for m in ("moco-v3", "dino") for n in ("iterations=2", "batch=4", "warmup=0") for word in ("--set", f"{m}.recipe.{n}")]
    done = harness("run", "--protocol", "smoke", "--methods", "moco-v3,dino", "--pretrain-data", "classes", "--launcher", "debug", *scoring, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {r["about"]["method"]: r for p in (tmp_path / "runs").glob("pretrain-*/record.json") if (r := json.loads(p.read_text()))}
    assert {m: (r["images_seen"], r["facts"]["crops_seen"]) for m, r in records.items()} == {"moco-v3": (8, 16), "dino": (8, 96)}
    told = harness("audit")
    assert told.returncode == 0 and "8 (16 crops)" in told.stdout and "8 (96 crops)" in told.stdout, told.stdout + told.stderr
