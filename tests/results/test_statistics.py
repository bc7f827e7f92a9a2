"""Known answers of the statistics: textbooks, the papers of the tests, and other programs. None of them is our own output."""

import numpy as np
import pytest
from scipy.stats import norm

from results.statistics import compare, detectable_effect, differences, holm, interval, paired_p, summarise

# Student's "sleep" data (1908), the same ten patients under two drugs, as in R's `sleep`; R: t.test(extra ~ group, paired = TRUE) says t = -4.0621, df = 9,
# p-value = 0.002833.
FIRST = dict(enumerate((0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)))
SECOND = dict(enumerate((1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)))


def test_paired_t_test_of_students_sleep_data() -> None:
    assert paired_p([differences(FIRST, SECOND), [1.0, 1.0]]) == pytest.approx([0.002833, 1.0], abs=5e-7)


def test_interval_of_students_sleep_data() -> None:
    # R's t.test gives the interval of the mean difference as -2.4598858 to -0.7001142.
    assert interval(differences(FIRST, SECOND)) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)


def test_few_seeds_get_students_interval_and_one_gets_none() -> None:
    # A normal quantile would make three seeds look far more certain than they are: t(0.975, 2) = 4.30265.
    assert interval([15.0, 16.0, 17.0]) == pytest.approx((16 - 4.30265 / 3**0.5, 16 + 4.30265 / 3**0.5), abs=1e-4)
    assert interval([3.0]) is None and interval([3.0, 3.0]) == (3.0, 3.0)


def test_many_seeds_get_the_bootstraps_interval_with_its_acceleration() -> None:
    # Skewed data pull BCa's interval to their long side, where Student's is symmetric; Efron & Tibshirani 1993, section 14.3.
    values = [float(v) for v in np.random.default_rng(0).exponential(1.0, 40)]
    low, high = interval(values)
    middle = float(np.mean(values))
    assert low < middle < high and high - middle > 1.1 * (middle - low)
    assert (low, high) == interval(values)  # the same twice: a table must not change when it is printed again
    few = interval(values[:19])
    assert few[1] - np.mean(values[:19]) == pytest.approx(np.mean(values[:19]) - few[0])


def test_the_bootstraps_interval_is_efrons_formula() -> None:
    """BCa written down again from Efron 1987 (and Efron & Tibshirani 1993, eq. 14.10 to 14.15), with draws of its own."""
    values = np.random.default_rng(0).exponential(1.0, 40)
    means = np.random.default_rng(1).choice(values, (60_000, 40)).mean(axis=1)
    bias = norm.ppf((means < values.mean()).mean())
    without = (values.sum() - values) / 39  # the jackknife's means
    gaps = without.mean() - without
    acceleration = (gaps**3).sum() / (6 * (gaps**2).sum() ** 1.5)
    places = [norm.cdf(bias + (bias + norm.ppf(q)) / (1 - acceleration * (bias + norm.ppf(q)))) for q in (0.025, 0.975)]
    low, high = np.quantile(means, places)
    plain = np.quantile(means, (0.025, 0.975))
    assert interval([float(v) for v in values]) == pytest.approx((low, high), abs=0.015)  # 9999 draws: about 0.005 at the ends
    assert low - plain[0] > 0.02 and high - plain[1] > 0.03  # so that plain percentiles would not pass


def test_holms_correction() -> None:
    # Worked by hand: sorted, 0.005 x4, 0.01 x3, 0.03 x2, then never less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4]) == [0.4] and holm([]) == []


def test_power_of_a_paired_t_test() -> None:
    # Cohen 1988 and G*Power: d = 0.5 needs 34 pairs for 80 % at 5 %, two-sided; d = 0.8 needs 15.
    assert detectable_effect(34) < 0.5 < detectable_effect(33)
    assert detectable_effect(15) < 0.8 < detectable_effect(14)


def test_power_with_few_seeds_and_many_pairs() -> None:
    # By an integral over the spread's distribution, to nine digits. statsmodels' solver gave up on all but the first, and tables said that no gap can be found.
    exact = {(3, 1): 3.264043550, (3, 3): 5.667476063, (3, 6): 8.019398229, (5, 10): 3.155348631, (8, 45): 2.318093503, (2, 3): 34.61800787}
    for (seeds, pairs), effect in exact.items():
        assert detectable_effect(seeds, 0.05 / pairs) == pytest.approx(effect, rel=1e-8)
    assert detectable_effect(2, 1e-5) == pytest.approx(57722.24, rel=1e-3)


def test_layers_of_seeds_are_told_apart() -> None:
    # Four runs of two pre-trainings must not pass for four independent ones: means 11 and 15, within-variance 2 in both.
    s = summarise({(0, 0): 10.0, (0, 1): 12.0, (1, 0): 14.0, (1, 1): 16.0})
    assert (s.by_seed, s.mean, s.n, s.n_eval) == ({0: 11.0, 1: 15.0}, 13.0, 4, 2)
    assert s.std == pytest.approx(8**0.5) and s.std_eval == pytest.approx(2**0.5)
    one = summarise({(0, 0): 10.0, (1, 0): 12.0})
    assert one.std_eval is None and one.std == pytest.approx(2**0.5)


def test_methods_are_compared_by_seed_and_corrected_over_all_pairs() -> None:
    third = {seed: value + 20 for seed, value in FIRST.items()}  # far above, always by the same: no spread, nothing to test
    found = compare({"a": FIRST, "b": SECOND, "c": third})
    assert found.best == "c" and found.pairs == 3
    assert found.p["b"] < 1e-6 and found.p["a"] == 1.0
    pair = compare({"a": FIRST, "b": SECOND})
    assert (pair.best, pair.p) == ("b", pytest.approx({"a": 0.002833}, abs=5e-7))
    # The spread of these differences is 1.2300; 10 pairs find 0.99600 of it (statsmodels and G*Power: n = 10, 5 %, 80 %).
    assert pair.detectable == pytest.approx(1.22996 * 0.99600, abs=1e-4)
    assert compare({"a": FIRST, "b": SECOND}, higher_is_better=False).best == "a"


def test_methods_without_shared_seeds_are_not_tested() -> None:
    found = compare({"a": {0: 1.0, 1: 2.0}, "b": {2: 5.0, 3: 6.0}})
    assert found.p == {"a": None} and found.detectable is None and compare({"a": {}}) is None
