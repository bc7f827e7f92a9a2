"""Training steps of `ade20k` and `coco` against OpenMMLab's, in images/s and peak memory.

Rivals: UperNet on MAE's ViT from mmsegmentation's own configuration (configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512, shipped in its wheel), and
Mask R-CNN on ViTDet. mmdetection's wheel has no ViTDet: its published configuration (projects/ViTDet, vitdet_mask-rcnn_vit-b-mae_lsj-100e) is restated here
over mmdet's own base configuration, with attention and windows computed as that project computes them. mmseg's configuration is named amp and trains in
fp32, so each rival is measured as it is published and under bf16 autocast. All RoI operations are torchvision's (there is no compiled mmcv here).

A step is forward, backward and update on batches that our loader has made; the same ones for all. Rounds are interleaved in one process. On a CPU one
thread, reduced sizes, processor seconds; on a GPU ViT-B at the papers' 512 and 1024 pixels. With a folder, a dated JSON is written there.

    .venv/bin/python benchmarks/dense.py [--evals ade20k,coco] [--rounds 7] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import math
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import psutil
import torch
import torch.nn.functional as F
from report import keep, middle
from torch import Tensor, nn

from evals.openmmlab.foreign import openmmlab
from harness import plugins
from harness.batches import positions
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Session
from harness.provenance import processor
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Protocol, Recipe, ViTConfig
from harness.vit import ViT

Step = Callable[[dict[str, Any]], float]


@dataclass(frozen=True)
class Scale:
    """Sizes of a measurement: the ViT, pixels of a side, images of a batch."""

    vit: ViTConfig
    side: int
    batch: int


REDUCED = ViTConfig(size=(128, 128), width=192, depth=12, heads=3)
SCALES = {
    ("cpu", "ade20k"): Scale(REDUCED, 128, 4), ("cpu", "coco"): Scale(REDUCED, 256, 1),
    ("cuda", "ade20k"): Scale(ViTConfig(), 512, 8), ("cuda", "coco"): Scale(ViTConfig(), 1024, 4),
}
CLASSES = {"ade20k": 150, "coco": 80}
GLOBAL = (2, 5, 8, 11)  # blocks of ViTDet-B that attend to everything


# ----------------------------------------------------------------------------------------------- ViTDet, restated for mmdet


def relative(q: Tensor, side: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Decomposed relative positions (..., side^2, side^2) of queries (..., side^2, C)."""
    apart = torch.arange(side)[:, None] - torch.arange(side)[None] + side - 1
    q = q.unflatten(-2, (side, side))
    by_row, by_column = torch.einsum("...hwc,hkc->...hwk", q, rows[apart]), torch.einsum("...hwc,wkc->...hwk", q, columns[apart])
    return (by_row[..., :, None] + by_column[..., None, :]).flatten(-2).flatten(-3, -2)


