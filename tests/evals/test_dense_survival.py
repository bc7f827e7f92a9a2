"""Dense trainings go on after a loss that is not finite and after memory gave out, or end with what helps; the numbers are those of a training without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_data import make_ade20k, make_coco
from dense_faults import faults
from dense_processes import RECIPE, evaluate, trained

from harness.checkpoint import States
from harness.restarts import NotFinite
from harness.spec import Interrupted, JobFailed

PAIRS = dataclasses.replace(RECIPE, batch=2, iterations=5)  # its step s draws the places 2s and 2s + 1


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    return {"ade20k": make_ade20k(root / "ade", 4, 2), "coco": make_coco(root / "coco", 4, 2)}


def same(a: Path, b: Path) -> bool:
    left, right = trained(a), trained(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def after(steps: int, tried: list[list[int]]) -> Callable[[], bool]:
    return lambda: len(tried) >= steps


def test_a_loss_that_is_not_finite_is_gone_past(sets: dict[str, Path], tmp_path: Path) -> None:
    """Weights, batch norm and momentum as they were, at most so often, remembered when started again: the training that never drew those places."""
    data, lines = sets["ade20k"], list[str]()
    with faults(nan=(6, 12)):
        with pytest.raises(NotFinite, match=r"train: loss nan at step 3 of 5 \(.*HARNESS_NAN_RESTARTS; the last good state is of step 0,"):
            evaluate("ade20k", tmp_path / "lost", data, PAIRS, nan_restarts=1)
        lost = evaluate("ade20k", tmp_path / "lost", data, PAIRS, nan_restarts=2, log=lines.append)
    with faults(shift=14):
        expected = evaluate("ade20k", tmp_path / "expected", data, PAIRS)
    assert same(tmp_path / "lost", tmp_path / "expected") and lost.metrics == expected.metrics
    told = [f"loss not finite at step {at} of 5: went on from step 0, without the batches in between ({at})" for at in (4, 3)]
    assert (lost.facts["deviations"], expected.facts["deviations"]) == (told, [])
    assert [line for line in lines if "restart" in line][-1] == "train: restart 2 of at most 2, without the batches in between"


def test_a_restart_outlives_an_interruption(sets: dict[str, Path], tmp_path: Path) -> None:
    """From the last state, here of each step: stopped after it and started again, what is left out stays left out."""
    given: dict[str, Any] = {"nan_restarts": 1, "checkpoint_every_s": 0.0}
    with faults(nan=(4,)) as whole:
        evaluate("ade20k", tmp_path / "whole", sets["ade20k"], PAIRS, **given)
    with faults(nan=(4,)) as tried:
        with pytest.raises(Interrupted):
            evaluate("ade20k", tmp_path / "parts", sets["ade20k"], PAIRS, should_stop=after(4, tried), **given)
        assert len(tried) == 4
        found = evaluate("ade20k", tmp_path / "parts", sets["ade20k"], PAIRS, **given)
    assert tried == whole == [[2 * s, 2 * s + 1] for s in range(6)]
    assert same(tmp_path / "parts", tmp_path / "whole")
    assert found.facts["deviations"] == ["loss not finite at step 3 of 5: went on from step 2, without the batches in between (1)"]


def test_memory_that_gives_out_halves_the_parts_from_that_step_on(sets: dict[str, Path], tmp_path: Path) -> None:
    """With no gradient left of the first try, and when started again: as with a smaller micro-batch from there. The record says so."""
    once = iter([None, torch.OutOfMemoryError("as a GPU would")])
    with faults(fail=lambda places: next(once, None)) as tried:
        with pytest.raises(Interrupted, match="iteration 2 of 3"):
            evaluate("coco", tmp_path / "halved", sets["coco"], on_oom="halve", should_stop=after(4, tried))
        halved = evaluate("coco", tmp_path / "halved", sets["coco"], on_oom="halve")
    assert [len(places) for places in tried] == [5, 5, 3, 2, 3, 2]
    with faults() as tried:
        with pytest.raises(Interrupted, match="iteration 1 of 3"):
            evaluate("coco", tmp_path / "small", sets["coco"], should_stop=after(1, tried))
        small = evaluate("coco", tmp_path / "small", sets["coco"], micro_batch=3)
    assert same(tmp_path / "halved", tmp_path / "small") and halved.metrics == small.metrics and "out_of_memory" not in small.facts
    assert halved.facts["out_of_memory"] == ["train: out of memory at step 1 with 5 images at a time: 3 from there on"]


@pytest.mark.parametrize("name,fits,error,session,message", [
    ("ade20k", 2, torch.OutOfMemoryError(), {"on_oom": "halve"}, "5 images at a time: it needs a larger device: its loss couples the images of a batch; "),
    ("coco", 2, RuntimeError("DefaultCPUAllocator: can't allocate memory"), {}, "5 images at a time; 2 fit: set HARNESS_MICRO_BATCH=2 or --on-oom halve, "),
    ("coco", 0, torch.OutOfMemoryError(), {}, "5 images at a time, nor with one: it needs a larger device; HARNESS_RECOMPUTE=1 takes less memory"),
    ("coco", 0, torch.OutOfMemoryError(), {"on_oom": "halve", "recompute": True}, "1 images at a time: it needs a larger device$"),
])
def test_memory_that_gives_out_ends_with_what_helps(
    name: str, fits: int, error: Exception, session: dict[str, Any], message: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    with faults(fail=lambda places: error if len(places) > fits else None), pytest.raises(JobFailed, match=f"^train: out of memory at step 0 with {message}"):
        evaluate(name, tmp_path, sets[name], **session)


def test_states_that_take_long_are_written_rarely(sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a fiftieth of the time at most, as in any other training: what is asked for is the least time between them."""
    written: list[int] = []

    def save(self: States, step: int, state: dict[str, Any]) -> None:
        written.append(step)
        self.took = 1e3

    monkeypatch.setattr(States, "save", save)
    evaluate("ade20k", tmp_path, sets["ade20k"], checkpoint_every_s=1e-9)
    assert written == [1, 3]
