"""Training steps on a GPU against the limit of the machine: MFU, what compiling gives, the papers' own ratios, and what must not happen in a step.

Never run on a GPU so far: none was lent while it was written; its parts are tested on a CPU (`--device cpu --tiny`, tests/methods/test_gpu_benchmark.py).

In one run: the peak of bf16 matrix products; images/s and MFU of MAE and BEiT, eager and with compiled blocks (goal R10: 45 %), where MFU counts the FLOPs
of the published model, though the code does less; MAE ViT-L with mask tokens in the encoder and with a decoder of one block (R12: 3.2 and 1.3 by MAE's
Table 2); seconds of an epoch of BEiT and MAE (R13: 3.5 by the papers); transformers and lightly (R2, R5; `benchmarks/step.py` has the gate). No
step may wait for the GPU (torch's sync debug mode), and attention with a mask, 64 modulo 128 tokens and extreme logits must have finite gradients with the
kernels that a job uses (pytorch#196678).

    make bench-gpu GPU_PYTHON=python3     # any Python with a CUDA build of torch, torchvision and timm; nothing is installed
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import step
import torch
import torch.nn.functional as F
from report import keep, middle
from torch.utils.flop_counter import FlopCounterMode

from harness.provenance import processor, set_up
from harness.randomness import generator
from harness.spec import ViTConfig
from methods.mae import MAE
from methods.views import SIDE, draw_jitter

LARGE = ViTConfig(width=1024, depth=24, heads=16, positions="sincos-mae")
TINY = ViTConfig(size=(32, 32), patch=8, width=32, depth=2, heads=2, positions="sincos-mae")


def cases(tiny: bool) -> dict[str, step.Case]:
    """What is measured, in bf16; tiny ones for a test on a CPU."""
    base, large = (TINY, TINY) if tiny else (step.BASE, LARGE)
    batch, codes = (4, (8, 32, 1)) if tiny else (256, (256, 8192, 2))
    mae = step.Case("mae", base, batch, torch.bfloat16)
    beit = step.Case("beit", replace(base, positions="learned", key_bias=False), batch, torch.bfloat16, codes)
    wide = replace(mae, vit=large)
    ablations = {"mae-large-decoder-1": replace(wide, decoder_depth=1), "mae-large-masks": replace(wide, see_masks=True)}
    return {"mae-base": mae, "mae-large": wide, **ablations, "beit-base": beit}


def train_flops(case: step.Case) -> float:
    """FLOPs of a training step for one image by the published formulation: matrix products and attention, multiply and add = 2 (performance.md)."""
    v, head = case.vit, case.vit.patch**2 * 3

    def blocks(depth: int, n: int, d: int) -> float:
        return depth * (24.0 * n * d**2 + 4.0 * n**2 * d)

    n, patch = v.patches, 2.0 * v.patches * head * v.width
    if case.method == "beit":
        encoder, hidden = step.Tokenizer(*case.tokenizer).encoder.to("meta"), step.BEiT().blocks(v).target
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, *(8 * side for side in v.grid), device="meta"))
        return 3 * (patch + blocks(v.depth, n + 1, v.width) + 2.0 * hidden * v.width * case.tokenizer[1]) - patch + counter.get_total_flops()
    d, depth, _ = MAE(decoder_depth=case.decoder_depth).decoder(v)
    seen = n if case.see_masks else int(n * 0.25)
    forward = patch + blocks(v.depth, seen + 1, v.width) + 2.0 * (seen + 1) * v.width * d + blocks(depth, n + 1, d) + 2.0 * (n + 1) * d * head
    return 3 * forward - patch


def median_seconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """Seconds of some work, after one round that does not count."""
    taken = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def peak_tflops(device: str, side: int) -> float:
    """TFLOP/s of bf16 products of two square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2e-12 * side**3 / median_seconds(lambda: a @ b, device, 20)


def finite_gradients(device: str) -> bool:
    """Whether attention as BEiT's has finite gradients where cuDNN's kernel had not: with a mask, 64 modulo 128 tokens and extreme logits."""
    q, k, v = ((30 * torch.randn(2, 4, 192, 64, device=device)).bfloat16().requires_grad_() for _ in range(3))
    mask = torch.zeros(1, 4, 192, 192, device=device, dtype=torch.bfloat16)
    mask[..., 100:] = float("-inf")
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float().square().sum().backward()
    return all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (q, k, v))


