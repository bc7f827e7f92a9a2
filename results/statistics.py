"""What seeds allow to say: mean, spread and confidence interval of a score, which methods differ, and which gap could have been seen at all.

Two layers of seeds are told apart. A pre-training seed is one independent run of the method; fine-tuning seeds repeat the evaluation on the same
checkpoint, so they are averaged before anything is said about a method. With a single fine-tuning seed for each pre-training (the default) the spread over
pre-training seeds holds the noise of both. Methods are compared by pre-training seed, which they share: paired t-tests, Holm's correction over all pairs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEVEL, ALPHA, POWER = 0.95, 0.05, 0.8
BOOTSTRAP_FROM = 20  # below, the bootstrap's intervals are too narrow: Student's t
RESAMPLES = 9999


@dataclass(frozen=True)
class Seeds:
    """Scores of one cell by layer of seeds.

    `mean` is over pre-training seeds of the means over fine-tuning seeds; `std` (divisor n - 1) and `ci95` are over those means; `std_eval` is the spread
    of fine-tuning seeds on the same pre-training, pooled over pre-trainings. None where there are too few seeds of the layer.
    """

    by_seed: Mapping[int, float]
    mean: float | None
    std: float | None
    ci95: tuple[float, float] | None
    std_eval: float | None
    n: int
    n_eval: int


def summarise(scores: Mapping[tuple[int, int], float]) -> Seeds:
    """Summary of finite scores by (pre-training seed, fine-tuning seed)."""
    grouped: dict[int, list[float]] = {}
    for (seed, _), score in sorted(scores.items()):
        grouped.setdefault(seed, []).append(score)
    means = {seed: statistics.fmean(values) for seed, values in grouped.items()}
    within = [v - means[seed] for seed, values in grouped.items() for v in values]
    free = len(scores) - len(grouped)
    return Seeds(
        means, statistics.fmean(means.values()) if means else None, statistics.stdev(means.values()) if len(means) > 1 else None,
        interval(list(means.values())), math.sqrt(math.fsum(w**2 for w in within) / free) if free else None, len(scores), len({e for _, e in scores}),
    )


def interval(means: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean, (low, high): Student's t, from 20 values on the BCa bootstrap (Efron 1987); None below two values."""
    if len(means) < 2:
        return None
    middle, std = statistics.fmean(means), statistics.stdev(means)
    if std == 0:
        return middle, middle
    import numpy as np
    from scipy import stats

    low, high = stats.t.interval(LEVEL, len(means) - 1, middle, std / math.sqrt(len(means)))
    if len(means) >= BOOTSTRAP_FROM:
        sample = (np.asarray(means),)
        found = stats.bootstrap(sample, np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, rng=np.random.default_rng(0)).confidence_interval
        low, high = found if np.isfinite(found).all() else (low, high)
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """A column's methods compared.

    `best` has the best mean. `p` is the Holm-corrected p of each other method against it, None where fewer than two seeds are shared. `detectable` is
    the gap that a test of the column would find with 80 % power at Holm's strictest step, in the metric's unit, from the pooled spread of the paired
    differences; None where there is none. `pairs` is the number of tests corrected for.
    """

    best: str
    p: Mapping[str, float | None] = field(default_factory=dict)
    detectable: float | None = None
    pairs: int = 0


def compare(scores: Mapping[str, Mapping[int, float]], higher_is_better: bool = True) -> Comparison | None:
    """Compare methods that have scores by pre-training seed; None where there is no score."""
    scores = {method: by_seed for method, by_seed in scores.items() if by_seed}
    if not scores:
        return None
    means = {method: statistics.fmean(by_seed.values()) for method, by_seed in scores.items()}
    best = (max if higher_is_better else min)(means, key=lambda method: means[method])
    gaps = {pair: differences(scores[pair[0]], scores[pair[1]]) for pair in itertools.combinations(scores, 2)}
    gaps = {pair: values for pair, values in gaps.items() if len(values) > 1}
    p = dict(zip(gaps, holm(paired_p(list(gaps.values()))), strict=True))
    against = {m: p.get((m, best), p.get((best, m))) for m in scores if m != best}
    spreads = [(len(values), statistics.variance(values)) for values in gaps.values()]
    detectable = None
    if spreads:
        pooled = math.sqrt(sum((n - 1) * v for n, v in spreads) / sum(n - 1 for n, _ in spreads))
        effect = detectable_effect(min(n for n, _ in spreads), ALPHA / len(spreads)) if pooled else None
        detectable = effect * pooled if effect is not None else None
    return Comparison(best, against, detectable, len(gaps))


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """First minus second at each seed that both have."""
    return [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]


def paired_p(gaps: Sequence[Sequence[float]]) -> list[float]:
    """Two-sided p of Student's t-test that paired differences (two at least) have mean 0, of each row. Without any spread nothing can be shown: 1."""
    found, alike = [1.0] * len(gaps), dict[int, list[int]]()
    for place, values in enumerate(gaps):
        if not math.isclose(statistics.stdev(values), 0.0, abs_tol=1e-9):
            alike.setdefault(len(values), []).append(place)
    for places in alike.values():  # a call for all of a length: scipy's checks take longer than a test
        from scipy.stats import ttest_1samp

        for place, p in zip(places, ttest_1samp([gaps[i] for i in places], 0.0, axis=1).pvalue, strict=True):
            found[place] = float(p)
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979)."""
    if len(p) < 2:
        return list(p)
    from statsmodels.stats.multitest import multipletests

    return [float(v) for v in multipletests(p, method="holm")[1]]


def detectable_effect(n: int, alpha: float = ALPHA) -> float | None:
    """The mean of n paired differences, in their standard deviations, that a two-sided t-test at `alpha` finds with 80 % power (noncentral t).

    None where scipy cannot compute it. By bisection: statsmodels' solver meets scipy's NaN for effects far above the
    answer, where the power is 1, and gives up from three seeds and three pairs on."""
    from scipy.stats import nct, t

    threshold = float(t.isf(alpha / 2, n - 1))

    def power(effect: float) -> float:
        p = float(nct.sf(threshold, n - 1, effect * math.sqrt(n)))
        return 1.0 if math.isnan(p) else p

    low, high = 0.0, 1.0
    while power(high) < POWER:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high if math.isclose(power(high), POWER, abs_tol=1e-3) else None


def undecided(p: float | None) -> bool:
    """Whether a comparison leaves two methods undistinguished: not significant after correction, or no test possible."""
    return p is None or p >= ALPHA
