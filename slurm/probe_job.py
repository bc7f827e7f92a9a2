"""What `doctor --cluster` runs on each node: `python -m slurm.probe_job FOLDER` says what it sees there, then all of them add up a tensor together.

Each writes report-<rank>.json into the folder, and prints it too: what is printed comes back through SLURM where the folder is not shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from harness import __version__
from harness.provenance import versions
from harness.store import read_json, write_json

MARK = "probe: "  # in front of a printed report
TIMEOUT_S = 90.0
NUMBERS = 2**20  # float32: 4 MB


def host() -> str:
    """This node's name, as SLURM knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look_at(path: str) -> str:
    """"" when a folder can be read and holds something, else what is wrong with it."""
    try:
        return "" if any(Path(path).iterdir()) else "empty"
    except OSError as error:
        return str(error.strerror).lower()


def look(folder: Path, asked: Mapping[str, Any] | None, rank: int) -> dict[str, Any]:
    """What one node sees. `asked` is what the login node wrote, None where it cannot be read."""
    import torch

    wrong = "" if asked else "cannot be read"
    if asked:
        try:
            write_json(folder / f"report-{rank}.json", {})
        except OSError as error:
            wrong = f"cannot be written ({error.strerror})"
    return {
        "rank": rank, "host": host(), "versions": {"harness": __version__, **versions()}, "wrong": wrong,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "free": shutil.disk_usage(folder).free if folder.is_dir() else 0, "roots": {p: look_at(p) for p in (asked or {}).get("roots", ())},
    }


def all_reduce(folder: Path, rank: int, world: int, cuda: bool) -> dict[str, Any]:
    """Sum 4 MB over all tasks; they meet on a port that was free on the first one's node, which it writes into the folder."""
    import torch
    from torch import distributed

    place, deadline, timeout = folder / f"meeting-{os.environ.get('SLURM_RESTART_COUNT', '0')}.json", time.monotonic() + TIMEOUT_S, timedelta(seconds=TIMEOUT_S)
    if rank == 0:
        store = distributed.TCPStore(host(), 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        write_json(place, {"host": host(), "port": store.port})
    else:
        while (told := read_json(place)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{place} does not appear")
            with contextlib.suppress(OSError):
                list(folder.iterdir())  # a network file system then looks again
            time.sleep(0.2)
        store = distributed.TCPStore(told["host"], told["port"], world, is_master=False, timeout=timeout)
    backend = "nccl" if cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    numbers, seconds = torch.full((NUMBERS,), rank + 1.0, device="cuda" if cuda else "cpu"), 0.0
    for _ in range(2):  # the first one sets up the connections
        began, total = time.monotonic(), numbers.clone()
        distributed.all_reduce(total)
        found = (float(total.min()), float(total.max()))  # waits for the GPU
        seconds = time.monotonic() - began
    distributed.barrier()
    distributed.destroy_process_group()
    return {"backend": backend, "world": world, "right": found == (world * (world + 1) / 2,) * 2, "seconds": seconds}


def main() -> int:
    """One task of the probe."""
    folder, rank, world = Path(sys.argv[1]), int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    asked = read_json(folder / "probe.json")
    report = look(folder, asked, rank)
    print(f"{MARK}{json.dumps(report)}", flush=True)  # already now: what follows may hang
    try:
        if report["wrong"]:
            raise RuntimeError(f"not tried on {report['host']}: the shared folder {report['wrong']}")
        # each task takes the same way: GPUs were asked for, or were not
        report["reduce"] = all_reduce(folder, rank, world, bool(asked and asked["gpus"]))
    except Exception as error:  # whatever stops it is what is looked for
        report["reduce"] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
    print(f"{MARK}{json.dumps(report)}", flush=True)
    with contextlib.suppress(OSError):
        write_json(folder / f"report-{rank}.json", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
