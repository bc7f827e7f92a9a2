"""Which numbers may no longer come out: what has changed since their records (evaluator, libraries, data)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import plugins
from harness.collect import Result
from harness.jobs import read_job
from harness.layout import fingerprint
from harness.provenance import versions
from harness.spec import UserError
from results.ancestry import Archive, Step
from results.cells import Sheet


@dataclass
class Staleness:
    """Compares records with what is installed, and on `data` with the data sets as they lie on disk (which takes a walk through their folders)."""

    archive: Archive
    data: bool = False
    installed: Mapping[str, str] = field(default_factory=versions)
    _prints: dict[tuple[str, str], str | None] = field(default_factory=dict, repr=False)

    def reasons(self, result: Result) -> tuple[str, ...]:
        """What has changed since a score was made, in words; () when nothing is known to have."""
        found = [text for step in self.archive.steps(result) if step.record for text in (*self.libraries(step), *self.sets(step))]
        return tuple(dict.fromkeys([*self.evaluator(result), *found]))

    def evaluator(self, result: Result) -> list[str]:
        """A newer or older evaluator. One that is not installed here cannot be asked."""
        record = self.archive.record(self.archive.folder(result.key)) or {}
        name, then = (record.get("identity") or {}).get("plugin", {}).get("class"), record.get("plugin_version")
        with contextlib.suppress(UserError):
            now = plugins.load("evals", name).version if name else then
            if now != then:
                return [f"{result.eval} was version {then}, is {now}"]
        return []

    def libraries(self, step: Step) -> list[str]:
        """Libraries of another version. A build's suffix (+cpu, +cu130) is hardware, not version."""
        then = {name: v.partition("+")[0] for name, v in ((step.record or {}).get("packages") or {}).items() if name != "python"}
        now = {name: v.partition("+")[0] for name, v in self.installed.items()}
        return [f"{name} was {then[name]}, is {now[name]}" for name in sorted(then) if name in now and now[name] != then[name]]

    def sets(self, step: Step) -> list[str]:
        """Data sets with another fingerprint now: of other files, or taken by another version of the harness. One that is not where it was cannot be asked."""
        if not self.data or step.folder is None:
            return []
        folders: Mapping[str, Any] = {}
        with contextlib.suppress(UserError):
            folders = (read_job(step.folder / "job.json").get("where") or {}).get("folders") or {}
        found = []
        for name, folder in folders.items():
            kind = name.partition(":")[0]
            if (kind, folder) not in self._prints:
                self._prints[kind, folder] = None
                with contextlib.suppress(UserError, OSError):
                    self._prints[kind, folder] = fingerprint(kind, Path(folder)) if Path(folder).is_dir() else None
            now, then = self._prints[kind, folder], (step.identity.get("data") or {}).get(kind)
            found += [f"data {kind} was {then[:6]}, is {now[:6]}"] if now is not None and then is not None and now != then else []
        return found


def with_stale(sheet: Sheet, staleness: Staleness) -> Sheet:
    """A sheet whose cells say what has changed since they were measured."""
    by_result: dict[str, tuple[str, ...]] = {}
    cells = {}
    for key, cell in sheet.cells.items():
        texts: list[str] = []
        for result in cell.results:
            if result.key not in by_result:
                by_result[result.key] = staleness.reasons(result)
            texts += by_result[result.key]
        cells[key] = replace(cell, stale=tuple(dict.fromkeys(texts)))
    return replace(sheet, cells=cells)
