"""Selected on test: several settings scored on the reported split are flagged, those scored on a held-out part of train are not."""

from pathlib import Path

from folders import about, written

from harness.collect import collect
from harness.jobs import Node
from harness.store import Store
from results.ancestry import Archive
from results.cells import sheets
from results.selection import selected_on_test, trials_of, tried
from results.table import Table


def score(root: Path, lr: float, seed: int = 0, holdout: float = 0.0, mask: float = 0.75, start: str = "2026-01-01", **plugin: object) -> None:
    """A score of the probe with a learning rate, on a pre-training with a masking ratio."""
    training = Node("pretrain", "mae", {"seed": seed, "plugin": {"mask": mask}, "recipe": None})
    if not Store(root).folder(training).exists():
        written(root, training, 1.0)
    identity = {"seed": seed, "plugin": {"class": "evals.linear:Linear", "holdout": holdout, **plugin}, "recipe": {"lr": lr, "sources": []}}
    node = Node("evaluate", "linear-mae", identity, {"checkpoint": training}, about("mae", "linear", seed, "top-1"))
    written(root, node, 1.0, metrics={"top-1": 50.0 + lr}, start=start)


def flagged(root: Path) -> tuple[str, str]:
    """Flag and trials of the one table in a runs folder."""
    archive = Archive((root,))
    (sheet,) = sheets(collect([root]))
    return selected_on_test(sheet, trials_of(sheet, archive)), tried(trials_of(sheet, archive), "mae")


def test_one_setting_over_seeds_is_no_selection(tmp_path: Path) -> None:
    Store(tmp_path).prepare()
    for seed in (0, 1, 2):
        score(tmp_path, 0.1, seed)
    assert flagged(tmp_path) == ("", "1 for each evaluator")


def test_a_learning_rate_tried_on_the_reported_split_is_flagged(tmp_path: Path) -> None:
    Store(tmp_path).prepare()
    score(tmp_path, 0.1)
    score(tmp_path, 0.2, start="2026-01-02")
    said = "Selected on test: several settings were scored on the reported split, one is shown: mae on linear (2 settings)."
    assert flagged(tmp_path) == (said, "2 on linear (2 on the reported split)")
    assert f"- {said}" in Table.render(collect([tmp_path]), folders=(tmp_path,)).splitlines()
    score(tmp_path, 0.2, mask=0.6, start="2026-01-03")  # the pre-training's fields are settings too
    assert "(3 settings)" in flagged(tmp_path)[0]


def test_trials_on_a_held_out_part_of_train_are_counted_and_not_flagged(tmp_path: Path) -> None:
    Store(tmp_path).prepare()
    for lr in (0.1, 0.2, 0.3):
        score(tmp_path, lr, holdout=0.2)
    score(tmp_path, 0.2, start="2026-01-02")
    assert flagged(tmp_path) == ("", "3 on linear")


def test_records_of_another_version_of_the_plugin_are_no_trials(tmp_path: Path) -> None:
    # Linear once had no field `layer`: the same run again after an update is not a second setting.
    Store(tmp_path).prepare()
    score(tmp_path, 0.1)
    score(tmp_path, 0.1, start="2026-01-02", layer=None)
    assert flagged(tmp_path)[0] == ""
