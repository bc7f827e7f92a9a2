"""What a row has cost, from records on disk: shared pre-training counted once, an unknown part never taken for nothing."""

import json
from pathlib import Path

import pytest

from harness.jobs import Node
from harness.store import RECORD_SCHEMA, Store, collect, record_validator, write_json
from results.table import Table


def written(root: Path, node: Node, hours: float, **fields: object) -> Path:
    """A node's folder with a record."""
    folder = Store(root).folder(node)
    folder.mkdir()
    job = node.job(root)
    write_json(folder / "job.json", job)
    plain = {**dict.fromkeys(record_validator().schema["required"]), "schema": RECORD_SCHEMA, "metrics": {}, "deviations_found": [], "facts": {}}
    same = {k: job[k] for k in ("kind", "name", "key", "identity", "about", "parents")}
    used = {"device_hours": hours, "wall_s": hours * 3600, "start": "2026-01-01", "flops": 0.0}
    write_json(folder / "record.json", {**plain, **same, **used, **fields})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Tokenizer 1 h, pre-training 2 h, two evaluations of 0.5 h and 0.25 h on it."""
    Store(tmp_path).prepare()
    tokenizer = Node("asset", "dvae", {})
    pretraining = Node("pretrain", "beit", {"seed": 0}, {"tokenizer": tokenizer})
    written(tmp_path, tokenizer, 1.0, flops=1e12, peak_memory_bytes=2**30)
    written(tmp_path, pretraining, 2.0, flops=3e12, images_seen=7200, peak_memory_bytes=3 * 2**30)
    for name, hours in (("ade20k", 0.5), ("linear", 0.25)):
        about = {"method": "beit", "eval": name, "protocol": "demo", "backbone": "tiny", "data": "generated data", "seed": 0, "eval_seed": 0,
                 "columns": [{"name": "score", "unit": "%", "higher_is_better": True}], "deviations": []}
        evaluation = Node("evaluate", f"{name}-beit", {"seed": 0, "eval": name}, {"checkpoint": pretraining}, about)
        written(tmp_path, evaluation, hours, metrics={"score": 1.0}, flops=1e9, peak_memory_bytes=2 * 2**30)
    return tmp_path


def test_pre_training_is_shared_among_its_evaluations(runs: Path) -> None:
    rows = {r["eval"]: r for r in json.loads(Table.render(collect([runs]), "json", folders=(runs,), cost=True))}
    ade = rows["ade20k"]
    assert (ade["cost_pretrain_hours"], ade["cost_eval_hours"], ade["cost_total_hours"], ade["cost_shared_hours"]) == (3.0, 0.5, 3.5, 2.0)
    assert ade["cost_flops"] == 4.001e12 and ade["cost_images_per_s"] == 1.0 and ade["cost_peak_memory_bytes"] == 3 * 2**30
    line = next(x for x in Table.render(collect([runs]), folders=(runs,), cost=True).splitlines() if x.startswith("| beit"))
    assert [f.strip() for f in line.split("|")[4:-1]] == ["3.00", "0.75", "3.75", "4.00e+12", "1", "3.0"]


def test_a_cost_with_a_part_gone_is_unknown(runs: Path) -> None:
    # Half of a cost would pass for a cheap method.
    next(runs.glob("asset-*/record.json")).unlink()
    row = json.loads(Table.render(collect([runs]), "json", folders=(runs,), cost=True))[0]
    assert row["cost_pretrain_hours"] is None and row["cost_total_hours"] is None and row["cost_eval_hours"] in (0.5, 0.25)
