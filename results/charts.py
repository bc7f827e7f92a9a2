"""Charts for the report: curves, dots with intervals, scatter, critical-difference diagram.

By matplotlib: figures are made where the tables are, in Python, as vectors (SVG) that need no script, no browser and no network, on paper as on a screen; its
scales, ticks and layout are well kept, and it is there anyway, since mmengine asks for it. Libraries that draw in the browser (plotly.js, Vega) would bring
megabytes of script into each page, and a reader without scripts would see nothing. Sizes are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from results.drawing import COLOURS, SAID, drawn, ink

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

WIDTH = 376  # three charts side by side on a desktop
MOST = 24  # names that a chart can hold: of more the best are shown
LONGEST = 21  # characters of a name
LEAST = 1e-6  # where zero lies on a logarithmic axis


def colour(number: int) -> str:
    """Variable of the n-th colour in the page's style sheet; beyond the last they come again, curves dashed."""
    return f"c{number % COLOURS}"


def clipped(name: str) -> str:
    """A name that fits; its middle goes, since long names differ at their ends."""
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2 - 1]}…{name[LONGEST // 2 - LONGEST :]}"


def words(axes: Axes, text: str, x: float, y: float, right: float, up: float = 0, **look: Any) -> Annotation:
    """Text so many pixels right of a point and above it."""
    return axes.annotate(text, (x, y), (right, up), textcoords="offset points", va="center", annotation_clip=False, **look)


def lines(series: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]], x_label: str, y_label: str, order: Sequence[str]) -> str:
    """Curves: name -> one (xs, ys) for each seed. Colours go by the place of a name in `order`; a legend of the page names them."""
    if not any(math.isfinite(y) for curves in series.values() for _, ys in curves for y in ys):
        return ""

    def paint(axes: Axes) -> None:
        axes.set_xlabel(x_label)
        axes.margins(0, 0.06)
        axes.locator_params(nbins=5)
        axes.locator_params(axis="x", integer=True)  # steps
        for name, curves in series.items():
            look = {"color": ink(colour(order.index(name))), "linestyle": "-" if order.index(name) < COLOURS else "--", "linewidth": 1.4, "alpha": 0.85}
            for seed, curve in enumerate(curves, 1):
                axes.plot(*curve, gid=f"{SAID}{name}, curve {seed}", **look)

    return drawn(paint, y_label, f"{y_label} over {x_label}: {', '.join(series)}", WIDTH, 240)


@dataclass(frozen=True)
class Dot:
    """A mean with its interval (None at one seed) and the scores behind it."""

    name: str
    value: float
    interval: tuple[float, float] | None
    seeds: Sequence[float] = ()
    published: float | None = None


def dots(rows: Sequence[Dot], label: str, order: Sequence[str], higher_is_better: bool = True) -> str:
    """Scores from top to bottom: the mean as a bar (a disc where the axis does not begin at zero), its interval as whiskers, each seed a small dot, a
    published number a diamond."""
    if len(rows) > MOST:
        best = {d.name for d in sorted(rows, key=lambda d: d.value, reverse=higher_is_better)[:MOST]}
        rows, label = [d for d in rows if d.name in best], f"{label}: the best {MOST} of {len(rows)}"
    shown = [[d.value, *d.seeds, *(d.interval or ()), *(() if d.published is None else (d.published,))] for d in rows]
    from_zero = min(d.value for d in rows) >= 0 and min(map(min, shown)) <= 0.4 * max(map(max, shown))

    def paint(axes: Axes) -> None:
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(rows)), [clipped(d.name) for d in rows], size=12)
        for y, (d, name, values) in enumerate(zip(rows, axes.get_yticklabels(), shown, strict=True)):
            tone, one, text = ink(colour(order.index(d.name))), d.interval is None, ink("text")
            said = f"{SAID}{d.name}: {d.value:.2f}" + (f", 95 % CI {d.interval[0]:.2f} to {d.interval[1]:.2f}" if d.interval else ", one seed")
            name.set(gid=said, color=ink("quiet") if one else text)
            if from_zero:  # a bar's length is read from zero
                axes.barh(y, d.value, 0.6, color=tone, alpha=0.25 if one else 0.45, gid=said)
            else:
                axes.plot(d.value, y, "o", color=tone, markersize=12, markeredgewidth=0, alpha=0.35 if one else 0.8, gid=said)
            if d.interval:
                ends = [max(0.0, end) if from_zero else end for end in d.interval]
                axes.plot(ends, (y, y), "|-", color=text, linewidth=1.4, markeredgewidth=1.4, markersize=8, gid=said)
            axes.plot(d.seeds, [y] * len(d.seeds), "o", color=text, markersize=4.4, markeredgewidth=0, alpha=0.55, gid=said)
            if d.published is not None:
                said = f"{SAID}published: {d.published:g}"
                axes.plot(d.published, y, "d", color=text, markerfacecolor=ink("ground"), markeredgewidth=1.4, markersize=11, gid=said)
            words(axes, f"{d.value:.1f}", max(values), y, 11, size=11, color=ink("quiet"))
        axes.set(ylim=(len(rows) - 0.4, -0.6), **{"xlim": (0, None)} if from_zero else {})

    return drawn(paint, label, label, WIDTH, 66 + 24 * len(rows))


