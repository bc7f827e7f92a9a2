"""Training step of a ViT's blocks on a CPU in bf16: explicit attention (ours) against the fused kernel (timm's default, the rival).

Rounds are interleaved in one process on one thread; the gate first compares output and gradient. Prints one line per size and, with a
folder as argument, writes a dated JSON there with hardware and versions.

    .venv/bin/python benchmarks/attention.py [benchmarks/results]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from report import keep, middle
from timm.models.vision_transformer import Block
from torch import nn

ROUNDS, STEPS, BATCH = 7, 4, 64
SIZES = ((128, 4, 17), (128, 4, 65), (192, 3, 17), (192, 3, 65))  # width, heads, tokens: the demo's MAE and BEiT, and 1.5 times as wide


def step(net: nn.Module, x: torch.Tensor, fused: bool) -> torch.Tensor:
    """Forward and backward; the loss."""
    for block in net:  # type: ignore[attr-defined]
        block.attn.fused_attn = fused
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().pow(2).mean()
    loss.backward()
    return loss.detach()


def seconds(net: nn.Module, x: torch.Tensor, fused: bool) -> float:
    """Processor seconds of one step, so that other processes count less."""
    start = time.process_time()
    for _ in range(STEPS):
        step(net, x, fused)
    return (time.process_time() - start) / STEPS


def measure(width: int, heads: int, tokens: int) -> dict[str, Any]:
    """Gate, then interleaved rounds."""
    torch.manual_seed(0)
    net = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(6)])
    x = torch.randn(BATCH, tokens, width)
    losses, gradients = [], []
    for fused in (True, False):
        losses.append(float(step(net, x, fused)))
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    if abs(losses[0] - losses[1]) > 1e-2 * abs(losses[0]) or error > 0.03:
        sys.exit(f"not the same computation: losses {losses}, gradients differ by {error:.3g}")
    pairs = [(seconds(net, x, True), seconds(net, x, False)) for _ in range(ROUNDS)]
    ratios = [a / b for a, b in pairs]
    ours, rival = (BATCH / statistics.median(pair[i] for pair in pairs) for i in (1, 0))
    return {
        "name": f"width {width}, tokens {tokens}, batch {BATCH}", **middle(ratios, "ratio"), "rounds": ratios, "rival": "timm's fused kernel",
        "images_per_s": {"ours": ours, "rival": rival}, "gradient_difference": error,
    }


def main() -> None:
    """Measure all sizes."""
    torch.set_num_threads(1)
    rows = [measure(*size) for size in SIZES]
    for r in rows:
        speed, (low, high) = r["images_per_s"], r["spread"]
        print(f"{r['name']}: explicit {speed['ours']:.0f} images/s, fused {speed['rival']:.0f}, ratio {r['ratio']:.2f} ({low:.2f} to {high:.2f}), "
              f"gradients differ by {r['gradient_difference']:.1e}")
    if len(sys.argv) > 1:
        keep("attention", rows, Path(sys.argv[1]), threads=1)


if __name__ == "__main__":
    main()
