"""`doctor --cluster`: every line that it can say, from a queue that is played and reports as nodes write them."""

from __future__ import annotations

import copy
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_slurm import FakeSlurm

from harness import __version__, cli
from harness.provenance import versions
from slurm import probe
from slurm.probe_job import MARK, look
from slurm.profile import Profile, Resources


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    cluster = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(cluster.folder), prepend=":")
    monkeypatch.setattr(probe, "POLL_S", 0.01)
    return cluster


def doctor(folder: Path, text: str, *words: str) -> int:
    """Exit code of the command line."""
    (folder / "c.toml").write_text(text)
    (folder / "data" / "imagenet").mkdir(parents=True, exist_ok=True)
    return cli.main(["doctor", "--cluster", str(folder / "c.toml"), "--runs", str(folder / "runs"), "--data", str(folder / "data"), *words])


def report(rank: int, **changes: Any) -> dict[str, Any]:
    """What a node says when all is well."""
    return {
        "rank": rank, "host": f"n{rank + 1}", "versions": {"harness": __version__, **versions()}, "wrong": "", "gpus": [], "free": 2**40,
        "roots": {"DIR/imagenet": ""}, "reduce": {"backend": "gloo", "world": 2, "right": True, "seconds": 0.01}, **changes,
    }


def judged(*reports: dict[str, Any], gpus: int = 0, batch: Path = Path("runs/.slurm/probe-1")) -> list[tuple[bool | None, str, str]]:
    return list(probe.judge({r["rank"]: r for r in reports}, 2, Profile("c.toml", Resources(gpus=gpus)), batch))


def test_a_probe_that_does_not_start_is_cancelled_with_the_reason(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(probe, "START_S", 0.0)
    assert doctor(tmp_path, 'partition = "low"\ntime = "12:00:00"\nmem = "8G"', "--drill") == 1
    said = capsys.readouterr().out
    assert "BAD  job 100 has not started in 0 minutes and is cancelled: SLURM says Priority: others come first" in said and "drill is not done" in said
    assert fake.queue == [] and fake.options("100")["nodes"] == "2" and fake.options("100")["time"] == "5" and fake.options("100")["mem"] == "8G"
    assert "exec srun --cpus-per-task=1 " in fake.scripts["100"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_it_leaves_no_job_in_the_queue(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """A lost connection, or a `timeout` in front of it, while the probe waits for its turn."""
    before, seen = signal.signal(number, lambda *_: None), list[int]()

    def sleep(seconds: float) -> None:
        seen.append(len(fake.queue))
        signal.raise_signal(number)

    monkeypatch.setattr(probe, "START_S", 1.0)
    monkeypatch.setattr(probe, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))  # not all of Python's: subprocess sleeps, too
    try:
        assert doctor(tmp_path, 'partition = "low"', "--drill") == 130
    finally:
        signal.signal(number, before)
    assert seen == [1] and fake.queue == []


@pytest.mark.parametrize("partitions", ["low|1|1-infinite\nhigh*|9|1-infinite\n", "low|9|1\nhigh*|9|1-infinite\n"])
def test_one_node_where_there_are_no_two(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitions: str) -> None:
    monkeypatch.setattr(probe, "START_S", 0.0)
    (fake.folder / "partitions").write_text(partitions)
    assert probe.most_nodes("low") == 1 and probe.most_nodes("") == 9
    doctor(tmp_path, 'partition = "low"')
    assert fake.options("100")["nodes"] == "1"


def test_what_is_wrong_with_the_profile_ends_with_two(fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path, 'partitoin = "low"') == 2 and doctor(tmp_path, 'shared = ["/nowhere"]') == 2
    (fake.folder / "refuse").write_text("100")
    assert doctor(tmp_path, 'partition = "low"') == 2
    said = capsys.readouterr().err
    assert "unknown key 'partitoin'" in said and "not below a folder that all nodes see" in said and "c.toml: sbatch: QOSMaxSubmitJobPerUserLimit" in said
    assert cli.main(["doctor", "--drill"]) == 2 and list((tmp_path / "runs" / ".slurm").glob("probe-*")) == []


def test_all_well() -> None:
    lines = judged(report(0), report(1))
    assert {good for good, _, _ in lines} == {True, None} and lines[-1][1] == "all-reduce of 4 MB across 2 nodes with gloo in 10 ms"
    assert all(good for good, _, _ in judged(report(0, gpus=["H200"]), report(1, gpus=["H200"]), gpus=1))


@pytest.mark.parametrize(("changes", "found"), [
    ({"versions": {**report(1)["versions"], "torch": "1.0"}}, "n2: torch 1.0 (here "),
    ({"wrong": "cannot be written (Permission denied)"}, "n2: runs cannot be written (Permission denied)"),
    ({"free": 2**20}, "n2: runs has 1 MB free"),
    ({"roots": {"DIR/imagenet": "no such file or directory"}}, "n2: DIR/imagenet no such file or directory"),
    ({"reduce": {"error": "TimeoutError: n1 cannot be reached"}}, "all-reduce across 2 nodes: TimeoutError: n1 cannot be reached"),
    ({"reduce": None}, "all-reduce across 2 nodes: did not end"),
    ({"reduce": {**report(1)["reduce"], "right": False}}, "all-reduce across 2 nodes: wrong sum"),
])
def test_each_thing_that_is_wrong_is_said_with_a_remedy(changes: dict[str, Any], found: str) -> None:
    [(_, text, remedy)] = [line for line in judged(report(0), report(1, **changes)) if line[0] is False]
    assert text.startswith(found) and remedy


def test_missing_gpus_and_silent_nodes(tmp_path: Path) -> None:
    bad = [text for good, text, _ in judged(report(0, gpus=["H200"]), report(1), gpus=1) if good is False]
    assert bad == ["n2: no GPU"]
    assert [text for good, text, _ in judged(report(0)) if good is False] == ["1 of 2 nodes said nothing (nothing was printed)"]
    why, after = "slurmstepd-n2: error: execve(): /opt/python: No such file or directory", "srun: error: n2: task 1: Exited with exit code 2"
    (tmp_path / "slurm-7.out").write_text(f"{why}\n{after}\n")
    assert [text for good, text, _ in judged(report(0), batch=tmp_path) if good is False] == [f"1 of 2 nodes said nothing ({why})"]


def test_a_node_that_does_not_see_the_folder_is_heard_all_the_same(tmp_path: Path) -> None:
    """Its report comes back through SLURM; the newer one of a node counts."""
    first = look(tmp_path / "none", None, 1)
    assert first["wrong"] == "cannot be read" and first["free"] == 0
    later = {**copy.deepcopy(first), "reduce": {"error": "not tried"}}
    (tmp_path / "slurm-7.out").write_text("module: command not found\n" + "".join(f"{MARK}{json.dumps(r)}\n" for r in (first, later)))
    (tmp_path / "report-0.json").write_text(json.dumps(report(0)))
    found = probe.read_reports(tmp_path, 2)
    assert found == {0: report(0), 1: later}
