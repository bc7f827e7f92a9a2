"""Attention maps of a pre-trained ViT on images that it was trained on, as in BEiT-paper Figure 2: where a reference patch looks.

Made by `report` from the checkpoint, where it still is: seconds for a ViT-B on a CPU, and nothing to wait for at the end of a training.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.jobs import read_job
from harness.spec import JobFailed, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from harness.vit import ViT

IMAGES = 3
PLACES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75))  # of the reference patches, as fractions of height and width
SIDE = 112  # pixels of a picture in the sheet


def attention(vit: ViT, images: Tensor) -> Tensor:
    """Self-attention in the last block, the mean over its heads: normalised images (B, 3, H, W) -> (B, 1 + N, 1 + N), rows sum to 1, class token first."""
    import torch

    block: Any = vit.blocks[-1]
    seen: list[Tensor] = []
    handle = block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            vit.encode(vit.place(vit.patches(images)))
    finally:
        handle.remove()
    with torch.no_grad():
        (b, n, _), part = seen[0].shape, block.attn
        q, k, _ = part.qkv(seen[0]).reshape(b, n, 3, part.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = part.q_norm(q) * part.scale @ part.k_norm(k).transpose(-2, -1)
        if vit.relative_bias is not None:
            bias: Any = vit.relative_bias[vit.bias_of_block[-1]]
            logits = logits + bias()
        return logits.softmax(dim=-1).mean(dim=1)


def own_images(folder: Path) -> list[Any]:
    """Three images, as PIL RGB, that a node was trained on; fewer where it has fewer, none where it trains on none.

    Raises:
        UserError, JobFailed, OSError: they are gone, or cannot be read.
    """
    from harness.data import read_images

    for name, root in (read_job(folder / "job.json")["where"].get("folders") or {}).items():
        found = read_images(name.partition(":")[0], "train", Path(root))
        return [found.load(i * len(found) // IMAGES) for i in range(min(IMAGES, len(found)))]
    return []


def picture(folder: Path) -> bytes | None:
    """A PNG for a pre-training's folder: per image the image, and for each reference patch (boxed) its attention to all patches, brightest at its highest.

    None where the checkpoint or the images are gone, or where nothing was trained on images.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    from harness.augment import EvalTransform, Normalize
    from harness.checkpoint import Backbone

    path = folder / "checkpoint" / "backbone.pt"
    try:
        if not path.is_file() or not (chosen := own_images(folder)):
            return None
        checkpoint = Backbone.load(path)
        config, vit = checkpoint.config, checkpoint.build().eval()
    except (JobFailed, UserError, OSError):
        return None
    pixels = torch.stack([EvalTransform(config.size)(image)["image"] for image in chosen])
    maps = attention(vit, Normalize(checkpoint.mean, checkpoint.std)(pixels))[:, 1:, 1:]
    rows, columns = config.grid
    sheet = Image.new("RGB", ((1 + len(PLACES)) * (SIDE + 4) - 4, len(chosen) * (SIDE + 4) - 4), (128, 128, 128))
    for i, image in enumerate(pixels):
        shown = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(shown, (0, i * (SIDE + 4)))
        for j, (down, right) in enumerate(PLACES):
            row, column = int(down * rows), int(right * columns)
            heat = maps[i, row * columns + column].reshape(rows, columns)
            bright = Image.fromarray((255 * heat / heat.max()).to(torch.uint8).numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            faint = np.asarray(shown.convert("L"), dtype=np.float32)[..., None] * 0.35
            mixed = faint + np.asarray(bright, dtype=np.float32)[..., None] * np.array([0.65, 0.55, 0.1], dtype=np.float32)
            tile = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
            box = (column * SIDE // columns, row * SIDE // rows, (column + 1) * SIDE // columns - 1, (row + 1) * SIDE // rows - 1)
            ImageDraw.Draw(tile).rectangle(box, outline=(255, 60, 60), width=2)
            sheet.paste(tile, ((j + 1) * (SIDE + 4), i * (SIDE + 4)))
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