def scatter(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str, order: Sequence[str], higher_is_better: bool = True) -> str:
    """Named points (name, x, y), x logarithmic; those that no other point beats in both are filled and joined."""
    from matplotlib.ticker import LogLocator

    sign = 1 if higher_is_better else -1
    front = [p for p in points if not any(q[1] <= p[1] and sign * q[2] >= sign * p[2] and q[1:] != p[1:] for q in points)]
    low, high = max(LEAST, min(p[1] for p in points)) / 1.4, max(LEAST, max(p[1] for p in points)) * 1.4

    def paint(axes: Axes) -> None:
        axes.set(xlabel=x_label, xscale="log", xlim=(low, high))
        axes.margins(y=0.12)
        axes.locator_params(axis="y", nbins=5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.plot(*zip(*sorted((max(LEAST, x), y) for _, x, y in front), strict=True), "--", color=ink("quiet"), linewidth=1)
        for name, x, y in points:
            tone, fill = ink(colour(order.index(name))), {} if (name, x, y) in front else {"markerfacecolor": "none"}
            axes.plot(max(LEAST, x), y, "o", color=tone, markersize=9, markeredgewidth=2, gid=f"{SAID}{name}: {y:.2f} at {x:.3g}", **fill)
        beside(axes, [(clipped(p[0]) if len(points) <= MOST or p in front else "", max(LEAST, p[1]), p[2]) for p in points])

    return drawn(paint, y_label, f"{y_label} against {x_label}", WIDTH, 260)


def beside(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names of points: right of one, else left, above or below it, else further off with a stroke to it: the first place that is free of points, of names and
    of the chart's first line; left where none is. The place of a point without a name is kept free too."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # places are known once the layout is
    line = axes.transData.transform_path(axes.lines[0].get_path())
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in axes.transData.transform([p[1:] for p in points])]
    near = [("left", 9, 0), ("right", -9, 0), *((side, 0, up) for up in (14, -14) for side in ("center", "right", "left"))]
    places = [*near, *((side, 0, up) for up in (28, -28, 42, -42) for side in ("center", "right", "left")), ("right", -9, 0)]
    for name, x, y in points:
        for number, (side, right, up) in enumerate(places, start=1):
            note = words(axes, name, x, y, right, up, ha=side, in_layout=False)
            box = note.get_window_extent()
            within = (box.min >= axes.bbox.min).all() and (box.max <= axes.bbox.max).all()
            if number == len(places) or (within and not box.count_overlaps(taken) and not line.intersects_bbox(box, filled=False)):
                break
            note.remove()
        taken.append(box)
        if name and abs(up) > 14:
            stroke = {"arrowstyle": "-", "color": ink("quiet"), "linewidth": 0.8, "shrinkA": 0, "shrinkB": 6}
            axes.annotate("", (x, y), (0, math.copysign(abs(up) - 7, up)), textcoords="offset points", arrowprops=stroke, in_layout=False)


def rank_diagram(mean: Mapping[str, float], critical: float, groups: Sequence[Sequence[str]]) -> str:
    """Mean ranks on a line, best on the left; a thick bar joins methods within the critical difference (Demsar 2006, Figure 1)."""
    names = list(mean)[:MOST]
    groups = [shown for group in groups if len(shown := [n for n in group if n in names]) > 1]
    groups = [g for i, g in enumerate(groups) if not any(set(g) <= set(h) for h in groups[:i])]  # where names are left out, groups may fall together
    half = (len(names) + 1) // 2
    last = len(names) if len(names) == len(mean) else max(2, math.ceil(mean[names[-1]]))
    top = 1 + 0.6 * len(groups)  # of the first name, in rows
    ticks = range(1, last + 1, math.ceil(last / 12))
    rule, small = {"color": ink("quiet"), "linewidth": 1}, {"size": 11, "color": ink("quiet")}

    def paint(axes: Axes) -> None:
        axes.set_axis_off()
        axes.set(xlim=(1, last), ylim=(top + half - 0.5, -2))
        axes.plot((1, last), (0, 0), **rule)
        axes.plot(ticks, [-0.1] * len(ticks), "|", markersize=4, **rule)
        for place in ticks:
            words(axes, str(place), place, 0, 0, 12, ha="center", **small)
        reach = min(1 + critical, last)
        axes.plot((1, reach), (-1.6, -1.6), "|-", markersize=8, markevery=2 if reach < 1 + critical else 1, **rule)
        words(axes, f"critical difference {critical:.2f}", reach, -1.6, 6, **small)
        for i, group in enumerate(groups):
            ends = mean[group[0]], mean[group[-1]]
            axes.plot(ends, [0.6 + 0.6 * i] * 2, color=ink("text"), linewidth=4, solid_capstyle="round")
        for i, name in enumerate(names):
            y, edge, right, side = (top + i, 1, -6, "right") if i < half else (top + len(names) - 1 - i, last, 6, "left")
            axes.plot((mean[name], mean[name], edge), (0, y, y), **rule)
            words(axes, f"{clipped(name)} {mean[name]:.2f}", edge, y, right, ha=side)

    label = f"the best {len(names)} of {len(mean)}" if len(names) < len(mean) else ""
    return drawn(paint, label, "Mean ranks: " + ", ".join(f"{n} {mean[n]:.2f}" for n in names), 640, 30 + 20 * (2 + top + half))