def waits_for_nothing(one: step.Contender, case: step.Case, batch: step.Batch) -> bool:
    """Whether a step runs without making the host wait for the GPU (always on a CPU). The first step may."""
    def take() -> None:
        with torch.autocast(batch["image"].device.type, case.dtype):
            loss = one.loss(batch)
        loss.backward()
        one.after()
        one.optimizer.step()
        one.optimizer.zero_grad(set_to_none=True)

    take()
    if batch["image"].is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        take()
        return True
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        print(f"a step waits for the GPU: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    finally:
        if batch["image"].is_cuda:
            torch.cuda.set_sync_debug_mode("default")


def jitter_of(images: int) -> step.Batch:
    """What BEiT's loader leaves to the device (`methods.views.sample_of`): three steps an image, a picture of noise about whose grey contrast turns."""
    steps, whole = [draw_jitter(generator(i), (0.4, 0.4, 0.4)) for i in range(images)], torch.randint(0, 256, (images, SIDE, SIDE, 3), dtype=torch.uint8)
    return {"jitter": torch.tensor(steps), "whole": whole, "mirrored": torch.arange(images) % 2 == 0}


def own(name: str, case: step.Case, device: str, rounds: int, peak: float, backend: str) -> list[dict[str, Any]]:
    """Our step, with BEiT's colour jitter, eager and compiled: images/s, MFU, whether it waits; on a GPU memory and pinned transfers.

    The compiled one is the last row.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batch = {k: v.to(device) for k, v in step.batch_of(case).items()}
    if case.method == "beit":
        batch |= {k: batch[k].permute(0, 2, 3, 1).contiguous() for k in ("image", "tokenizer_image")}
        batch |= {k: v.to(device) for k, v in jitter_of(case.batch).items()}
    rows, flops = list[dict[str, Any]](), train_flops(case)
    for how in ("eager", "compiled"):
        one = step.ours(case, device, batch)
        if how == "compiled":
            step.compiled(one, backend)
        calm = waits_for_nothing(one, case, batch)
        speeds = [case.batch / step.seconds(one, case, batch) for _ in range(rounds)]
        rows.append({"name": f"{name}, batch {case.batch}, {how}", **middle(speeds, "value"), "unit": "images/s", "rounds": speeds,
                     "mfu_percent": 100 * flops * statistics.median(speeds) / (peak * 1e12), "gflop_per_image": flops / 1e9, "waits_for_nothing": calm})
    if device == "cuda":
        rows[-1]["peak_GB"] = torch.cuda.max_memory_allocated() / 2**30
        pinned = step.batch_of(case)["image"].pin_memory()
        rows[-1]["transfer_images_per_s"] = case.batch / median_seconds(lambda: pinned.to(device, non_blocking=True), device, rounds)
    return rows


def main(words: list[str] | None = None) -> int:
    """Measure; 1 when something happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", help="folder for a dated JSON")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here, or torch has no CUDA: --device cpu --tiny tests the benchmark itself", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        set_up(Path(folder))  # the kernels that a job uses
    peak = peak_tflops(args.device, 128 if args.tiny else 8192)
    print(f"bf16 products: {peak:.1f} TFLOP/s")
    rows, speed = [{"name": "bf16 matrix products", "value": peak, "unit": "TFLOP/s"}], {}
    for name, case in cases(args.tiny).items():
        rows += (steps := own(name, case, args.device, args.rounds, peak, args.backend))
        speed[name] = steps[-1]["value"]
        for row in steps:
            print(f"{row['name']}: {row['value']:.0f} images/s, MFU {row['mfu_percent']:.1f} %", flush=True)
        if name.endswith("base") and not args.tiny:
            for backend in ("", args.backend):
                rows += (found := step.measure(name, case, args.device, args.rounds, backend))
                for r in found:
                    print(f"{r['name']}: {r['rival']}: ratio {r['ratio']:.2f} ({r['spread'][0]:.2f} to {r['spread'][1]:.2f})", flush=True)
    for what, ratio, published in (
        ("R12 mask tokens in the encoder : without", speed["mae-large"] / speed["mae-large-masks"], 3.2),
        ("R12 decoder of 8 blocks : of 1", speed["mae-large-decoder-1"] / speed["mae-large"], 1.3),
        ("R13 BEiT : MAE, seconds of an epoch", speed["mae-base"] / speed["beit-base"], 3.5),
    ):
        rows.append({"name": what, "value": ratio, "unit": "times", "published": published})
        print(f"{what}: {ratio:.2f} (published: {published})")
    held = {"finite gradients": finite_gradients(args.device), "no waiting": all(row.get("waits_for_nothing", True) for row in rows)}
    print(", ".join(f"{what}: {'yes' if good else 'NO'}" for what, good in held.items()))
    if args.out:
        hardware = torch.cuda.get_device_name() if args.device == "cuda" else processor()
        keep(f"gpu-{args.device}", rows, Path(args.out), hardware=hardware, held=held)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
