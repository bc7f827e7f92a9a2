"""What counts in a cell: the mean, the seeds, and what is said when something is missing."""

from dataclasses import replace

import pytest

from harness.collect import Result
from harness.spec import Metric
from results.cells import select, sheets

MIOU = Metric("mIoU")


def result(score: float | None = 16.0, seed: int = 0, eval_seed: int = 0, **fields: object) -> Result:
    plain = Result(
        method="mae", eval="ade20k", protocol="demo", backbone="tiny", data="generated", seed=seed, eval_seed=eval_seed,
        metrics={} if score is None else {"mIoU": score}, columns=(MIOU,), status="missing" if score is None else "done",
        key=f"k{seed}-{eval_seed}", start="2026-01-01T00:00:00",
    )
    return replace(plain, **fields)


def only_cell(*results: Result):
    (sheet,) = sheets(results)
    (cell,) = sheet.cells.values()
    return cell


def test_mean_spread_and_interval_of_three_seeds() -> None:
    # A wrong divisor or a normal quantile would make three seeds look far more certain than they are: t(0.975, 2) = 4.3027.
    cell = only_cell(result(15.0, 0), result(16.0, 1), result(17.0, 2))
    assert (cell.value, cell.std, cell.n, cell.n_pretrain, cell.n_eval, cell.status, cell.reason) == (16.0, 1.0, 3, 3, 1, "done", "")
    assert cell.ci95 == pytest.approx((16 - 4.30265 / 3**0.5, 16 + 4.30265 / 3**0.5), abs=1e-4)


def test_fine_tuning_seeds_are_averaged_before_the_spread_over_pre_training_seeds() -> None:
    # Otherwise four runs of two pre-trainings would pass for four independent ones.
    cell = only_cell(result(10.0, 0, 0), result(12.0, 0, 1), result(14.0, 1, 0), result(16.0, 1, 1))
    assert (cell.value, cell.n, cell.n_pretrain, cell.n_eval) == (13.0, 4, 2, 2)
    assert cell.std == pytest.approx(8**0.5)


def test_one_pre_training_has_no_spread() -> None:
    cell = only_cell(result(10.0, 0, 0), result(12.0, 0, 1))
    assert (cell.value, cell.std, cell.ci95, cell.n, cell.n_pretrain) == (11.0, None, None, 2, 1)


def test_an_unfinished_seed_is_said_and_not_averaged() -> None:
    # A mean over two of three seeds must not pass for the complete one.
    cell = only_cell(result(15.0, 0), result(17.0, 1), result(None, 2, status="failed", reason="loss is\nnot finite"))
    assert (cell.value, cell.n, cell.status, cell.reason) == (16.0, 2, "failed", "seed 2: loss is not finite")


def test_a_score_that_is_not_a_number_is_a_failure() -> None:
    cell = only_cell(result(float("nan")))
    assert (cell.value, cell.status, cell.reason) == (None, "failed", "the score is not finite (nan)")


def test_a_record_without_the_declared_metric_is_a_failure() -> None:
    cell = only_cell(result(metrics={}))
    assert (cell.value, cell.status, cell.reason) == (None, "failed", "the record has no such metric")


@pytest.mark.parametrize(("status", "reason", "said"), [
    ("skipped", "no data", "no data"), ("missing", "", "not run"), ("running", "process 7 on here", "process 7 on here"), ("running", "", "running"),
])
def test_a_missing_cell_keeps_its_status_and_reason(status: str, reason: str, said: str) -> None:
    cell = only_cell(result(None, status=status, reason=reason))
    assert (cell.value, cell.status, cell.reason, cell.n) == (None, status, said, 0)


def test_a_pair_that_nobody_asked_for_is_not_run() -> None:
    (sheet,) = sheets([result(), result(method="beit", eval="coco", metrics={"AP_box": 3.0}, columns=(Metric("AP_box"), Metric("AP_mask")))])
    assert sheet.methods == ("mae", "beit") and [(e, m.name) for e, m in sheet.columns] == [("ade20k", "mIoU"), ("coco", "AP_box"), ("coco", "AP_mask")]
    assert sheet.cell("mae", "coco", Metric("AP_box")).reason == "not run"
    assert sheet.cell("beit", "coco", Metric("AP_box")).value == 3.0


def test_the_same_job_in_two_runs_folders_counts_once() -> None:
    assert only_cell(result(16.0), result(16.0)).n == 1
    # The copy that finished wins over the copy that was left unfinished, wherever it stands.
    assert only_cell(result(None, status="interrupted", start=""), result(16.0)).value == 16.0


def test_of_other_settings_the_newest_counts_and_the_older_is_mentioned() -> None:
    old, new = result(10.0, key="a", start="2026-01-01T00:00:00"), result(20.0, key="b", start="2026-02-01T00:00:00")
    for order in ([old, new], [new, old]):
        cell = only_cell(*order)
        assert (cell.value, cell.n, cell.remarks) == (20.0, 1, ("older results of other settings left out",))


def test_a_failure_under_other_settings_is_not_hidden_by_an_old_number() -> None:
    cell = only_cell(result(10.0, key="a"), result(None, key="b", status="failed", reason="out of memory", start=""))
    assert cell.value == 10.0 and cell.remarks == ("left out, other settings: failed: out of memory",)


def test_cells_without_a_key_stay_apart_by_seed() -> None:
    counted, _ = select([result(None, 0, key=""), result(None, 1, key="")])
    assert [r.seed for r in counted] == [0, 1]


@pytest.mark.parametrize("field", ["protocol", "backbone", "data", "tuning"])
def test_what_cannot_be_compared_is_never_in_one_table(field: str) -> None:
    assert len(sheets([result(), result(method="beit", **{field: "another"})])) == 2


def test_a_deviation_of_one_seed_names_the_seed() -> None:
    cell = only_cell(result(1.0, 0, deviations=("mask_ratio=0.6",)), result(2.0, 1, deviations=("mask_ratio=0.6", "1 image skipped")))
    assert cell.deviations == ("mask_ratio=0.6", "1 image skipped (seed 1)")


def test_rows_and_columns_keep_the_order_of_the_command_line() -> None:
    (sheet,) = sheets([result(method=m) for m in ("beit", "mae", "scratch")], methods=("scratch", "nobody", "mae"))
    assert sheet.methods == ("scratch", "mae", "beit")


def test_an_evaluator_without_declared_columns_still_has_one() -> None:
    (sheet,) = sheets([result(None, columns=(), status="failed", reason="plugin is gone")])
    assert [m.name for _, m in sheet.columns] == ["score"]


def test_seeds_of_different_settings_are_not_averaged() -> None:
    # Seed 0 with the old learning rate and seed 1 with the new one would give a mean that belongs to no recipe.
    old = [result(10.0, seed=s, key=f"old{s}", start=f"2026-01-0{s + 1}", settings="a") for s in (0, 1)]
    new = result(20.0, seed=0, key="new0", start="2026-02-01", settings="b")
    counted, remarks = select([*old, new])
    assert counted == [new] and remarks == ("older results of other settings left out",)
