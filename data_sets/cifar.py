"""CIFAR-100 as downloaded: three pickles, read without running anything that they name."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_sets.labelled import Labelled
from harness.data import Count, ImageList
from harness.spec import UserError

SIDE = 32


def encode(text: str, encoding: str = "latin1") -> bytes:
    """What pickles of old protocols call to make bytes; no other codec than latin1."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode("latin1")


ARRAYS: Mapping[str, Any] = {  # all that an array is rebuilt from, in the pickles of numpy 1 and 2
    "_reconstruct": np.empty(0).__reduce__()[0], "_frombuffer": np.empty(1).__reduce_ex__(5)[0], "ndarray": np.ndarray, "dtype": np.dtype,
}


class Restricted(pickle.Unpickler):
    """Numbers, texts, lists, dictionaries and numpy arrays; any other name in the file is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that arrays need."""
        if module.split(".")[0] == "numpy" and name in ARRAYS:
            return ARRAYS[name]
        if (module, name) == ("_codecs", "encode"):
            return encode
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_pickle(path: Path) -> dict[str, Any]:
    """A dictionary of arrays and lists; keys of Python 2 become text.

    Raises:
        UserError: missing, damaged, or it names anything but arrays.
    """
    try:
        with open(path, "rb") as stream:
            body = Restricted(stream, encoding="latin1").load()
        return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in body.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): run `harness data prepare cifar100`, or give another --data") from None
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"{path}: not a file of CIFAR-100 ({' '.join(str(error).split())[:100]}): download cifar-100-python.tar.gz again") from None


class CIFAR100(Labelled):
    """CIFAR-100 with its 100 fine classes: cifar-100-python/{train,test,meta}. val is the official test split."""

    folder = "cifar-100-python"
    official: ClassVar[Mapping[str, Count]] = {"train": Count(50_000, 100), "val": Count(10_000, 100)}
    label_files = ("train", "test", "meta")

    def read(self, split: str, root: Path) -> ImageList:
        """Images of train or val, held in memory (150 MB for train)."""
        path = root / ("train" if split == "train" else "test")
        meta, body = read_pickle(root / "meta"), read_pickle(path)
        try:
            classes = tuple(c.decode() if isinstance(c, bytes) else str(c) for c in meta["fine_label_names"])
            labels = np.asarray(body["fine_labels"], dtype=np.int64)
            pixels = np.asarray(body["data"])
            if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * SIDE * SIDE):
                raise ValueError(f"data is {pixels.dtype} {pixels.shape}")
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not in CIFAR-100's layout ({error}): expected data, fine_labels, and fine_label_names in meta") from error
        if len(labels) and (labels.max() >= len(classes) or labels.min() < 0):
            raise UserError(f"{path}: label {labels.max()} is above the number of classes ({len(classes)} in meta)")
        pixels = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))  # stored channel by channel
        return ImageList(root, [f"{path.name}-{i:05}" for i in range(len(labels))], labels, classes, pixels)
