"""Which numbers may no longer come out: what has changed since their records (evaluator, libraries, data)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness import plugins
from harness.collect import Result
from harness.jobs import read_job
from harness.layout import fingerprint
from harness.provenance import versions
from harness.spec import UserError
from results.ancestry import Archive, Step
from results.cells import Sheet

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"


def pinned() -> dict[str, str]:
    """Versions that requirements.lock pins, the same on every machine; where there is no such file, those that are installed."""
    try:
        lines = LOCK.read_text().splitlines()
    except OSError:
        return versions()
    return {name: version.partition(";")[0].strip() for name, _, version in (line.partition("==") for line in lines) if version}


@dataclass
class Staleness:
    """Compares records with what is installed (or pinned), and on `data` with the data sets as they lie on disk (which takes a walk through their folders)."""

    archive: Archive
    data: bool = False
    installed: Mapping[str, str] = field(default_factory=versions)
    _updated: dict[frozenset[tuple[str, str]], list[str]] = field(default_factory=dict, repr=False)
    _now: dict[tuple[Path, str, str | None], str | None] = field(default_factory=dict, repr=False)

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
        packages = frozenset(((step.record or {}).get("packages") or {}).items())
        if packages not in self._updated:
            then, now = ({name: v.partition("+")[0] for name, v in them} for them in (packages, self.installed.items()))
            names = sorted(name for name in then if name != "python" and name in now and now[name] != then[name])
            self._updated[packages] = [f"{name} was {then[name]}, is {now[name]}" for name in names]
        return self._updated[packages]

    def sets(self, step: Step) -> list[str]:
        """Data sets with another fingerprint now: of other files, or taken by another version of the harness."""
        if not self.data or step.folder is None:
            return []
        found = []
        for name, then in (step.identity.get("data") or {}).items():
            place = (step.folder.parent, name, then)
            if place not in self._now:  # of ten thousand jobs that read the same set, one is asked where it lies
                self._now[place] = self.fingerprint_now(step.folder / "job.json", name)
            now = self._now[place]
            found += [f"data {name} was {then[:6]}, is {now[:6]}"] if now is not None and then is not None and now != then else []
        return found

    @staticmethod
    def fingerprint_now(job: Path, name: str) -> str | None:
        """The fingerprint of a job's data set as it lies there now. One that is not where it was cannot be asked."""
        with contextlib.suppress(UserError, OSError):
            folders: Mapping[str, str] = (read_job(job).get("where") or {}).get("folders") or {}
            place = next((Path(folder) for full, folder in folders.items() if full.partition(":")[0] == name), None)
            return fingerprint(name, place) if place is not None and place.is_dir() else None
        return None


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
