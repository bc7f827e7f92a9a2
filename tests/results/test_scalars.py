"""What loggers write, how a resumed job goes on in it, and that none of them ends a training."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import metrics
from harness.metrics import Metrics, loggers
from harness.spec import UserError
from results.scalars import CSV, TensorBoard, WandB


def test_tensorboard_and_csv_show_a_job_that_was_resumed_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 3, resumed from step 2: step 3 is there once, with the value of the second time."""
    monkeypatch.setenv("HARNESS_LOGGERS", "tensorboard, csv")
    first = Metrics(tmp_path / "metrics.jsonl", "train", 0)
    for step in (1, 2, 3):
        first.add(step, {"loss": float(step)})
    second = Metrics(tmp_path / "metrics.jsonl", "train", 2)
    second.add(3, {"loss": 30.0})
    read = EventAccumulator(str(tmp_path / "tensorboard" / "train"), purge_orphaned_data=True)
    read.Reload()
    assert {e.step: e.value for e in read.Scalars("loss")} == {1: 1.0, 2: 2.0, 3: 30.0} and len(read.Scalars("loss")) == 3
    with open(tmp_path / "metrics.csv", newline="") as stream:
        assert [(row["step"], row["value"]) for row in csv.DictReader(stream)] == [("1", "1.0"), ("2", "2.0"), ("3", "30.0")]


def test_a_logger_that_breaks_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        def __init__(self, *place: object) -> None: ...

        def add(self, *values: object) -> None:
            raise OSError("no space left")

    monkeypatch.setattr(metrics, "loggers", lambda: [Full, CSV])
    log = Metrics(tmp_path / "metrics.jsonl", "train", 0)
    log.add(1, {"loss": 1.0})
    log.add(2, {"loss": 2.0})
    assert capsys.readouterr().err.count("Full is left out") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 and len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_weights_and_biases_gets_one_run_for_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: what our adapter calls it with. Tried by hand with wandb itself, offline."""
    logged, started = [], []
    fake = SimpleNamespace(run=None, Settings=lambda **words: words)
    fake.init = lambda **words: started.append(words) or setattr(fake, "run", SimpleNamespace(log=logged.append)) or fake.run
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    for stage in ("train", "probe"):
        WandB(tmp_path / "pretrain-mae-12", stage, 0).add(5, {"loss": 1.0})
    assert len(started) == 1 and (started[0]["id"], started[0]["mode"], started[0]["resume"]) == ("pretrain-mae-12", "offline", "allow")
    assert logged == [{"train/loss": 1.0, "train/step": 5}, {"probe/loss": 1.0, "probe/step": 5}]


def test_which_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_LOGGERS", raising=False)
    assert loggers() == [TensorBoard]
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert loggers() == [], "the default is for those who have it"
    monkeypatch.setenv("HARNESS_LOGGERS", "")
    assert loggers() == []
    absent, unknown = "HARNESS_LOGGERS=wandb: wandb is not installed: pip install wandb", "HARNESS_LOGGERS: unknown name 'wandd': did you mean wandb"
    for text, line in (("wandb", absent), ("wandd", unknown)):
        monkeypatch.setenv("HARNESS_LOGGERS", text)
        with pytest.raises(UserError, match=line):
            loggers()
