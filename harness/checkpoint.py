"""Files of weights: written whole or not at all, read safely, the one before kept.

A *backbone* file is what a pre-training hands to evaluators: the ViT's weights, its architecture, the mean and std of its
input, and, if it was trained with labels, its classifier. A *training state* is what a stopped job goes on from. torch is imported
where it is used: tables and `--help` come this way too.
"""

from __future__ import annotations

import os
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


class States:
    """The training states of a job: `state-<step>.pt` in a folder, the last two kept, a damaged one skipped with a warning."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, then drop the oldest."""
        import torch

        write_atomically(self.folder / f"state-{step:09d}.pt", lambda stream: torch.save(state, stream))
        for old in self._files()[: -self.keep]:
            old.unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest readable file, or None."""
        import torch

        for path in reversed(self._files()):
            try:
                return int(path.stem.split("-")[1]), torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                warnings.warn(f"checkpoint {path.name} is damaged ({type(error).__name__}); going back to the one before", stacklevel=2)
        return None
