"""A cluster profile: a typing error in it costs a line on the terminal, not a night in the queue."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from harness import cli
from harness.spec import UserError
from slurm.profile import default_precision, read_profile, seconds

ROOT = Path(__file__).resolve().parents[2]


def profile(folder: Path, text: str):
    """The profile of a TOML text."""
    (folder / "c.toml").write_text(text)
    return read_profile(folder / "c.toml")


def test_nodes_tables_change_what_they_name(tmp_path: Path) -> None:
    found = profile(tmp_path, """
cpus = 4
mem_per_cpu = "2G"
environment = { A = "1", B = "1" }
[nodes."evaluate-*"]
time = "60"
[nodes."evaluate-coco*"]
mem = "64G"
environment = { B = "2" }
""")
    assert found.of("pretrain-mae-0123") == found.resources
    assert found.of("evaluate-linear-mae-0123").time == "60" and found.of("evaluate-linear-mae-0123").mem_per_cpu == "2G"
    coco = found.of("evaluate-coco-mae-0123")
    assert (coco.time, coco.mem, coco.mem_per_cpu, coco.cpus) == ("60", "64G", "", 4)
    assert dict(coco.environment) == {"A": "1", "B": "2"}


@pytest.mark.parametrize(("text", "message"), [
    ('partitoin = "gpu"', "unknown key 'partitoin': did you mean partition? valid: account,"),
    ('[nodes."evaluate-*"]\nmax_array = 3', "unknown key 'max_array'"),
    ('cpus = "4"', "cpus = '4': expected a whole number"),
    ("cpus = true", "expected a whole number"),
    ('setup = "module load cuda"', "setup = 'module load cuda': expected a list of texts"),
    ("environment = { A = 1 }", "expected a table of texts"),
    ('precision = "fp16"', "expected 'fp32' or 'bf16'"),
    ('time = "12h"', "time = '12h'"),
    ('time = "2"', "a minute more than signal_s (120 s)"),
    ('mem = "64 GB"', "as in \"64G\""),
    ('mem = "64G"\nmem_per_cpu = "2G"', "mem and mem_per_cpu: give one of them"),
    ("gpus = 8", "cpus = 1: they are shared by the 8 processes of a machine"),
    ('gpus = 8\ncpus = 8\n[nodes."evaluate-*"]\nprocesses = 4', "a process has a GPU of its own, and there are 8"),
    ("machines = 0", "1 or more"),
    ('gres = "gpu:h100:1"', "write {gpus} where the number goes"),
    ("nodes = 2", "expected tables"),
    ("cpus = ", "no TOML"),
    ('environment = { HARNESS_MICRO_BATCH = "x" }', "environment: HARNESS_MICRO_BATCH=x: expected a whole number, 1 or more"),
    ('environment = { HARNESS_CHECKPOINTS = "9" }', "environment: unknown variable HARNESS_CHECKPOINTS: did you mean HARNESS_CHECKPOINT_S? "),
    ('environment = { HARNESS_RANK = "0" }', "environment: unknown variable HARNESS_RANK"),
    ('environment = { HARNESS_GEMM = "fast" }', "environment: HARNESS_GEMM=fast: expected highest or medium"),
    ('environment = { HARNESS_LOGGERS = "cvs" }', "environment: HARNESS_LOGGERS: "),
    ('[nodes."evaluate-*"]\nenvironment = { HARNESS_WORKERS = "-1" }', '[nodes."evaluate-*"]: environment: HARNESS_WORKERS=-1: expected a whole number, 0'),
])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        profile(tmp_path, text)
    assert message in str(caught.value) and str(caught.value).startswith(f"--cluster {tmp_path / 'c.toml'}: ")


@pytest.mark.parametrize(("text", "value"), [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-12", 129600), ("1-12:30", 131400), ("2-0:0:5", 172805)])
def test_times_as_sbatch_reads_them(text: str, value: int) -> None:
    assert seconds(text) == value


def test_a_missing_file_points_to_the_examples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.toml: cannot be read .*slurm/profiles/"):
        read_profile(tmp_path / "none.toml")


def test_the_examples_are_good() -> None:
    found = {path.name: read_profile(path) for path in (ROOT / "slurm" / "profiles").glob("*.toml")}
    assert found["gpu.toml"].of("evaluate-coco@vitdet-mae-01").mem == "192G"
    assert default_precision(found["gpu.toml"]) == "bf16" and default_precision(found["cpu.toml"]) is None


def test_folders_that_nodes_cannot_see_are_refused(tmp_path: Path) -> None:
    found = profile(tmp_path, f'shared = ["{tmp_path / "shared"}"]')
    found.check_shared("--runs", tmp_path / "shared" / "runs")
    with pytest.raises(UserError, match=r"--runs .*: not below a folder that all nodes see"):
        found.check_shared("--runs", tmp_path / "shared-not" / "runs")


def test_the_lines_of_the_sweep_are_understood(tmp_path: Path) -> None:
    """Each `python -m harness` of slurm/sweep.sh, the commented ones too, is parsed as the command line that it becomes."""
    text = (ROOT / "slurm" / "sweep.sh").read_text().replace("#   python", "python")
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$0.said"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CLUSTER": "c.toml", "RUNS": str(tmp_path), "DATA": "data"}
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=False)
    lines = [line.split() for line in (tmp_path / "python.said").read_text().splitlines()]
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 7)
    parsed = [cli.parser().parse_args(line[2:]) for line in lines]
    assert [p.command for p in parsed] == ["doctor", "run", "run", "status", "run", "table", "cancel"] and parsed[0].drill and parsed[2].launcher == "slurm"
