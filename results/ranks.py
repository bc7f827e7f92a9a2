"""Mean ranks of methods over evaluators, and which of them lie closer than the critical difference (Demsar, JMLR 7, 2006, section 3.2.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.spec import Metric
from results.cells import Sheet

DIAGRAM_FROM = 5  # evaluators; below, the test has next to no power
LISTED = 20  # methods that a line under a table names


@dataclass(frozen=True)
class Ranks:
    """Mean rank of each method, best (lowest) first; ties share the mean of their places.

    `friedman` is the p that all methods are alike; `critical` the Nemenyi test's critical difference at 5 %, both None below five evaluators. `groups` are
    the methods that lie within it of one another. `left_out` are methods without a score on one of the evaluators.
    """

    mean: Mapping[str, float]
    evaluators: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    friedman: float | None = None
    critical: float | None = None
    groups: tuple[tuple[str, ...], ...] = ()


def ranks_of(sheet: Sheet) -> Ranks | None:
    """Ranks over the first metric of each evaluator that two methods have scores on; None with fewer than two methods or evaluators."""
    columns: dict[str, Metric] = {}
    for name, metric in sheet.columns:
        columns.setdefault(name, metric)
    values = {name: {m: v for m in sheet.methods if (v := sheet.cell(m, name, metric).value) is not None} for name, metric in columns.items()}
    evaluators = tuple(name for name in columns if len(values[name]) > 1)
    methods = [m for m in sheet.methods if all(m in values[name] for name in evaluators)]
    if len(methods) < 2 or len(evaluators) < 2:
        return None
    scores = [[values[name][m] * (1 if columns[name].higher_is_better else -1) for m in methods] for name in evaluators]
    return rank(methods, scores, evaluators, tuple(m for m in sheet.methods if m not in methods))


def rank(methods: Sequence[str], scores: Sequence[Sequence[float]], evaluators: tuple[str, ...], left_out: tuple[str, ...] = ()) -> Ranks:
    """Ranks of methods from scores, one row for each evaluator, higher is better."""
    import numpy as np
    from scipy import stats

    means = stats.rankdata(-np.asarray(scores, dtype=float), axis=1).mean(0)
    mean = {methods[i]: float(means[i]) for i in np.argsort(means, kind="stable")}
    if len(evaluators) < DIAGRAM_FROM:
        return Ranks(mean, evaluators, left_out)
    critical = critical_difference(len(methods), len(evaluators))
    alike = len(methods) < 3 or all(len(set(row)) == 1 for row in scores)  # Friedman's test is for three and more
    friedman = None if alike else float(stats.friedmanchisquare(*np.transpose(scores)).pvalue)
    return Ranks(mean, evaluators, left_out, friedman, critical, cliques(mean, critical))


def critical_difference(methods: int, evaluators: int) -> float:
    """Nemenyi's critical difference of mean ranks at 5 %: q sqrt(k (k + 1) / 6 N), q from the studentised range."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(0.95, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * evaluators))


def cliques(mean: Mapping[str, float], critical: float) -> tuple[tuple[str, ...], ...]:
    """The largest groups of neighbours whose ends lie within the critical difference; `mean` is sorted."""
    names, found = list(mean), list[tuple[str, ...]]()
    end = 0
    for start in range(len(names)):
        reach = max(i for i in range(len(names)) if mean[names[i]] - mean[names[start]] <= critical)
        if reach > start and reach > end:
            found.append(tuple(names[start : reach + 1]))
            end = reach
    return tuple(found)


def sentence(ranks: Ranks) -> str:
    """The ranks in a line for under a table."""
    listed = [f"{m} {r:.1f}" for m, r in ranks.mean.items()]
    listed = listed if len(listed) <= LISTED else [*listed[:LISTED], f"and {len(listed) - LISTED} more"]
    said = f"Mean rank over {len(ranks.evaluators)} evaluators (1 is best): {', '.join(listed)}"
    if ranks.critical is not None:
        said += f"; less than {ranks.critical:.1f} apart is no difference (Nemenyi, 5 %, as if evaluators were independent)"
    without = [*ranks.left_out[:LISTED], *([f"{len(ranks.left_out) - LISTED} more"] if len(ranks.left_out) > LISTED else [])]
    return said + (f"; without {', '.join(without)}, not scored everywhere." if without else ".")
