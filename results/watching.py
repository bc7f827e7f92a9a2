"""What `harness status` says of all jobs of a runs folder, once or again and again (`--watch`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

from harness.spec import UserError
from harness.store import State, Store, read_json
from results.ancestry import Archive

LOOK_EVERY_S, LINE_EVERY_S = 2.0, 15.0


def overview(store: Store, away: Mapping[str, State]) -> list[tuple[str, str]]:
    """State of each job and its line. `away`: what launchers know of jobs elsewhere."""
    lines, archive = [], Archive((store.root,))
    for folder in archive.folders():
        try:
            record, job, state = archive.read(folder), archive.job(folder), archive.state(folder, away)
        except UserError as error:
            lines.append(("damaged", f"{'damaged':12} {folder.name}: {error}"))
            continue
        about = job.get("about", {})
        p = read_json(folder / "progress.json") if state.status == "running" else None
        detail = ", ".join(f"{k} {v:.4g}" for k, v in record["metrics"].items()) if record else state.reason
        if p:
            detail = f"step {p['step']}/{p['steps']}, {p['images_per_s']:.0f} images/s, {p['seconds_left'] or 0:.0f} s left, {state.reason}"
        title = f"{about.get('title', job['name'])} seed {about.get('seed')}"
        lines.append((state.status, f"{state.status:12} {job['key']} {title}{': ' + detail if detail else ''}"))
    return lines


def watch(look: Callable[[], Sequence[tuple[str, str]]]) -> int:
    """Lines of `overview` on stdout until nothing runs or waits elsewhere, twice in a row (between two jobs there may be none), or Ctrl-C.

    On a terminal they are redrawn; in a log a line comes again when its job is in another state, those that run every 15 seconds. Returns 0, also on Ctrl-C:
    there is nothing here that could be interrupted, what runs goes on.
    """
    seen: dict[str, str] = {}
    idle, last = 0, -LINE_EVERY_S
    try:
        while idle < 2:
            found = look()
            if sys.stdout.isatty():
                print("\033[H\033[J" + "\n".join(line for _, line in found), flush=True)
            else:
                again = time.monotonic() - last >= LINE_EVERY_S
                last = time.monotonic() if again else last
                new = [line for state, line in found if seen.get(line.split()[1]) != state or (again and state == "running")]
                print(*new, sep="\n", end="\n" if new else "", flush=True)
                seen = {line.split()[1]: state for state, line in found}
            idle = 0 if any(state in ("running", "pending") for state, _ in found) else idle + 1
            time.sleep(LOOK_EVERY_S if idle < 2 else 0.0)
    except KeyboardInterrupt:
        print()
    return 0
