"""`make bench-gpu`, which needs a GPU, as far as it goes on a CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module benchmarks/gpu.py; torch's settings put back."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "HARNESS_COMPILE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HARNESS_GEMM", "highest")
    threads = torch.get_num_threads()
    import gpu

    yield gpu
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    for name in ("gpu", "step", "report"):
        del sys.modules[name]


def test_mfu_counts_the_published_models(gpu: Any) -> None:
    """The table of performance.md, in GF for an image; MFU would otherwise be of another model."""
    want = {"mae-base": 58.46, "mae-large": 124.23, "mae-large-decoder-1": 96.53, "mae-large-masks": 401.75, "beit-base": 160.10}
    assert {name: round(gpu.train_flops(case) / 1e9, 2) for name, case in gpu.cases(False).items()} == want


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracer looks at it, and hides the warning itself
def test_it_runs_to_its_end(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has a GPU for half an hour must not find a typing error."""
    assert gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--backend", "eager", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("gpu-cpu-*.json")
    found = json.loads(file.read_text())
    assert sys.modules["report"].faults(file.stem, found) == []
    assert set(found["held"].values()) == {True} and all(row["value"] > 0 for row in found["rows"]) and "R13" in capsys.readouterr().out
    assert sum(row.get("mfu_percent", 0) > 0 for row in found["rows"]) == 2 * len(gpu.cases(True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, before anything is measured."""
    assert gpu.main([]) == 2 and "no GPU here" in capsys.readouterr().err
