"""Files of weights: written whole or not at all, read safely, the one before kept.

A *backbone* file is what a pre-training hands to evaluators: the ViT's weights, its architecture, the mean and std of its
input, and, if it was trained with labels, its classifier. A *training state* is what a stopped job goes on from. torch is imported
where it is used: tables and `--help` come this way too.
"""

from __future__ import annotations

import copy
import errno
import os
import secrets
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
SLICE = "rows of this process"
SAVES_APART = 50  # times what one takes: 2 % of the time
ROOM_BYTES = 16 * 2**20  # left over beside a training state: for logs and reports


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name beside it, flush it to disk and rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # that number is also on other machines
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
            raise JobFailed(f"{path} cannot be read ({type(error).__name__}): remove its folder, then run with --retry") from error
        if body.get("format") != FORMAT:
            raise JobFailed(f"{path} has format {body.get('format')}, this version reads {FORMAT}")
        return cls(restore(body["config"]), tuple(body["mean"]), tuple(body["std"]), body["state"], body["classifier"], body["facts"])


def in_memory(state: Any) -> tuple[Any, int]:
    """(a copy of nested dicts, lists and tuples with all tensors in main memory, bytes of the tensors); of a sharded one {SLICE: what is here}."""
    import torch

    if hasattr(state, "to_local"):
        rows, size = in_memory(state.detach().to_local())
        return {SLICE: rows}, size
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


def joined(parts: list[Any]) -> Any:
    """One state from those of all processes: slices put together along the first dimension, everything else as the first has it."""
    import torch

    first = parts[0]
    if not isinstance(first, dict):
        return first.clone() if isinstance(first, torch.Tensor) else first  # clone: files are read as they are needed, and may be gone by then
    if set(first) == {SLICE}:
        return torch.cat([part[SLICE] for part in parts])
    out = copy.copy(first)
    for key in first:
        out[key] = joined([part[key] for part in parts])
    return out


class States:
    """The training states of a job: `state-<step>.pt` in a folder, the last two and milestones kept, a damaged one skipped with a warning.

    Training goes on while a thread writes the copy that `save` has made, one at a time; `took` is what the last one took, in seconds. What goes wrong is
    raised by the next `save` or `wait`.

    Args:
        total, milestones: the first state in each of so many equal stretches of `total` steps is a milestone, but for the first stretch's. With 4, three
            states stay behind: one may go back to them when the last two are damaged. Where the disk is full, they make room, the oldest first.
        slice_of: (rank, processes) of a sharded training: each process writes what it has, `state-<step>.<rank>-of-<processes>.pt`, and a state counts once all
            of its files are there. Any process reads it as a whole.
    """

    def __init__(self, folder: Path, total: int = 0, milestones: int = 1, keep: int = 2, slice_of: tuple[int, int] | None = None) -> None:
        self.folder, self.total, self.milestones, self.keep, self.slice_of = folder, total, milestones, keep, slice_of
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self.took = 0.0

    @staticmethod
    def step_of(file: Path) -> int:
        """Steps done in a state, by its name."""
        return int(file.name[len("state-") :].partition(".")[0])

    def _states(self) -> list[list[Path]]:
        """The files of each state that is there as a whole, the oldest first."""
        found: dict[tuple[int, str], list[Path]] = {}
        for file in sorted(self.folder.glob("state-*.pt")):
            found.setdefault((self.step_of(file), file.stem.partition("-of-")[2]), []).append(file)
        return [files for (_, count), files in sorted(found.items()) if len(files) == int(count or 1)]

    def due(self, since_s: float, every_s: float) -> bool:
        """Whether it is time for a state so long after the one before: not sooner than was asked for, nor so often that writing takes over 2 % of the time."""
        return since_s > every_s and (not every_s or since_s > SAVES_APART * self.took)

    def tidy(self, step: int) -> None:
        """Before going on from the state after `step` steps, while nothing is written: remove what a killed start has left, files half written and states of
        which one is missing, that this start may write; rename later states, which cannot be read: as the last two they would be kept, and new ones not."""
        whole = {file for files in self._states() for file in files}
        for file in {*self.folder.glob("state-*.pt"), *self.folder.glob(".state-*.tmp")} - whole:
            file.unlink(missing_ok=True)
        for file in whole:
            if self.step_of(file) > step:
                file.rename(file.with_name(f"damaged-{file.name}"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the state after `step` steps; when it is there, older ones are dropped.

        Raises:
            JobFailed: there is no room for it, or the one before could not be written. Earlier states are as they were.
        """
        self.wait()
        began = time.monotonic()
        copied, size = in_memory(state)
        size *= self.slice_of[1] if self.slice_of else 1
        self.folder.mkdir(parents=True, exist_ok=True)
        spare = self._states()[: -self.keep]
        while (free := shutil.disk_usage(self.folder).free) < size + ROOM_BYTES and spare:
            for file in spare.pop(0):
                file.unlink(missing_ok=True)
        if free < size + ROOM_BYTES:
            raise self._failure(f"disk full: a training state takes {size / 2**20:.0f} MB, {free / 2**20:.0f} MB are free")
        self._writer = threading.Thread(target=self._write, args=(step, copied, began), name="states")  # no daemon: a process that ends finishes writing
        self._writer.start()

    def _write(self, step: int, state: dict[str, Any], began: float) -> None:
        import torch

        try:
            mine = ".{:05d}-of-{:05d}".format(*self.slice_of) if self.slice_of else ""
            write_atomically(self.folder / f"state-{step:09d}{mine}.pt", lambda stream: torch.save(state, stream))
            self._prune()
            self.took = time.monotonic() - began
        except BaseException as error:  # raised where the training is
            self._error = error

    def _prune(self) -> None:
        """Drop what is neither among the last nor a milestone."""
        seen = {0}
        for files in self._states()[: -self.keep]:
            stretch = min(self.step_of(files[0]) * self.milestones // max(1, self.total), self.milestones - 1)
            for file in files if stretch in seen else ():
                file.unlink(missing_ok=True)
            seen.add(stretch)

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

    def steps(self) -> list[int]:
        """Steps of the states there are, ascending."""
        return [self.step_of(files[0]) for files in self._states()]

    def newest(self) -> str:
        """The newest state, as text for a message."""
        found = self._states()
        return f"the last good state is of step {self.step_of(found[-1][0])}, {found[-1][0]}" if found else "no state was saved before"

    def _failure(self, what: str) -> JobFailed:
        return JobFailed(f"{what} in {self.folder}: make room, then run with --retry; {self.newest()}")

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest readable file, or None."""
        import torch

        for files in reversed(self._states()):
            try:
                parts = [torch.load(path, map_location="cpu", weights_only=True, mmap=len(files) > 1) for path in files]
                return self.step_of(files[0]), joined(parts) if len(parts) > 1 else parts[0]
            except Exception as error:
                if isinstance(error, (MemoryError, OSError)) and not isinstance(error, FileNotFoundError):  # the file may be whole
                    raise JobFailed(f"{files[0]}: cannot be read ({type(error).__name__}: {error}): mend that, then run with --retry") from error
                warnings.warn(f"checkpoint {files[0].name} is damaged ({type(error).__name__}); going back to the one before", stacklevel=2)
        return None
