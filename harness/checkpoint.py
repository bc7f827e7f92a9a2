"""Files of weights: written whole or not at all, read safely, the one before kept.

A *backbone* file is what a pre-training hands to evaluators: the ViT's weights, its architecture, the mean and std of its
input, and, if it was trained with labels, its classifier. A *training state* is what a stopped job goes on from. torch is imported
where it is used: tables and `--help` come this way too.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from harness.canonical import canonical, restore
from harness.spec import JobFailed, ViTConfig

if TYPE_CHECKING:
    from harness.vit import ViT

FORMAT = 1
ROOM_BYTES = 16 * 2**20  # left over beside a training state: for logs and reports


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name beside it, flush it to disk and rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Backbone:
    """A pre-trained ViT as evaluators get it. `state` has exactly the ViT's keys; `classifier` is None or what `harness.classifier` saved."""

    config: ViTConfig
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    state: dict[str, Any]
    classifier: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def build(self, target: ViTConfig | None = None, drop_path: float = 0.0) -> ViT:
        """The ViT with these weights; `target` may ask for another size or a relative bias (see `harness.vit.load_backbone`)."""
        from harness.vit import load_backbone

        return load_backbone(self.state, self.config, target, drop_path)

    def save(self, path: Path) -> None:
        """Write atomically."""
        import torch

        body = {
            "format": FORMAT, "config": canonical(self.config), "mean": list(self.mean), "std": list(self.std),
            "state": self.state, "classifier": self.classifier, "facts": self.facts,
        }
        write_atomically(path, lambda stream: torch.save(body, stream))

    @classmethod
    def load(cls, path: Path) -> Backbone:
        """Read a backbone file.

        Raises:
            JobFailed: the file is missing, damaged or of another format.
        """
        import torch

        try:
            body = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise JobFailed(f"{path} cannot be read ({type(error).__name__}): remove its folder and run again") from error
        if body.get("format") != FORMAT:
            raise JobFailed(f"{path} has format {body.get('format')}, this version reads {FORMAT}")
        return cls(restore(body["config"]), tuple(body["mean"]), tuple(body["std"]), body["state"], body["classifier"], body["facts"])


def in_memory(state: Any) -> tuple[Any, int]:
    """(a copy of nested dicts, lists and tuples with all tensors in main memory, bytes of the tensors)."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True), state.nbytes
    if isinstance(state, dict):
        out, total = copy.copy(state), 0  # copy: a state_dict brings the versions of its modules along
        for key, value in state.items():
            out[key], size = in_memory(value)
            total += size
        return out, total
    if isinstance(state, (list, tuple)):
        parts = [in_memory(value) for value in state]
        return type(state)(value for value, _ in parts), sum(size for _, size in parts)
    return state, 0


class States:
    """The training states of a job: `state-<step>.pt` in a folder, the last two kept, a damaged one skipped with a warning.

    Training goes on while a thread writes the copy that `save` has made, one at a time; `took` is what the last one took, in seconds. What goes wrong is
    raised by the next `save` or `wait`.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self.took = 0.0

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the state after `step` steps; when it is there, the oldest is dropped.

        Raises:
            JobFailed: there is no room for it, or the one before could not be written. Earlier states are as they were.
        """
        self.wait()
        began = time.monotonic()
        copied, size = in_memory(state)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < size + ROOM_BYTES:
            raise self._failure(f"disk full: a training state takes {size / 2**20:.0f} MB, {free / 2**20:.0f} MB are free")
        self._writer = threading.Thread(target=self._write, args=(step, copied, began), name="states")  # no daemon: a process that ends finishes writing
        self._writer.start()

    def _write(self, step: int, state: dict[str, Any], began: float) -> None:
        import torch

        try:
            write_atomically(self.folder / f"state-{step:09d}.pt", lambda stream: torch.save(state, stream))
            for old in self._files()[: -self.keep]:
                old.unlink(missing_ok=True)
            self.took = time.monotonic() - began
        except BaseException as error:  # raised where the training is
            self._error = error

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises JobFailed when that does not succeed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if (error := self._error) is not None:
            self._error, chain = None, [error]
            while (above := chain[-1].__cause__ or chain[-1].__context__) is not None:
                chain.append(above)
            full = any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain)
            raise self._failure("disk full" if full else f"a training state cannot be written ({type(error).__name__}: {error})") from error

    def newest(self) -> str:
        """The newest state, as text for a message."""
        files = self._files()
        return f"the last good state is of step {int(files[-1].stem.split('-')[1])}, {files[-1]}" if files else "no state was saved before"

    def _failure(self, what: str) -> JobFailed:
        return JobFailed(f"{what} in {self.folder}: make room, then run with --retry; {self.newest()}")

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest readable file, or None."""
        import torch

        for path in reversed(self._files()):
            try:
                return int(path.stem.split("-")[1]), torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                warnings.warn(f"checkpoint {path.name} is damaged ({type(error).__name__}); going back to the one before", stacklevel=2)
        return None