class Attention(nn.Module):
    """Attention with an explicit matrix, in windows or over everything; what is padded is the projected qkv, cut by unfold, as that project does."""

    def __init__(self, width: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads, self.grid, self.window = nn.Linear(width, 3 * width), nn.Linear(width, width), heads, grid, window
        side = window or grid
        self.rows, self.columns = (nn.Parameter(torch.zeros(2 * side - 1, width // heads)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        b, n, d = x.shape
        side, padded = self.window or self.grid, -(-self.grid // (self.window or self.grid)) * (self.window or self.grid)
        qkv = self.qkv(x)
        if self.window:
            maps = F.pad(qkv.transpose(1, 2).reshape(b, 3 * d, self.grid, self.grid), (0, padded - self.grid, 0, padded - self.grid))
            qkv = F.unfold(maps, side, stride=side).reshape(b, 3 * d, side * side, -1).permute(0, 3, 2, 1).flatten(0, 1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, d // self.heads)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + relative(q, side, self.rows, self.columns)
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if self.window:
            maps = F.fold(out.unflatten(0, (b, -1)).permute(0, 3, 2, 1).flatten(1, 2), padded, side, stride=side)
            out = maps[:, :, : self.grid, : self.grid].reshape(b, d, n).transpose(1, 2)
        projected: Tensor = self.proj(out)
        return projected


class Block(nn.Module):
    """A pre-norm block with drop path."""

    def __init__(self, width: int, heads: int, grid: int, window: int, drop: float) -> None:
        super().__init__()
        from timm.layers import DropPath

        self.norm1, self.norm2, self.attn = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6), Attention(width, heads, grid, window)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        x = x + self.drop(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return out


class Norm2d(nn.LayerNorm):
    """Layer norm over the channels of a map, copied back to channels first as in the project."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class ViTDet(nn.Module):
    """ViTDet-B's backbone with the steps of its simple pyramid."""

    def __init__(self, vit: ViTConfig, side: int) -> None:
        super().__init__()
        d, grid = vit.width, side // vit.patch
        self.patches = nn.Conv2d(3, d, vit.patch, vit.patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, grid * grid, d))
        self.blocks = nn.Sequential(*[Block(d, vit.heads, grid, 0 if i in GLOBAL else 14, 0.1 * i / (vit.depth - 1)) for i in range(vit.depth)])
        four = (nn.ConvTranspose2d(d, d // 2, 2, 2), Norm2d(d // 2), nn.GELU(), nn.ConvTranspose2d(d // 2, d // 4, 2, 2))
        self.steps = nn.ModuleList([nn.Sequential(*four), nn.ConvTranspose2d(d, d // 2, 2, 2), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> four maps."""
        maps = self.patches(images)
        x = self.blocks(maps.flatten(2).transpose(1, 2) + self.positions)
        x = x.transpose(1, 2).reshape(maps.shape)
        return tuple(step(x) for step in self.steps)


class SimpleNeck(nn.Module):
    """1x1 and 3x3 convolutions with layer norm on each map, and a fifth by taking every second place."""

    def __init__(self, widths: list[int], channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(
            nn.Conv2d(w, channels, 1, bias=False), Norm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False), Norm2d(channels),
        ) for w in widths)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Four maps -> five."""
        found = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        return (*found, F.max_pool2d(found[-1], 1, stride=2))


# ---------------------------------------------------------------------------------------------------------------- contenders


def upernet_rival(scale: Scale) -> tuple[nn.Module, dict[str, Any]]:
    """mmseg's model and optimiser configuration; only what a smaller size needs is changed."""
    import mmseg
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmseg.registry import MODELS

    folder = Path(mmseg.__file__).parent / ".mim" / "configs" / "mae"
    config = Config.fromfile(str(folder / "mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"))
    d, side = scale.vit.width, (scale.side, scale.side)
    config.model.pretrained = None
    config.model.data_preprocessor.size = side
    config.model.backbone.update(img_size=side, embed_dims=d, num_layers=scale.vit.depth, num_heads=scale.vit.heads)
    config.model.neck.embed_dim = d
    config.model.decode_head.update(in_channels=[d] * 4, channels=d)
    config.model.auxiliary_head.in_channels = d
    model: nn.Module = revert_sync_batchnorm(MODELS.build(config.model))
    return model, config.optim_wrapper


def vitdet_rival(scale: Scale) -> tuple[nn.Module, dict[str, Any]]:
    """Mask R-CNN of mmdet's base configuration with ViTDet's backbone, neck and heads, and the project's AdamW."""
    import mmdet
    from mmdet.registry import MODELS
    from mmengine.config import Config

    config = Config.fromfile(str(Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models" / "mask-rcnn_r50_fpn.py"))
    model, norm, d = config.model, {"type": Norm2d, "eps": 1e-6}, scale.vit.width
    fixed = [{"type": "BatchFixedSizePad", "size": (scale.side, scale.side), "pad_mask": True}]
    model.data_preprocessor.update(batch_augments=fixed)
    model.backbone = {"type": ViTDet, "vit": scale.vit, "side": scale.side}
    model.neck = {"type": SimpleNeck, "widths": [d // 4, d // 2, d, d], "channels": 256}
    model.rpn_head.num_convs = 2
    model.roi_head.bbox_head.update(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm)
    model.roi_head.mask_head.norm_cfg = norm
    optimizer = {"type": "AdamW", "lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.1}
    return MODELS.build(model), {"type": "OptimWrapper", "optimizer": optimizer}


def step_of(model: nn.Module, optimizer: dict[str, Any], device: str, autocast: bool) -> Step:
    """A training step of a rival."""
    from mmengine.optim import build_optim_wrapper

    model.to(device).train()
    wrapper, network = build_optim_wrapper(model, optimizer), model

    def step(data: dict[str, Any]) -> float:
        mixed: Any = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()
        given = network.data_preprocessor(data, True)  # type: ignore[operator]
        with mixed:
            loss, _ = network.parse_losses(network(**given, mode="loss"))  # type: ignore[operator]
        wrapper.update_params(loss)
        return float(loss.detach())

    return step


@contextlib.contextmanager
def our_work(name: str, scale: Scale, device: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """What `run` of the evaluator has prepared at paper settings on drawn scenes, and batches of its loader."""
    from evals.openmmlab import golden, samples, session

    kind = name.partition("@")[0]
    found: list[Any] = []

    def keep(work: Any, scope: str) -> dict[str, float]:
        stream = samples.batches(work.train, work.session, positions(range(3), scale.batch, 1))
        found.append((work, [{k: v for k, v in batch.items() if k != "bad"} for batch in stream]))
        return dict.fromkeys(("mIoU", "mIoU_ms", "AP_box", "AP_mask"), 0.0)

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (golden.write_ade20k if kind == "ade20k" else golden.write_coco)(root / "data", 1, CLASSES[kind])
        evaluator = replace(plugins.build("evals", name), **{"crop" if kind == "ade20k" else "side": scale.side})
        lent = Session(root, 0, torch.device(device), torch.bfloat16, {kind: root / "data"})
        paper = Protocol(name="paper", family="paper", summary="", backbones={"b": scale.vit}, backbone="b")
        recipe = Recipe(batch=scale.batch, lr=1e-4, iterations=100, layer_decay=0.65, drop_path=0.1)
        checkpoint = Backbone(scale.vit, IMAGENET_MEAN, IMAGENET_STD, ViT(scale.vit).state_dict())
        with session.instead_of_training(keep):
            evaluator.run(checkpoint, EvalContext(lent, paper, recipe))
        yield found[0]


def our_step(work: Any) -> Step:
    """A training step as TrainByPlace makes it."""
    from evals.openmmlab.optimizer import Optimize

    work.model.to(work.session.device).train()
    wrapper = Optimize(work)
    return lambda data: float(wrapper.update_from([(work.model.train_step(data, wrapper), torch.ones(()))])["loss"].detach())


# --------------------------------------------------------------------------------------------------------------- measuring


def timed(step: Step, data: dict[str, Any], device: str) -> float:
    """Seconds of a step: of the processor, so that other processes count less, or of the GPU's wall clock."""
    data = copy.deepcopy(data)
    if device == "cpu":
        start = time.process_time()
        step(data)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(data)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(step: Step, data: dict[str, Any], device: str) -> float:
    """Most memory of a step above what was there before it, in GB: of the GPU's allocator, or of the process, looked at every two milliseconds."""
    data = copy.deepcopy(data)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(data)
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # or a step would fill, unseen, what the one before it has freed
    process, over, seen = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def look() -> None:
        while not over.wait(0.002):
            seen[0] = max(seen[0], process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    step(data)
    over.set()
    watcher.join()
    return max(0, seen[0] - before) / 2**30


def wide(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with label maps of int64, as mmseg's own packing leaves them."""
    batch = copy.deepcopy(batch)
    for sample in batch["data_samples"]:
        if "gt_sem_seg" in sample:
            sample.gt_sem_seg.data = sample.gt_sem_seg.data.long()
    return batch


def measure(name: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """Interleaved rounds of our step, the rival as published and the rival in bf16: one row for each rival."""
    from evals.openmmlab import session

    kind = name.partition("@")[0]
    scale = SCALES[device, kind]
    torch.manual_seed(0)
    with our_work(name, scale, device) as (work, batches), session.quiet(work.session, "mmseg" if kind == "ade20k" else "mmdet"):
        build = upernet_rival if kind == "ade20k" else vitdet_rival
        published, mixed = build(scale), build(scale)
        steps = {"ours": our_step(work), "rival": step_of(*published, device, False), "rival bf16": step_of(*mixed, device, True)}
        weights = {"ours": sum(p.numel() for p in work.model.parameters()), "rival": sum(p.numel() for p in published[0].parameters())}
        given = {who: batches if who == "ours" else [wide(batch) for batch in batches] for who in steps}
        losses = {who: step(copy.deepcopy(given[who][0])) for who, step in steps.items()}
        if not all(math.isfinite(v) for v in losses.values()) or abs(weights["ours"] / weights["rival"] - 1) > 0.15:
            sys.exit(f"{name}: not the same task: losses {losses}, parameters {weights}")
        memory = {who: peak(step, given[who][1], device) for who, step in steps.items()}
        seconds = [{who: timed(step, given[who][i % len(batches)], device) for who, step in steps.items()} for i in range(rounds)]
    speed = {who: scale.batch / statistics.median(s[who] for s in seconds) for who in steps}

    def beside(who: str, figures: dict[str, float]) -> dict[str, float]:
        return {"ours": figures["ours"], "rival": figures[who]}

    rows, title = list[dict[str, Any]](), f"{name}, side {scale.side}, batch {scale.batch}, ViT {scale.vit.width}x{scale.vit.depth}"
    for who, how in (("rival", "fp32 as published"), ("rival bf16", "bf16 autocast")):
        ratios = [s[who] / s["ours"] for s in seconds]
        rows.append({
            "name": title, **middle(ratios, "ratio"), "rounds": ratios,
            "rival": f"{'mmseg, MAE UperNet' if kind == 'ade20k' else 'mmdet, ViTDet restated'}, {how}",
            "images_per_s": beside(who, speed), "peak_GB": beside(who, memory), "details": {"first_losses": beside(who, losses), "parameters": weights},
        })
    return rows


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evals", default="ade20k,coco", help="evaluators, variants too: coco@vitdet")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="folder for a dated JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not os.environ.get("HARNESS_CPU") else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.evals.split(","):
        with openmmlab(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what mmseg says about its own configuration
            rows += (found := measure(name, device, args.rounds))
        rival = "mmseg's MAE UperNet configuration" if name.startswith("ade20k") else "ViTDet restated for mmdet from its published configuration"
        speed, used = found[0]["images_per_s"], found[0]["peak_GB"]
        print(f"{found[0]['name']}, {device}: {speed['ours']:.2f} images/s, {used['ours']:.2f} GB; rival: {rival}")
        for r in found:
            spread = f"{r['ratio']:.2f} times as fast ({r['spread'][0]:.2f} to {r['spread'][1]:.2f} in {args.rounds} rounds)"
            print(f"  {r['rival']}: {r['images_per_s']['rival']:.2f} images/s, {r['peak_GB']['rival']:.2f} GB: ours {spread}", flush=True)
    if args.out:
        hardware = torch.cuda.get_device_name() if device == "cuda" else processor()
        keep(f"dense-{device}", rows, Path(args.out), hardware=hardware, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
