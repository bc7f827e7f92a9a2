"""The launcher `debug`: one job after the other in the process of the command."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.jobs import Node
from harness.launch import room, write_job
from harness.ranks import BUSY
from harness.run import start, stop_on_signal
from harness.store import State, Store


@dataclass
class Debug:
    """One after the other in this process: breakpoints work (with HARNESS_PROCESSES they do not), and tracebacks are in the job's log."""

    def launch(self, nodes: Sequence[Node], store: Store, show: Callable[[Mapping[str, Any]], None]) -> int:
        """See `harness.launch.Launcher`."""
        status: dict[str, str] = {}
        os.environ.setdefault("HARNESS_THREADS", str(room()[1]))  # as many as under `local`: the number of threads can change the last bits
        with stop_on_signal() as asked:
            for node in nodes:
                state: State = store.state(store.folder(node))
                if state.status in ("done", "failed"):
                    status[node.key] = state.status
                    continue
                if any(status[p.key] != "done" for p in node.parents.values()):
                    status[node.key] = "blocked"
                    continue
                status[node.key] = "running"
                show(status)
                while (code := start(write_job(node, store), asked)) == BUSY and not asked():
                    time.sleep(1.0)
                status[node.key] = store.state(store.folder(node)).status
                if code == 130 or asked():
                    return 130
        show(status)
        return 0
