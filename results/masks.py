"""What a pre-training hides: the masks that its own transform draws, on images that it was trained on. Made by `report`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from harness.canonical import restore
from harness.jobs import read_job
from harness.spec import JobFailed, UserError
from results.attention import SIDE, own_images

DRAWS = 2  # of each image, one below the other


def hidden(sample: dict[str, Any], method: Any) -> Any:
    """Which patches a sample hides, bool (N,), or None where nothing is: "mask" says it; of "noise" the lowest int(N (1 - mask_ratio)) are shown."""
    if "mask" in sample:
        return sample["mask"]
    if "noise" not in sample or not hasattr(method, "mask_ratio"):
        return None
    noise = sample["noise"]
    return noise.argsort().argsort() >= int(len(noise) * (1 - method.mask_ratio))


def picture(folder: Path) -> bytes | None:
    """A PNG for a pre-training's folder: its views of three images, hidden patches grey, each drawn twice. None where it hides none, or its images are gone."""
    import numpy as np
    from PIL import Image

    from harness.randomness import generator

    try:
        identity, images = read_job(folder / "job.json")["identity"], own_images(folder)
        method, recipe, vit = (restore(identity.get(part)) for part in ("plugin", "recipe", "vit"))
        transform = method.transform(vit, recipe) if images and recipe is not None else None
    except (JobFailed, UserError, OSError, ImportError, ValueError, KeyError, TypeError, AttributeError):  # of another version, or a plugin that is not here
        return None
    sheet = Image.new("RGB", (len(images) * (SIDE + 4) - 4, DRAWS * (SIDE + 4) - 4), (255, 255, 255)) if transform else None
    for i, image in enumerate(images if transform else ()):
        for j in range(DRAWS):
            sample = transform(image, generator(0, "masks", i, j))
            if (mask := hidden(sample, method)) is None:
                return None
            covered = np.kron(mask.reshape(vit.grid).numpy(), np.ones((vit.patch, vit.patch), dtype=bool))[..., None]
            seen = sample["image"] if sample["image"].shape[-1] == 3 else sample["image"].permute(1, 2, 0)  # interleaved where the device has work left on it
            pixels = np.where(covered, np.uint8(128), seen.numpy())
            sheet.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (i * (SIDE + 4), j * (SIDE + 4)))
    if sheet is None:
        return None
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
