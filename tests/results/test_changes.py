"""What changed a job's key: the fields that differ from the nearest earlier run of the same name, parents included."""

import os
from pathlib import Path

from folders import about, written

from harness.jobs import Node
from harness.store import Store, write_json
from results import changes
from results.ancestry import Archive


def explain(folder: Path) -> list[str]:
    """What `status` says of a node between its state and its record."""
    return changes.explain(folder.name, Archive((folder.parent,)), {})[1:-1]


def evaluation(root: Path, start: str, seed: int = 0, lr: float = 0.1, mask: float = 0.75, **fields: object) -> Path:
    """An evaluation on a pre-training, both as folders."""
    training = Node("pretrain", "mae", {"seed": seed, "plugin": {"class": "m:M", "mask": mask}, "recipe": None, "data": {}})
    if not Store(root).folder(training).exists():
        written(root, training, 1.0)
    identity = {"seed": seed, "recipe": {"lr": lr, "sources": [["lr", "MAE-paper Table 9"]]}, "data": {"imagenet": "ab"}}
    node = Node("evaluate", "linear-mae", identity, {"checkpoint": training}, about("mae", "linear", **fields))
    folder = written(root, node, 1.0)
    write_json(folder / "usage.json", {"seconds": 1.0, "start": f"{start}T00:00:00+00:00"})
    return folder


def test_the_nearest_earlier_run_is_compared_field_by_field(tmp_path: Path) -> None:
    Store(tmp_path).prepare()
    first = evaluation(tmp_path, "2026-01-01", lr=0.1)
    far = evaluation(tmp_path, "2026-01-03", lr=0.2, mask=0.5, seed=3)
    last = evaluation(tmp_path, "2026-01-04", lr=0.3)
    assert explain(first)[-1] == "key: no earlier run of this name here"
    # Two fields and the seed of the newer one differ, of the older one the lr alone: that one is nearer.
    assert explain(last)[-1] == f"key: since {first.name} changed: recipe.lr 0.1 -> 0.3"
    planned = Node("evaluate", "linear-mae", {"seed": 7, "recipe": {"lr": 0.3}, "data": {"imagenet": "ab"}})
    Store(tmp_path).folder(planned).mkdir()
    write_json(Store(tmp_path).folder(planned) / "job.json", planned.job(tmp_path))
    os.utime(Store(tmp_path).folder(planned) / "job.json", (0, 0))  # all jobs of a plan are written before the first starts: that one is no run yet
    assert f"since {first.name} changed" in explain(last)[-1] and f"since {last.name} changed" in explain(Store(tmp_path).folder(planned))[-1]
    assert explain(far)[-1].endswith("changed: checkpoint.plugin.mask 0.75 -> 0.5; checkpoint.seed 0 -> 3; recipe.lr 0.1 -> 0.2; seed 0 -> 3")


def test_a_cell_is_explained(tmp_path: Path) -> None:
    Store(tmp_path).prepare()
    folder = evaluation(tmp_path, "2026-01-01", deviations=["mae.mask=0.5"])
    lines = explain(folder)
    assert lines[:3] == ["recipe: MAE-paper Table 9 (lr)", "deviates from the recipe: mae.mask=0.5", "data: imagenet ab"]
    assert lines[3].startswith("built from: checkpoint pretrain-mae-")


def test_a_parent_that_is_gone_is_compared_by_its_key(tmp_path: Path) -> None:
    Store(tmp_path).prepare()
    evaluation(tmp_path, "2026-01-01", seed=0)
    later = evaluation(tmp_path, "2026-01-02", seed=1)
    for folder in tmp_path.glob("pretrain-*"):
        folder.rename(tmp_path / f"gone-{folder.name}")
    assert "checkpoint.key" in explain(later)[-1]
