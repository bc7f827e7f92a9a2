"""Ranks and critical differences against the worked example of Demsar (JMLR 7, 2006), Tables 5 and 6."""

import pytest

from harness.collect import Result
from harness.spec import Metric
from results.cells import sheets
from results.ranks import cliques, critical_difference, rank, ranks_of

NAMES = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
AUC = (  # as printed, but for one 0.975 that the paper ranks before another one, so that they were not equal before rounding
    (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967), (0.628, 0.661, 0.654, 0.657), (0.882, 0.888, 0.886, 0.898),
    (0.936, 0.931, 0.916, 0.931), (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625), (0.775, 0.838, 0.866, 0.875), (1.0, 1.0, 1.0, 1.0),
    (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669), (0.972, 0.981, 0.97501, 0.975), (0.957, 0.978, 0.946, 0.970),
)


def test_demsars_example() -> None:
    found = rank(NAMES, AUC, tuple(map(str, range(14))))
    assert found.mean == pytest.approx({"C4.5+m+cf": 1.964, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5": 3.143}, abs=5e-4)
    assert found.critical == pytest.approx(1.25, abs=0.005)
    # The paper: the post-hoc test is not powerful enough to tell any two apart except near the ends, 3.143 - 1.964 = 1.18 < 1.25.
    assert found.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"),)
    # Friedman's statistic is 9.28 before correction for ties (the paper's; p 0.026 on 3 degrees of freedom), a little more with it.
    assert found.friedman is not None and 0.015 < found.friedman < 0.026


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)])
def test_critical_values_of_the_nemenyi_test(methods: int, q: float) -> None:
    assert critical_difference(methods, 1) == pytest.approx(q * (methods * (methods + 1) / 6) ** 0.5, abs=0.003)


def test_groups_overlap_and_hold_no_group_of_another() -> None:
    assert cliques({"a": 1.0, "b": 2.0, "c": 3.0, "d": 6.0}, 1.5) == (("a", "b"), ("b", "c"))


def scored(method: str, evaluator: str, score: float, metrics: tuple[Metric, ...]) -> Result:
    return Result(method=method, eval=evaluator, protocol="p", backbone="b", data="d", seed=0, eval_seed=0, metrics={m.name: score for m in metrics},
                  columns=metrics, status="done", key=method + evaluator)


def test_an_evaluator_counts_once_and_errors_count_down() -> None:
    # Two columns of one evaluator would give it two votes; an error rate must be ranked from below.
    two, error = (Metric("AP_box"), Metric("AP_mask")), (Metric("error", higher_is_better=False),)
    results = [scored(m, "coco", v, two) for m, v in (("a", 2.0), ("b", 1.0), ("c", 5.0))]
    results += [scored(m, "in-c", v, error) for m, v in (("a", 10.0), ("b", 20.0))]
    found = ranks_of(sheets(results)[0])
    assert (found.mean, found.left_out, found.critical) == ({"a": 1.0, "b": 2.0}, ("c",), None)
