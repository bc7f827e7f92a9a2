"""How often a score was tried for, and where the choice was made: settings of a method and evaluator found in the runs folders.

A setting is what a user can turn: the fields and recipe of the evaluator, of the pre-training and of what it is built from; seeds, versions and data are not.
Settings scored on a held-out part of train (`holdout`) may be chosen among. Several scored on the reported split are flagged: whichever is shown,
it was, or could have been, selected on test. Records of another version of a plugin (other fields) are no trials of this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from harness.canonical import digest
from results.ancestry import Archive
from results.cells import Sheet


@dataclass
class Trials:
    """Distinct settings of one method and evaluator by the fields that they have: all of them, and those scored on the reported split."""

    tried: dict[str, set[str]] = field(default_factory=dict)
    on_test: dict[str, set[str]] = field(default_factory=dict)
    sweeps: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many there are, or were: a job that a sweep has chosen says how many (`sweeps`), also where the trials are gone."""
        return max([0, *self.sweeps.values(), *map(len, self.tried.values())])

    @property
    def count_on_test(self) -> int:
        """How many were scored on the reported split."""
        return max(map(len, self.on_test.values()), default=0)


def trials_of(sheet: Sheet, archive: Archive, planned: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> dict[tuple[str, str], Trials]:
    """(method, evaluator) -> its trials under the sheet's protocol, backbone, data and tuning. `planned`: jobs by key that are not there yet."""
    jobs = {**archive.jobs(), **planned}
    found: dict[tuple[str, str], Trials] = {}
    known: dict[str, tuple[str, str]] = {}  # seeds share their settings, and 10,000 records have a few hundred
    for job in jobs.values():
        about = job.get("about") or {}
        if job["kind"] != "evaluate" or about.get("tuning", "published") != sheet.tuning or any(
                about.get(k) != getattr(sheet, k) for k in ("protocol", "backbone", "data")):
            continue
        trials, same = found.setdefault((about["method"], about["eval"]), Trials()), about.get("settings") or job["key"]
        if same not in known:
            setting = setting_of(job, jobs)
            known[same] = digest(names_of(setting)), digest(setting)
        fields, value = known[same]
        trials.tried.setdefault(fields, set()).add(value)
        if sweep := about.get("sweep"):
            trials.sweeps[sweep["key"]] = max(sweep["trials"], trials.sweeps.get(sweep["key"], 0))
        record = archive.record(archive.folder(job["key"]))
        if record is not None and not (job["identity"].get("plugin") or {}).get("holdout"):
            trials.on_test.setdefault(fields, set()).add(value)
    return found


def setting_of(job: Mapping[str, Any], jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a user can turn of a job and of those before it."""
    identity = job["identity"]
    plugin = {k: v for k, v in (identity.get("plugin") or {}).items() if k != "holdout"}
    recipe = {k: v for k, v in (identity.get("recipe") or {}).items() if k not in ("sources", "precision")}
    parents = {role: setting_of(jobs[p["key"]], jobs) for role, p in (job.get("parents") or {}).items() if p["key"] in jobs}
    return {"plugin": plugin, "recipe": recipe, "parents": parents}


def names_of(setting: Any) -> Any:
    """The fields of a setting without their values."""
    return {k: names_of(v) for k, v in setting.items()} if isinstance(setting, Mapping) else None


def tried(trials: Mapping[tuple[str, str], Trials], method: str) -> str:
    """A method's trials in words: "1 for each evaluator", or what differs from it and on what it was chosen."""
    counts = {name: t.count for (m, name), t in trials.items() if m == method}
    more = [f"{n} on {name}{chosen_by(trials[method, name])}" for name, n in sorted(counts.items()) if n > 1]
    return (", ".join(more) + (", 1 on the others" if len(more) < len(counts) else "")) if more else "1 for each evaluator" if counts else "none"


def chosen_by(trials: Trials) -> str:
    """On what trials were chosen among, "" where only the counts are known."""
    said = [f"{', '.join(sorted(trials.sweeps))} by a held-out part of train"] if trials.sweeps else []
    said += [f"{trials.count_on_test} on the reported split"] if trials.count_on_test > 1 else []
    return f" ({'; '.join(said)})" if said else ""


def selected_on_train(sheet: Sheet, trials: Mapping[tuple[str, str], Trials]) -> str:
    """The line for under a table about what sweeps have chosen, "" when there were none."""
    shown = {(c.method, c.eval) for c in sheet.cells.values() if c.results}
    several = {names: t.sweeps for names, t in sorted(trials.items()) if names in shown}
    found = [f"{method} on {name} ({key} of {n} values)" for (method, name), sweeps in several.items() for key, n in sweeps.items()]
    return f"Chosen on a held-out part of train: {', '.join(found)}." if found else ""


def selected_on_test(sheet: Sheet, trials: Mapping[tuple[str, str], Trials]) -> str:
    """The line for under a table about what was selected on test, "" when nothing was."""
    shown = {(c.method, c.eval) for c in sheet.cells.values() if c.results}
    several = {names: t.count_on_test for names, t in sorted(trials.items()) if names in shown and t.count_on_test > 1}
    found = [f"{method} on {name} ({n} settings)" for (method, name), n in several.items()]
    return f"Selected on test: several settings were scored on the reported split, one is shown: {', '.join(found)}." if found else ""
