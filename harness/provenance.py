"""Where a number comes from: versions, commit, machine, time used. The parts of record.json besides the metrics."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import resource
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.store import RECORD_SCHEMA, read_json, write_json

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "opencv-python-headless",
            "mmengine", "mmcv-lite", "mmdet", "mmsegmentation", "pycocotools", "faster-coco-eval")


def versions() -> dict[str, str]:
    """Versions of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_state() -> dict[str, Any]:
    """Commit of the harness's own checkout and whether it has changes; nulls outside git. In a copy made for a cluster: what was noted when it was made."""
    import subprocess

    here = Path(__file__).resolve().parent
    if isinstance(taken := read_json(here.parents[1] / "snapshot.json"), dict):
        return dict(taken["git"])

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    with contextlib.suppress(OSError):
        commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
        return {"commit": commit, "dirty": None if status is None else bool(status)}
    return {"commit": None, "dirty": None}


def processor() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Usage:
    """Seconds that a job has used, over all its starts: usage.json, brought up to date with every report, by rank 0 of several processes."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path, self.started, self.rank, self.processes = folder / "usage.json", time.monotonic(), rank, 1
        before = read_json(self.path)
        if not isinstance(before, dict) or not {"seconds", "start"} <= set(before):
            before = {"seconds": 0.0, "start": datetime.datetime.now(datetime.UTC).isoformat()}
        self.before = before

    def seconds(self) -> float:
        """Seconds so far."""
        return float(str(self.before["seconds"])) + time.monotonic() - self.started

    def device_seconds(self) -> float:
        """Seconds so far, times the processes that each start had."""
        return float(str(self.before.get("device_seconds", self.before["seconds"]))) + (time.monotonic() - self.started) * self.processes

    def save(self) -> None:
        """Write usage.json."""
        if self.rank == 0:
            seconds = {"seconds": round(self.seconds(), 3), "device_seconds": round(self.device_seconds(), 3)}
            write_json(self.path, {**seconds, "start": self.before["start"]})


def make_record(job: dict[str, Any], session: Any, machine: dict[str, Any], usage: Usage, parts: dict[str, Any]) -> dict[str, Any]:
    """record.json (see record.schema.json)."""
    import torch

    cuda = session.device.type == "cuda"
    facts = parts["facts"]
    seconds = usage.seconds()
    return {
        "schema": RECORD_SCHEMA, "kind": job["kind"], "name": job["name"], "key": job["key"], "identity": job["identity"], "about": job["about"],
        "parents": job["parents"], "metrics": parts["metrics"], "outcomes": parts["outcomes"], "seed": job["identity"]["seed"],
        "plugin_version": job["identity"]["version"], "git": git_state(), "packages": versions(),
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else "cpu", "cpu": processor(), "cores": os.cpu_count() or 1, "threads": machine["threads"],
            "gemm": machine["gemm"], "processes": usage.processes,
        },
        "precision": "bf16" if session.dtype == torch.bfloat16 else "fp32", "start": usage.before["start"],
        "end": datetime.datetime.now(datetime.UTC).isoformat(), "wall_s": round(seconds, 3), "device_hours": usage.device_seconds() / 3600,
        "images_seen": facts.get("images_seen"), "flops": facts.get("flops"),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "deviations": list(job["about"].get("deviations", ())),
        "deviations_found": [*([f"{len(session.skipped_images)} unreadable images skipped"] if session.skipped_images else []), *facts.get("deviations", ())],
        "facts": facts,
    }
