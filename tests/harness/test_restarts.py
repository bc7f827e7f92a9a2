"""A loss that is not finite: back to the last good state, past what led to it, at most so many times; all of it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from harness.data import ImageList
from harness.plugins import Session
from harness.provenance import Usage, make_record
from harness.randomness import generator
from harness.restarts import NotFinite
from harness.spec import Interrupted, JobFailed, Recipe
from harness.store import write_json
from harness.train import fit

STEPS = 20
RECIPE = Recipe(batch=1, lr=0.5, iterations=STEPS, optimizer="sgd", momentum=0.0, schedule="constant", precision="fp32", weight_decay=0.0)
DRAWN = [generator(0, "sample", position, 0).random() for position in range(2 * STEPS)]  # an epoch of the one image is one step


class Product(nn.Module):
    """A weight times what is drawn for a place in the run, nothing finite at some places: SGD takes lr times the sum of what it saw from the weight."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.bad = [DRAWN[position] for position in bad]

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        x = batch["x"][0]
        return {"loss": self.weight * (x if float(x) not in self.bad else x * torch.nan)}


def train(folder: Path, bad: tuple[int, ...], **fields: Any) -> tuple[float, dict[str, Any], list[str]]:
    """Weight at the end, what `fit` returned, lines of the log."""
    lines: list[str] = []
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    session = Session(folder, 0, torch.device("cpu"), torch.float32, {}, log=lines.append, **{"checkpoint_every_s": 1e9, **fields})
    objective = Product(bad)
    facts = fit(objective, ImageList(folder, ["a.png"], None, ()), lambda image, rng: {"x": torch.tensor(rng.random(), dtype=torch.float64)}, RECIPE, session)
    return float(objective.weight.detach()), facts, lines


def test_it_goes_on_past_what_led_to_it(tmp_path: Path) -> None:
    """From the start, where no other state is; a restart is bounded, comes to the number that the places left over give, and is told."""
    with pytest.raises(NotFinite, match=r"loss nan at step 5 of 20 .*HARNESS_NAN_RESTARTS; no state was saved before"):
        train(tmp_path, (4, 8))
    with pytest.raises(NotFinite, match=r"loss nan at step 4 of 20"):
        train(tmp_path, (4, 8), nan_restarts=1)
    weight, facts, lines = train(tmp_path, (4, 8), nan_restarts=2)  # the first restart is remembered: this is the second
    assert weight == pytest.approx(-0.5 * sum(DRAWN[9 : 9 + STEPS]), rel=1e-12)
    assert facts["deviations"] == [f"loss not finite at step {at} of 20: went on from step 0, without the batches in between ({at})" for at in (5, 4)]
    assert [line for line in lines if "restart" in line] == ["train: restart 2 of at most 2, without the batches in between"]
    assert facts["steps"] == STEPS and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == STEPS


def test_a_restart_outlives_an_interruption(tmp_path: Path) -> None:
    """From the last state that is good, here of each step; what is left out stays left out when the job is stopped and started again."""
    steps = iter(range(100))
    with pytest.raises(Interrupted):
        train(tmp_path, (6,), nan_restarts=1, checkpoint_every_s=0.0, should_stop=lambda: next(steps) > 12)
    weight, facts, _ = train(tmp_path, (6,), nan_restarts=1)
    assert weight == pytest.approx(-0.5 * (sum(DRAWN[:6]) + sum(DRAWN[7 : STEPS + 1])), rel=1e-12)
    assert facts["deviations"] == ["loss not finite at step 7 of 20: went on from step 6, without the batches in between (1)"]


def test_a_state_that_was_damaged_is_not_the_one_gone_back_to(tmp_path: Path) -> None:
    """What it was gone back for is left out all the same, counted from the state that can be read; a second start has the same places."""
    steps = iter(range(100))
    with pytest.raises(Interrupted):
        train(tmp_path, (6,), nan_restarts=1, checkpoint_every_s=0.0, should_stop=lambda: next(steps) > 3)
    (tmp_path / "checkpoint" / "train" / "state-000000006.pt").write_bytes(b"damaged")
    write_json(tmp_path / "checkpoint" / "train" / "restarts.json", [[7, 6]])
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(Interrupted):
        train(tmp_path, (6,), nan_restarts=1, should_stop=lambda: next(steps) > 10)
    weight, facts, _ = train(tmp_path, (6,), nan_restarts=1)
    assert weight == pytest.approx(-0.5 * (sum(DRAWN[:5]) + sum(DRAWN[7 : STEPS + 2])), rel=1e-12)
    assert facts["deviations"] == ["loss not finite at step 7 of 20: went on from step 5, without the batches in between (2)"]


def test_weights_that_are_not_finite_are_no_state(tmp_path: Path) -> None:
    """Where no state can be read, going back would keep them: the job fails, and begins anew past what it failed at when it is started again."""
    def damage() -> bool:
        for path in (tmp_path / "checkpoint" / "train").glob("state-*.pt"):
            path.write_bytes(b"damaged")
        return False

    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(JobFailed, match=r"loss nan at step 5 of 20 .* can be read: start"):
        train(tmp_path, (4,), nan_restarts=1, should_stop=damage)
    with pytest.warns(UserWarning, match="is damaged"):
        weight, _, _ = train(tmp_path, (4,), nan_restarts=1)
    assert weight == pytest.approx(-0.5 * sum(DRAWN[5 : 5 + STEPS]), rel=1e-12)


def test_what_happened_before_is_told_of_the_score(tmp_path: Path) -> None:
    """A table shows evaluations: the record of one has what was found in the training that it scores."""
    identity, parents = {"seed": 0, "version": 1}, {"checkpoint": {"folder": "pretrain-mae"}}
    job: dict[str, Any] = {"kind": "evaluate", "name": "linear", "key": "1", "identity": identity, "about": {}, "parents": parents}
    session = Session(tmp_path / "evaluate", 0, torch.device("cpu"), torch.float32, {})
    (tmp_path / "pretrain-mae").mkdir()
    parts: dict[str, Any] = {"metrics": {}, "outcomes": None, "facts": {"deviations": ["one of its own"]}}
    before = make_record({**job, "kind": "pretrain", "name": "mae", "parents": {}}, session, {"threads": 1, "gemm": "highest"}, Usage(tmp_path), parts)
    write_json(tmp_path / "pretrain-mae" / "record.json", before)
    record = make_record(job, session, {"threads": 1, "gemm": "highest"}, Usage(tmp_path), parts)
    assert record["deviations_found"] == ["one of its own", "mae: one of its own"]
