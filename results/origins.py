"""Where numbers came from, in words for the report: what made a node, the command line that makes a row again, the environments of records."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.ancestry import Step
from results.cells import Sheet
from results.costs import hours
from results.kept import NAME

if TYPE_CHECKING:
    from markupsafe import Markup

SETTING = re.compile(r"[\w@:+-]+(\.\w+)+=\S+")  # a deviation that --set made; a plugin's own notes are sentences


def made(step: Step) -> str:
    """When, from which commit and on what a node was made."""
    if step.record is None:
        return ""
    git, hardware = step.record.get("git") or {}, step.record.get("hardware") or {}
    commit = f"commit {str(git['commit'])[:10]}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else "commit not known"
    when = str(step.record.get("end"))[:16].replace("T", " ")
    return f"{when}, {commit}, {hardware.get('device', 'device not known')}, {hours(step.record.get('device_hours'))} h"


def whereabouts(step: Step, base: Path, kept: str = "") -> Markup:
    """Where a node's record, log and checkpoint are, as HTML, when its folder is not there: what a page in `base` can link to are the kept records alone.

    `kept`: the link to these, where it is not simply the way from `base`.
    """
    from urllib.parse import quote

    from markupsafe import Markup

    if step.folder is None or not (path := step.folder.with_name(NAME)).is_file():
        return Markup("its folder is not here")
    record = Markup('config, parents, commit and environment in <a href="{}">{}</a>').format(kept or quote(os.path.relpath(path.resolve(), base)), NAME)
    return record + Markup("; log and checkpoint in <code>{}</code> of the runs folder it was made in").format(step.folder.name)


def device(step: Step) -> str:
    """What a node ran on: the name of its GPU, or of its processor; "" where that is not known."""
    hardware = (step.record or {}).get("hardware") or {}
    return str((hardware.get("cpu") if hardware.get("device") == "cpu" else hardware.get("device")) or "")


def commands(sheet: Sheet) -> list[str]:
    """The command line that makes each row, with what deviates from its recipes."""
    lines = []
    for method in sheet.methods:
        cells = [c for c in sheet.cells.values() if c.method == method and c.results]
        if not cells:
            continue
        evals = dict.fromkeys(c.eval for c in cells)
        seeds, eval_seeds = (sorted({getattr(r, k) for c in cells for r in c.results}) for k in ("seed", "eval_seed"))
        words = ["--methods", method, "--evals", ",".join(evals), "--protocol", sheet.protocol, "--backbone", sheet.backbone, "--tuning", sheet.tuning,
                 "--seeds", ",".join(map(str, seeds))]
        words += ["--eval-seeds", ",".join(map(str, eval_seeds))] if eval_seeds != [0] else []
        words += [] if sheet.data == "generated data" else ["--data", "DATA"]
        words += ["--pretrain-data", "IMAGES"] if ", pre-trained on " in sheet.data else []
        for setting in dict.fromkeys(found[0] for c in cells for d in c.deviations if (found := SETTING.match(d))):
            words += ["--set", setting]
        lines.append("python -m harness run " + " ".join(map(shlex.quote, words)))
    return lines


def environment_of(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """Versions and hardware with the number of records that have each."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in records:
        hardware, git = record.get("hardware") or {}, record.get("git") or {}
        counts[("commit", f"{git.get('commit') or 'not known'}{' with changes' if git.get('dirty') else ''}")] += 1
        counts[("device", f"{hardware.get('device')}, {hardware.get('cpu')}, {hardware.get('cores')} cores, {hardware.get('threads')} threads")] += 1
        counts[("precision", str(record.get("precision")))] += 1
        counts.update((name, version) for name, version in (record.get("packages") or {}).items())
    return [(name, value, count) for (name, value), count in sorted(counts.items())]
