"""Every method that trains on one ViT, in one table: images/s of a training step, images/s of one core that prepares them, peak memory.

The rival is `supervised`: one view of each image, forward and backward. A step is what `harness.train.fit` does: forward, backward, clipping, optimiser and
what the method does after it; targets and teachers are part of it, with assets as their makers start them. Rounds of all methods are interleaved in one
process; on a CPU it has one thread and processor time is measured, so that other processes count less, and memory is that of a process that does nothing
else, above what it had after its imports. Images are noise. Prints the table and, with a folder as argument, writes a dated JSON there. What it does on a GPU
(clock time after a synchronisation, the device's peak memory) has never been run.

    .venv/bin/python benchmarks/every_method.py [benchmarks/results]
    .venv/bin/python benchmarks/every_method.py --device cuda --protocol paper --backbone vit-b16 --batch 64 --data DIR benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import psutil
import torch
from PIL import Image
from report import keep, middle
from torch.utils.data import default_collate

from harness import plugins
from harness.optim import apply_schedule, build_optimizer, clip_gradients, parameter_groups
from harness.plugins import TrainContext
from harness.provenance import processor
from harness.randomness import generator, seed_all
from harness.request import resolve_precision
from harness.spec import UserError
from harness.vit import ViT, choose_attention

ROUNDS, STEPS, WARM = 7, 2, 1
CLASSES = tuple(f"class {i}" for i in range(16))
RIVAL = "supervised"


class Trained:
    """One method with its objective, optimiser and a batch.

    Raises:
        UserError: it has no recipe here, cannot run on this ViT, or needs a file that is not there.
    """

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        setting = plugins.build("protocols", options.protocol)
        method, vit = plugins.build("methods", name), setting.backbones[options.backbone or setting.backbone]
        vit = method.architecture(vit, setting.architecture == "published") if hasattr(method, "architecture") else vit
        if (reason := method.skip(vit)) is not None:
            raise UserError(reason)
        recipe = method.recipe(setting, vit)
        if recipe is None:
            raise UserError(f"no recipe for {vit.paper_size or options.protocol}")
        self.name, self.recipe, self.batch, self.device = name, recipe, options.batch, torch.device(options.device)
        assets = {}
        for role, asset in method.assets(setting, vit).items():
            assets[role] = folder / f"{name}-{role}.pt" if asset.maker else Path(options.data) / asset.file
            if asset.maker:
                seed_all(0, "asset")
                made = TrainContext(vit, asset.maker.recipe(setting, vit), 100, classes=CLASSES)
                asset.maker.objective(None, made).save_asset(assets[role])
            elif not assets[role].is_file():
                raise UserError(f"needs {assets[role]}: {asset.origin}")
        seed_all(0, "init")
        context = TrainContext(vit, recipe, 100, assets, CLASSES)
        self.objective = method.objective(ViT(vit, recipe.drop_path), context).to(self.device).train()
        self.dtype = torch.bfloat16 if resolve_precision() == "bf16" else torch.float32
        choose_attention(self.objective, self.device, self.dtype)
        self.optimizer = build_optimizer(parameter_groups(self.objective, recipe, vit.depth), recipe)
        self.transform, self.steps, self.made = method.transform(vit, recipe), 0, 0
        self.data = self.prepare()
        if hasattr(self.objective, "prepare"):
            self.objective.prepare(self.data)

    def prepare(self) -> dict[str, torch.Tensor]:
        """A batch from noise of 4/3 the input's size."""
        height, width = (round(side * 4 / 3) for side in self.objective.vit.config.size)
        samples = []
        for _ in range(self.batch):
            self.made += 1
            rng = generator(0, "image", self.made)
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            samples.append({**self.transform(image, rng), "label": torch.tensor(self.made % len(CLASSES))})
        return {k: v.to(self.device) for k, v in default_collate(samples).items()}

    def step(self) -> float:
        """One training step, as `harness.train.fit` has it; its loss."""
        seed_all(0, "step", self.steps)
        apply_schedule(self.optimizer, self.recipe, min(self.steps, 99), 100)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.objective(self.data, min(self.steps, 99) / 100)["loss"]
        loss.backward()
        clip_gradients([p for p in self.objective.parameters() if p.requires_grad], self.recipe)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(min(self.steps, 100) / 100)
        return float(loss.detach())

    def now(self) -> float:
        """Seconds: of the processor on a CPU, of the clock once a GPU is done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def images_per_s(self) -> float:
        """Speed of some steps."""
        start = self.now()
        for _ in range(STEPS):
            self.step()
        return STEPS * self.batch / (self.now() - start)


def memory(name: str, options: argparse.Namespace, folder: Path) -> float:
    """MiB at the peak of two steps, above what there was before: in this process alone on a CPU, of the device on a GPU."""
    if options.device == "cpu":
        layer = torch.nn.Linear(8, 8)  # what torch and timm load at their first use is nobody's memory
        layer(torch.ones(1, 8)).sum().backward()
        torch.optim.AdamW(layer.parameters()).step()
        plugins.importable("methods")
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # Linux begins to look for a peak anew
        trained = Trained(name, options, folder)
        trained.step(), trained.step()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024 - before / 2**20
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trained = Trained(name, options, folder)
    trained.step(), trained.step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def alone(name: str, words: list[str]) -> float:
    """`memory` in a process of its own, once more this script."""
    done = subprocess.run([sys.executable, __file__, *words, "--memory-of", name], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return float(json.loads(done.stdout))


def main() -> None:
    """Measure all methods."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", help="folder for the JSON")
    for flag, default in (("protocol", "demo"), ("backbone", None), ("device", "cpu"), ("data", "."), ("methods", None), ("memory-of", None)):
        parser.add_argument(f"--{flag}", default=default)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.memory_of:
            print(json.dumps(memory(options.memory_of, options, folder)))
            return
        measure(options, folder)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """All methods round by round, the table, the file."""
    names = options.methods.split(",") if options.methods else [n for n in plugins.importable("methods") if trains(n)]
    names = [RIVAL, *(n for n in names if n != RIVAL)]
    load_before, trained, refused = os.getloadavg()[0], {}, {}
    words = [w for flag in ("protocol", "backbone", "device", "data", "batch") if (v := getattr(options, flag)) is not None for w in (f"--{flag}", str(v))]
    memories = {}
    for name in names:
        try:
            if options.device != "cpu":
                memories[name] = memory(name, options, folder)
            trained[name] = Trained(name, options, folder)
        except UserError as error:
            refused[name] = str(error)
            continue
        losses = [trained[name].step() for _ in range(WARM)]
        if not np.isfinite(losses).all():
            sys.exit(f"{name}: loss {losses[-1]} in step {len(losses)}: no training step is measured")
    if RIVAL not in trained:
        sys.exit(f"{RIVAL}: {refused[RIVAL]}")
    some = trained[RIVAL]
    steps: dict[str, list[float]] = {n: [] for n in trained}
    prepared: dict[str, list[float]] = {n: [] for n in trained}
    for _ in range(ROUNDS):
        for name, one in trained.items():
            steps[name].append(one.images_per_s())
            start = time.process_time()
            one.prepare()
            prepared[name].append(options.batch / (time.process_time() - start))
    if options.device == "cpu":
        memories = {name: alone(name, words) for name in trained}
    load = os.getloadavg()[0]
    rows = [
        {"name": n, **middle(steps[n], "value"), "unit": "images/s", "rounds": ROUNDS, "rival": RIVAL,
         "times_the_rival": middle([a / b for a, b in zip(steps[n], steps[RIVAL], strict=True)]), "prepared_images_per_s": middle(prepared[n]),
         "memory_MiB": memories[n]} for n in trained
    ]
    device, precision = processor() if options.device == "cpu" else torch.cuda.get_device_name(), str(some.dtype).removeprefix("torch.")
    print(f"{options.protocol}, {options.backbone or 'its backbone'}, batch {options.batch}, {precision}, {device}, load {load_before:.1f} to {load:.1f}\n")
    print("| method | images/s (min to max) | of supervised | images/s prepared by a core | MiB |\n|---|---|---|---|---|")
    for r in rows:
        share, made, (low, high) = r["times_the_rival"]["median"], r["prepared_images_per_s"]["median"], r["spread"]
        print(f"| {r['name']} | {r['value']:.0f} ({low:.0f} to {high:.0f}) | {share:.2f} | {made:.0f} | {r['memory_MiB']:.0f} |")
    for name, reason in refused.items():
        print(f"\n{name}: not measured: {reason}")
    if options.out:
        left_out = {"not_measured": refused} if refused else {}
        keep(f"every-method-{'cpu' if options.device == 'cpu' else 'gpu'}", rows, Path(options.out), hardware=device, load=load, load_before=load_before,
             threads=torch.get_num_threads(), protocol=options.protocol, backbone=options.backbone or "the protocol's", batch=options.batch,
             precision=precision, **left_out)


def trains(name: str) -> bool:
    """Whether a method is one that trains, and is named without an argument."""
    method = plugins.load("methods", name)
    return getattr(method, "trains", True) is True and not hasattr(method, "from_argument")


if __name__ == "__main__":
    main()
