"""Pixels on the short way: a JPEG file decoded into an array and resized there; PIL's storage is filled only when something asks PIL.

simplejpeg gives the values that PIL gives: with or without it, a number stays. torch's resize rounds otherwise than PIL's (1 value in 300 by 1, 0.003
grey levels in the mean): which of them is used follows from the configuration (`harness.spec.pixels`).
"""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
ORIENTATION = 0x0112  # in EXIF; XMP spells it out, and PIL follows that too
SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xdb-\xfe]")  # of a JPEG file, with its length behind; the pixels begin at FF DA


class Picture(Image.Image):
    """A PIL RGB image whose values are a tensor, uint8 (3, H, W) of any strides, until a method of PIL's is called: read them by `values_of`."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values
        self._mode, self._size = "RGB", (values.shape[2], values.shape[1])

    def load(self) -> Any:
        """Fill PIL's own storage; every method of PIL's calls this first."""
        if self._im is None:
            self._im = Image.fromarray(self.values.permute(1, 2, 0).contiguous().numpy()).im
        return super().load()

    def transpose(self, method: Image.Transpose) -> Image.Image:
        """PIL's; to mirror an image does not fill PIL's storage."""
        if self._im is None and method == Image.Transpose.FLIP_LEFT_RIGHT:
            return Picture(self.values.flip(2))
        return super().transpose(method)


def headers(data: bytes) -> bytes:
    """What stands before a JPEG file's pixels, EXIF and XMP among it; all of the file where its segments do not follow one another."""
    at = 2
    while SEGMENT.match(data, at):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:at] if data[at : at + 2] == b"\xff\xda" else data


def decode_jpeg(data: bytes) -> Picture | None:
    """A JPEG file's image, or None where PIL has to do it: no JPEG, CMYK, turned by EXIF, damaged, suspiciously large, or no simplejpeg here."""
    if data[:2] != b"\xff\xd8":
        return None
    if simplejpeg is None:
        warnings.warn("simplejpeg is not installed: PIL decodes JPEG files, to the same values but slower: pip install simplejpeg")
        return None
    try:
        (height, width, colour, _), before = simplejpeg.decode_jpeg_header(data), headers(data)  # to look through all of it took a tenth of the decoding
        if colour in ("CMYK", "YCCK") or height * width > (Image.MAX_IMAGE_PIXELS or math.inf) or (
            (b"Exif\0\0" in before or b"Orientation" in before) and Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1) != 1
        ):
            return None
        return Picture(torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1))
    except (ValueError, OSError, SyntaxError):
        return None  # PIL knows whether it can be mended, and what to say if not


def values_of(image: Image.Image) -> Tensor:
    """uint8 (3, H, W) of an RGB image, of any strides; not to be written to. Where PIL's storage is filled, something may have drawn there."""
    return image.values if isinstance(image, Picture) and image._im is None else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def planar(values: Tensor) -> Tensor:
    """uint8 (3, H, W) with one plane of memory behind the other; OpenCV takes interleaved values apart eight times as fast as torch."""
    interleaved = values.permute(1, 2, 0)
    if values.is_contiguous() or not interleaved.is_contiguous():
        return values.contiguous()
    import cv2

    made = np.empty(tuple(values.shape), dtype=np.uint8)
    cv2.split(interleaved.numpy(), list(made))
    return torch.from_numpy(made)


def resize(image: Tensor, size: tuple[int, int], resample: Image.Resampling = BICUBIC) -> Tensor:
    """uint8 (3, H, W) at `size` (height, width), antialiased as PIL's resize is; of interleaved values interleaved ones, as `planar` wants them."""
    _, height, width = image.shape
    if (height, width) == size:
        return image
    if width != size[1] and height - size[0] > max(0, 2 * (width - size[1])):  # here Pillow 13 begins with the columns, torch always with the rows
        image = resize(image, (size[0], width), resample)
    try:
        corners = None if resample == LANCZOS else False
        batch = image[None] if image.stride(0) != 1 else image.as_strided((1, *image.shape), (height * image.stride(1), *image.stride()))  # tells torch so
        return F.interpolate(batch, size=size, mode=resample.name.lower(), antialias=True, align_corners=corners)[0]
    except (ValueError, RuntimeError):  # a torch without Lanczos' filter (2.14 has it)
        return values_of(Picture(image).resize((size[1], size[0]), resample))
