"""Which GEMMs a job uses: measured once on a machine, the same over a job's starts, and never at the cost of precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest
import torch

from harness import provenance
from harness.provenance import MODES, calibrated, gemm_mode, set_up
from harness.ranks import join
from harness.spec import UserError
from harness.store import read_json, write_json
from harness.vit import ViT, ViTConfig, choose_attention


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
    assert set_up(tmp_path) == read_json(tmp_path / "machine.json") == {"threads": 1, "gemm": "medium", "measured": False, "compile": ""}
    monkeypatch.setenv("HARNESS_GEMM", "fast")
    with pytest.raises(UserError, match="HARNESS_GEMM=fast: expected highest or medium"):
        gemm_mode()


def test_a_job_that_goes_on_elsewhere_stays_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that is fp32 on AMD is bf16 on processors with AMX and TF32 on a GPU: its record would not say so. What the user asked for is kept."""
    monkeypatch.setenv("HARNESS_CPU", "1")
    found = calibrated()
    for error, measured, used in ((1e-7, True, "medium"), (3e-3, True, "highest"), (3e-3, False, "medium")):
        write_json(tmp_path / "machine.json", {"threads": 1, "gemm": "medium", "measured": measured, "compile": ""})
        monkeypatch.setattr(provenance, "calibrated", lambda error=error: {**found, "error": {"medium": error}})
        assert set_up(tmp_path)["gemm"] == used == torch.get_float32_matmul_precision()
    write_json(tmp_path / "machine.json", {"threads": 1, "gemm": "medium", "measured": True, "compile": ""})
    monkeypatch.setenv("HARNESS_CPU", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set_up(tmp_path)["gemm"] == "highest" and read_json(tmp_path / "machine.json")["gemm"] == "medium"  # type: ignore[index]


def test_processes_of_a_job_compute_as_the_first_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a new machine all of them measure at once; two modes in one job would round otherwise at its next start, where all read the first one's."""
    for name, value in (("HARNESS_RANK", "1"), ("HARNESS_WORLD", "2"), ("HARNESS_MEETING", "127.0.0.1:1"), ("HARNESS_CPU", "1")):
        monkeypatch.setenv(name, value)
    for name in ("TCPStore", "init_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *words, **more: None)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda told: told.__setitem__(0, {**told[0], "gemm": "medium"}))
    assert join({"threads": 1, "gemm": "highest"})["gemm"] == "medium" == torch.get_float32_matmul_precision()


@pytest.mark.parametrize(("mode", "fused"), [("highest", True), ("medium", False)])
def test_onednn_products_come_with_explicit_attention(mode: str, fused: bool) -> None:
    """The fused kernel makes many small products, on which oneDNN is so slow that the step would be slower than before."""
    vit = ViT(ViTConfig(size=(16, 16), patch=8, width=8, depth=1, heads=2))
    vit.blocks[0].attn.fused_attn = True
    torch.set_float32_matmul_precision(mode)
    choose_attention(vit, torch.device("cpu"), torch.float32)
    assert vit.blocks[0].attn.fused_attn is fused
