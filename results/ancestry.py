"""From a score to the folders that it was built from: the evaluation, its pre-training, what trained before it, the tokenizer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.collect import Result
from harness.jobs import read_job
from harness.spec import UserError
from harness.store import State, Store, read_record
from results.kept import read_kept


@dataclass(frozen=True)
class Step:
    """A node that a score went through. `role`: evaluation, checkpoint, parent, tokenizer, ...; `record` is None where its folder or record is gone."""

    role: str
    key: str
    folder: Path | None
    record: Mapping[str, Any] | None

    @property
    def kind(self) -> str:
        """evaluate, pretrain or asset. A checkpoint may be an evaluation's: ImageNet-A scores the model that ImageNet fine-tuned."""
        return str(self.record["kind"]) if self.record else self.folder.name.partition("-")[0] if self.folder else ""

    @property
    def foreign(self) -> bool:
        """Whether it only loads weights that somebody else trained: their images, labels and cost are not known."""
        return "weights" in (self.identity.get("files") or {})

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decided its key, {} when the record is gone."""
        return self.record["identity"] if self.record else {}


@dataclass
class Archive:
    """The nodes of runs folders, or of folders with kept records (`results.kept`), by key; of copies of a node the first that has a record counts.

    Each file is read once. `kept` are the results of kept records; files beside those records are not there. `unread`: why a record could not be read.
    """

    roots: tuple[Path, ...]
    kept: list[Result] = field(default_factory=list, repr=False)
    unread: dict[str, str] = field(default_factory=dict, repr=False)
    _folders: dict[str, list[Path]] = field(default_factory=dict, repr=False)
    _chosen: dict[str, Path | None] = field(default_factory=dict, repr=False)
    _jobs: dict[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    _records: dict[str, Mapping[str, Any] | None] = field(default_factory=dict, repr=False)
    _unfinished: dict[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for root in self.roots:
            found = read_kept(root)
            folders = [root / name for name in (*found.records, *found.jobs)] if found else Store(root).folders()
            for folder in folders:
                self._folders.setdefault(folder.name.rsplit("-", 1)[-1], []).append(folder)
            if found:
                self.kept += found.results
                self._records |= {str(folder): found.records.get(folder.name) for folder in folders}
                self._unfinished |= {str(root / name): job for name, job in found.jobs.items()}

    def folder(self, key: str) -> Path | None:
        """A node's folder, the one with a record first."""
        if key not in self._chosen:
            found = self._folders.get(key, [])
            self._chosen[key] = next((f for f in found if self.record(f) is not None), found[0] if found else None)
        return self._chosen[key]

    def read(self, folder: Path) -> Mapping[str, Any] | None:
        """The record of a folder, None where there is none. Raises UserError when it cannot be read."""
        if (place := str(folder)) not in self._records:  # paths are slow keys, and this is asked eight times a record
            self._records[place] = read_record(folder)
        return self._records[place]

    def folders(self) -> list[Path]:
        """Folders of all nodes, sorted by name; those of kept records are not there."""
        return sorted((folder for found in self._folders.values() for folder in found), key=lambda folder: folder.name)

    def has(self, folder: Path) -> bool:
        """Whether it is the folder of a node."""
        return folder in self._folders.get(folder.name.rsplit("-", 1)[-1], ())

    def job(self, folder: Path) -> Mapping[str, Any]:
        """What job.json says of a node, or its record, which says the same. Raises UserError when neither can be read."""
        return self.record(folder) or self._unfinished.get(str(folder)) or read_job(folder / "job.json")

    def state(self, folder: Path, away: Mapping[str, State]) -> State:
        """State of a node; of kept ones without a record as their cells have it. `away`: what launchers know of nodes elsewhere. Raises UserError."""
        if self.read(folder) is not None:
            return State("done")
        if str(folder) not in self._unfinished:
            return Store(folder.parent).explain(folder, away)
        key = self._unfinished[str(folder)]["key"]
        return next((State(r.status, r.reason) for r in self.kept if r.key == key), State("missing", "no record was kept"))

    def record(self, folder: Path | None) -> Mapping[str, Any] | None:
        """The record of a folder, None where there is none that can be read."""
        try:
            return None if folder is None else self.read(folder)
        except UserError as error:
            self.unread[str(folder)] = str(error)
            return None

    def tell(self) -> None:
        """Say on stderr which records could not be read: what stands on them is there, and what they would say of it is not known."""
        for line in self.unread.values():
            print(f"harness: {line}", file=sys.stderr)

    def jobs(self) -> Mapping[str, Mapping[str, Any]]:
        """Key -> what job.json says of each node that can be read, or its record, which says the same."""
        for key, folders in self._folders.items() if not self._jobs else ():
            with contextlib.suppress(UserError):
                self._jobs[key] = self.job(self.folder(key) or folders[0])
        return self._jobs

    def steps(self, result: Result) -> tuple[Step, ...]:
        """All nodes behind a score, the evaluation first, each once."""
        found: dict[str, Step] = {}

        def visit(role: str, key: str) -> None:
            if key not in found:
                folder = self.folder(key)
                step = found[key] = Step(role, key, folder, self.record(folder))
                for name, parent in ((step.record or {}).get("parents") or {}).items():
                    visit(name, parent["key"])

        if result.key:
            visit("evaluation", result.key)
        return tuple(found.values())
