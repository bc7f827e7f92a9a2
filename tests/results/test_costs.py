"""What a row has cost, from records on disk: shared pre-training counted once, an unknown part never taken for nothing."""

import json
from pathlib import Path

import pytest
from folders import about, written

from harness.collect import collect
from harness.jobs import Node
from harness.store import Store
from results.table import Table


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Tokenizer 1 h, pre-training 2 h, two evaluations of 0.5 h and 0.25 h on it."""
    Store(tmp_path).prepare()
    tokenizer = Node("asset", "dvae", {})
    pretraining = Node("pretrain", "beit", {"seed": 0}, {"tokenizer": tokenizer})
    written(tmp_path, tokenizer, 1.0, flops=1e12, peak_memory_bytes=2**30)
    written(tmp_path, pretraining, 2.0, flops=3e12, images_seen=7200, peak_memory_bytes=3 * 2**30)
    for name, hours in (("ade20k", 0.5), ("linear", 0.25)):
        evaluation = Node("evaluate", f"{name}-beit", {"seed": 0, "eval": name}, {"checkpoint": pretraining}, about("beit", name))
        written(tmp_path, evaluation, hours, metrics={"score": 1.0}, flops=1e9, peak_memory_bytes=2 * 2**30)
    return tmp_path


def test_pre_training_is_shared_among_its_evaluations(runs: Path) -> None:
    rows = {r["eval"]: r for r in json.loads(Table.render(collect([runs]), "json", folders=(runs,), cost=True))}
    ade = rows["ade20k"]
    assert (ade["cost_pretrain_hours"], ade["cost_eval_hours"], ade["cost_total_hours"], ade["cost_shared_hours"]) == (3.0, 0.5, 3.5, 2.0)
    assert ade["cost_flops"] == 4.001e12 and ade["cost_images_per_s"] == 1.0 and ade["cost_peak_memory_bytes"] == 3 * 2**30
    line = next(x for x in Table.render(collect([runs]), folders=(runs,), cost=True).splitlines() if x.startswith("| beit"))
    assert [f.strip() for f in line.split("|")[4:-1]] == ["3.00", "0.75", "3.75", "4.00e+12", "1", "3.0"]


def test_a_seed_without_all_evaluations_makes_no_row_cheap(runs: Path) -> None:
    training = Node("pretrain", "beit", {"seed": 1})
    written(runs, training, 4.0, flops=4e12, images_seen=14400)
    written(runs, Node("evaluate", "linear-beit", {"seed": 1}, {"checkpoint": training}, about("beit", "linear", 1)), 0.25, metrics={"score": 1.0})
    line = next(x for x in Table.render(collect([runs]), folders=(runs,), cost=True).splitlines() if x.startswith("| beit"))
    assert [f.strip() for f in line.split("|")[4:-1]] == ["3.50", "0.75", "4.25", "4.00e+12", "1", "3.0"]


def test_a_cost_with_a_part_gone_is_unknown(runs: Path) -> None:
    # Half of a cost would pass for a cheap method.
    next(runs.glob("asset-*/record.json")).unlink()
    row = json.loads(Table.render(collect([runs]), "json", folders=(runs,), cost=True))[0]
    assert row["cost_pretrain_hours"] is None and row["cost_total_hours"] is None and row["cost_eval_hours"] in (0.5, 0.25)


def test_weights_of_somebody_else_are_not_free(tmp_path: Path) -> None:
    # Loading them takes a second, training them took somebody weeks.
    Store(tmp_path).prepare()
    loading = Node("pretrain", "w", {"seed": 0, "files": {"weights": "0" * 64}})
    written(tmp_path, loading, 0.001, flops=0.0)
    written(tmp_path, Node("evaluate", "linear-w", {"seed": 0}, {"checkpoint": loading}, about("weights:x", "linear")), 0.5, metrics={"score": 1.0})
    (row,) = json.loads(Table.render(collect([tmp_path]), "json", folders=(tmp_path,), cost=True))
    assert (row["cost_pretrain_hours"], row["cost_total_hours"], row["cost_flops"], row["cost_eval_hours"]) == (None, None, None, 0.5)
