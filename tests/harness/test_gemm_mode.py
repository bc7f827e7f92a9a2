"""Which GEMMs a job uses: measured once on a machine, the same over a job's starts, and never at the cost of precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest
import torch

from harness import provenance
from harness.plugins import Session
from harness.provenance import MODES, calibrated, gemm_mode, set_up
from harness.spec import UserError
from harness.store import read_json, write_json
from harness.train import choose_attention
from harness.vit import ViT, ViTConfig


@pytest.fixture(autouse=True)
def own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own; torch's settings put back."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    for name in ("HARNESS_GEMM", "HARNESS_COMPILE", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    threads = torch.get_num_threads()
    yield tmp_path / "cache" / "gemm"
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True


def test_measured_once_and_read_from_then_on(own_machine: Path) -> None:
    """Two jobs of a table, minutes apart on a noisy machine, must not compute differently."""
    found = calibrated()
    assert found["mode"] in MODES and all(found["gflops"][m] > 0 for m in MODES) and found["error"]["highest"] < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"
    (file,) = own_machine.iterdir()
    write_json(file, {**found, "mode": "medium" if found["mode"] == "highest" else "highest"})
    assert calibrated()["mode"] != found["mode"]


def test_products_in_half_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors with AMX, however fast they are: fp32 in a record must mean fp32."""
    monkeypatch.setattr(provenance, "LARGEST_ERROR", 1e-8)
    assert calibrated()["mode"] == "highest"


def test_a_job_keeps_the_mode_of_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a resumed job would go on to other numbers than one that was never stopped."""
    monkeypatch.setenv("HARNESS_CPU", "1")
    monkeypatch.setenv("HARNESS_GEMM", "medium")
    assert set_up(tmp_path)["gemm"] == "medium" == torch.get_float32_matmul_precision()
    monkeypatch.setenv("HARNESS_GEMM", "highest")
    assert set_up(tmp_path) == read_json(tmp_path / "machine.json") == {"threads": 1, "gemm": "medium", "compile": ""}
    monkeypatch.setenv("HARNESS_GEMM", "fast")
    with pytest.raises(UserError, match="HARNESS_GEMM=fast: expected highest or medium"):
        gemm_mode()


@pytest.mark.parametrize(("mode", "fused"), [("highest", True), ("medium", False)])
def test_onednn_products_come_with_explicit_attention(mode: str, fused: bool, tmp_path: Path) -> None:
    """The fused kernel makes many small products, on which oneDNN is so slow that the step would be slower than before."""
    vit = ViT(ViTConfig(size=(16, 16), patch=8, width=8, depth=1, heads=2))
    vit.blocks[0].attn.fused_attn = True
    torch.set_float32_matmul_precision(mode)
    choose_attention(vit, Session(tmp_path, 0, torch.device("cpu"), torch.float32, {}))
    assert vit.blocks[0].attn.fused_attn is fused
