"""Where a number comes from: versions, commit, machine, time used. The parts of record.json besides the metrics, and the machine made ready for a job."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import math
import os
import platform
import resource
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.canonical import digest
from harness.ranks import number_from, own_rank
from harness.spec import UserError
from harness.store import RECORD_SCHEMA, read_json, read_record, write_json

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "opencv-python-headless",
            "mmengine", "mmcv-lite", "mmdet", "mmsegmentation", "pycocotools", "faster-coco-eval")
MODES = ("highest", "medium")  # torch's names: products by MKL; by oneDNN, which may use bf16 (HARNESS_GEMM)
LARGEST_ERROR = 1e-6  # of oneDNN's products, relative; fp32 has 4e-7, the bf16 of processors with AMX 3e-3 (performance.md, item 4)


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


def set_up(folder: Path) -> dict[str, Any]:
    """Set threads, GEMM mode and kernels: those of the job's first start, so that the numbers stay the same. Import torch after this."""
    chosen = read_json(folder / "machine.json")
    before = chosen if isinstance(chosen, dict) else {"threads": number_from("HARNESS_THREADS", default=1)}
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a busy core beside us would otherwise cost a factor of six (performance.md, item 5)
    os.environ["OMP_NUM_THREADS"] = str(before["threads"])
    import torch

    torch.set_num_threads(before["threads"])
    keep_freed_memory()
    measured = not os.environ.get("HARNESS_GEMM")
    chosen = before if "gemm" in before else {**before, "gemm": gemm_mode(), "measured": measured, "compile": os.environ.get("HARNESS_COMPILE", "")}
    if chosen is not before and own_rank() == 0:
        write_json(folder / "machine.json", chosen)
    gpu = torch.cuda.is_available() and not os.environ.get("HARNESS_CPU")
    if chosen["gemm"] == "medium" and chosen.get("measured") and (gpu or calibrated()["error"]["medium"] >= LARGEST_ERROR):
        chosen = {**chosen, "gemm": "highest"}  # begun where oneDNN's products are fp32: here they are not
    os.environ["HARNESS_COMPILE"] = chosen.get("compile", "")
    torch.set_float32_matmul_precision(chosen["gemm"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  # untyped; a search for errors that takes 2 to 7 % of a step
    torch.backends.cudnn.allow_tf32 = False  # as products: what a record calls fp32 is that
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has given NaN (pytorch#196678)
    return chosen


def keep_freed_memory(trim: int = -1) -> None:
    """Have the process keep what it has freed: once more than `trim` bytes lie free at the end of its heap, glibc gives all of that back; -1: never.

    By its own rule, 64 MB at most, the end of a step gives them back, and the next one gets every page anew: a tenth of a small ViT's step. Nothing happens
    with another C library, and where the user has set glibc's variables; what one step needs at most stays what it was.
    """
    if any(os.environ.get(name) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: from here on an allocation is mapped by itself; glibc takes no more, and comes to it by itself
        mallopt(-1, trim)  # M_TRIM_THRESHOLD


def gemm_mode() -> str:
    """HARNESS_GEMM, or the measured mode on a processor; on a GPU "highest": the other would be TF32 there. Raises UserError."""
    import torch

    if (asked := os.environ.get("HARNESS_GEMM", "")) not in ("", *MODES):
        raise UserError(f"HARNESS_GEMM={asked}: expected {' or '.join(MODES)}")
    return asked or ("highest" if torch.cuda.is_available() and not os.environ.get("HARNESS_CPU") else str(calibrated()["mode"]))


def calibrated() -> dict[str, Any]:
    """The better mode for fp32 products on this processor, with GFLOP/s and relative error of both; measured once, then read from the user's cache folder."""
    import platformdirs
    import torch

    path = Path(platformdirs.user_cache_dir("vision-harness")) / "gemm" / f"{digest([platform.node(), processor(), torch.__version__])}.json"
    if isinstance(found := read_json(path), dict):
        return found
    before, threads, random = torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    a, b = torch.randn(384, 768, generator=random), torch.randn(768, 1536, generator=random)
    exact, seconds, error = a.double() @ b.double(), dict.fromkeys(MODES, math.inf), {}
    for _ in range(9):
        for mode in MODES:
            torch.set_float32_matmul_precision(mode)
            start = time.process_time()
            product = a @ b
            seconds[mode] = min(seconds[mode], time.process_time() - start)
            error[mode] = float((product - exact).norm() / exact.norm())
    torch.set_float32_matmul_precision(before)
    torch.set_num_threads(threads)
    better = error["medium"] < LARGEST_ERROR and seconds["medium"] < 0.95 * seconds["highest"]
    gflops = {mode: round(2e-9 * a.numel() * b.shape[1] / s, 1) for mode, s in seconds.items()}
    found = {"mode": MODES[better], "gflops": gflops, "error": error}
    with contextlib.suppress(OSError):  # a folder that cannot be written: measured again next time
        write_json(path, found)
    return found


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
    above = [record for parent in job["parents"].values() if (record := read_record(session.dir.parent / parent["folder"])) is not None]
    return {
        "schema": RECORD_SCHEMA, "kind": job["kind"], "name": job["name"], "key": job["key"], "identity": job["identity"], "about": job["about"],
        "parents": job["parents"], "metrics": parts["metrics"], "outcomes": parts["outcomes"], "seed": job["identity"]["seed"],
        "plugin_version": job["identity"]["version"], "git": git_state(), "packages": versions(),
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else "cpu", "cpu": processor(), "cores": os.cpu_count() or 1, **machine,
            "processes": usage.processes,
        },
        "precision": "bf16" if session.dtype == torch.bfloat16 else "fp32", "start": usage.before["start"],
        "end": datetime.datetime.now(datetime.UTC).isoformat(), "wall_s": round(seconds, 3), "device_hours": usage.device_seconds() / 3600,
        "images_seen": facts.get("images_seen"), "flops": facts.get("flops"),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "deviations": list(job["about"].get("deviations", ())),
        "deviations_found": [*([f"{len(session.skipped_images)} unreadable images skipped"] if session.skipped_images else []), *facts.get("deviations", ()),
                             *(f"{record['name']}: {found}" for record in above for found in record.get("deviations_found", ()))],
        "facts": facts,
    }
