"""Charts as SVG for the report: lines, dots with intervals, scatter, critical-difference diagram.

Drawn by hand, without a charting library: they take the page's colours in light and dark, need no script, stay text for search and print, and a chart
weighs a few KB where matplotlib's SVG weighs tens. Sizes are in pixels; colours are the classes c0 to c7 of the page's style sheet.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = 8
WIDTH = 376.0  # three charts side by side on a desktop
MOST = 24  # names that a chart can hold: of more the best are shown
FONT = 7.2  # width of a character at the page's 12 px in a broad font (DejaVu Sans), for how much room a label needs


def colour(number: int) -> str:
    """Class of the n-th colour; beyond the last they come again, curves dashed."""
    return f"c{number % COLOURS}" + (" again" if number >= COLOURS else "")


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(v, 1e-300)) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values within the range."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in ((1,) if len(powers) > 4 else (1, 2, 5))]
            return [v for v in found if self.low <= v <= self.high]
        step = 10 ** math.floor(math.log10((self.high - self.low) / wanted or 1.0))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= wanted)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def around(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """A range with some room on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def text(x: float, y: float, words: str, classes: str = "", anchor: str = "start") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{html.escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{classes}"/>'


def svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """A picture that scales with the page; `title` is read aloud."""
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" aria-label="{html.escape(title)}">{body}</svg>'


def axes(x: Scale, y: Scale, x_label: str, y_label: str) -> list[str]:
    """Grid lines, numbers and labels of a chart whose y axis is on the left."""
    parts = []
    for value in y.ticks():
        parts += [line(x.start, y(value), x.end, y(value), "grid"), text(x.start - 6, y(value) + 4, short(value), "tick", "end")]
    for value in x.ticks():
        parts += [line(x(value), y.start, x(value), y.start + 4, "axis"), text(x(value), y.start + 16, short(value), "tick", "middle")]
    parts += [line(x.start, y.start, x.end, y.start, "axis"), text((x.start + x.end) / 2, y.start + 32, x_label, "label", "middle")]
    return [*parts, text(4, y.end - 8, y_label, "label")]


def short(value: float) -> str:
    """A number as a tick says it."""
    return f"{value:g}" if abs(value) < 1e5 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def lines(series: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]], x_label: str, y_label: str, order: Sequence[str]) -> str:
    """Curves: name -> one (xs, ys) for each seed. Colours go by the place of a name in `order`; the legend names them below."""
    width, height = WIDTH, 240.0
    xs = [v for curves in series.values() for x, _ in curves for v in x]
    ys = [v for curves in series.values() for _, y in curves for v in y if math.isfinite(v)]
    if not xs or not ys:
        return ""
    x, y = Scale(min(xs), max(xs), 52, width - 10, False), Scale(*around(ys), height - 44, 24)
    parts = axes(x, y, x_label, y_label)
    for name, curves in series.items():
        for seed, (px, py) in enumerate(curves):
            points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(px, py, strict=True) if math.isfinite(b))
            said = f"<title>{html.escape(name)}, curve {seed + 1}</title>"
            parts.append(f'<polyline points="{points}" class="curve {colour(order.index(name))}">{said}</polyline>')
    return svg(width, height, parts, f"{y_label} over {x_label}: {', '.join(series)}")


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
    room = min(170.0, max(len(d.name) for d in rows) * FONT + 16)
    width, height = WIDTH, 30.0 + 24 * len(rows) + 36
    values = [v for d in rows for v in (d.value, *d.seeds, *(d.interval or ()), *((d.published,) if d.published is not None else ()))]
    low, high = around(values, 0.05)
    low = 0.0 if low < 0 <= min(d.value for d in rows) or min(values) < 0.4 * max(values) else low
    x, bottom = Scale(low, high, room, width - 46), height - 36
    parts = [f for v in x.ticks() for f in (line(x(v), 20, x(v), bottom, "grid"), text(x(v), bottom + 16, short(v), "tick", "middle"))]
    for i, d in enumerate(rows):
        y, tone, single = 36.0 + 24 * i, colour(order.index(d.name)), " faint" if d.interval is None else ""
        said = f"{d.name}: {d.value:.2f}" + (f", 95 % CI {d.interval[0]:.2f} to {d.interval[1]:.2f}" if d.interval else ", one seed")
        parts.append(f'<g class="{tone}{single}"><title>{html.escape(said)}</title>')
        parts.append(text(room - 8, y + 4, clipped(d.name, room), "name", "end"))
        if low == 0.0:  # a bar's length is read from zero
            parts.append(f'<rect x="{x(low):.1f}" y="{y - 7:.1f}" width="{max(0.5, x(d.value) - x(low)):.1f}" height="14" class="bar"/>')
        else:
            parts.append(f'<circle cx="{x(d.value):.1f}" cy="{y:.1f}" r="6" class="disc"/>')
        if d.interval:
            a, b = max(low, d.interval[0]), d.interval[1]
            parts += [line(x(a), y, x(b), y, "whisker"), line(x(a), y - 4, x(a), y + 4, "whisker"), line(x(b), y - 4, x(b), y + 4, "whisker")]
        parts += [f'<circle cx="{x(v):.1f}" cy="{y:.1f}" r="2.2" class="seed"/>' for v in d.seeds]
        if d.published is not None:
            px = x(d.published)
            parts.append(f'<path d="M{px:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6z" class="published"><title>published: {d.published:g}</title></path>')
        end = max(x(v) for v in (d.value, *(d.interval or ()), *((d.published,) if d.published is not None else ())))
        parts += [text(max(end, x(d.value) + (0 if low == 0.0 else 6)) + 6, y + 4, f"{d.value:.1f}", "tick"), "</g>"]
    return svg(width, height, [text(4, 12, label, "label"), *parts], label)


def clipped(name: str, room: float) -> str:
    """A name that fits into so many pixels; its middle goes, since long names differ at their ends."""
    most = int((room - 12) / FONT)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def scatter(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str, order: Sequence[str], higher_is_better: bool = True) -> str:
    """Named points (name, x, y), x logarithmic; those that no other point beats in both are filled and joined."""
    width, height = WIDTH, 260.0
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    x, y = Scale(low / 1.4, high * 1.4, 52, width - 16, True), Scale(*around([p[2] for p in points], 0.12), height - 44, 24)
    sign = 1 if higher_is_better else -1
    front = [p for p in points if not any(q[1] <= p[1] and sign * q[2] >= sign * p[2] and q[1:] != p[1:] for q in points)]
    corners = sorted(front, key=lambda p: p[1])
    parts = axes(x, y, x_label, y_label)
    parts.append(f'<polyline points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for _, a, b in corners)}" class="front"/>')
    taken = [(x(a) - 6, y(b) - 6, x(a) + 6, y(b) + 6) for _, a, b in points]
    for point in points:
        name, a, b = point
        parts.append(f'<g class="{colour(order.index(name))}"><title>{html.escape(f"{name}: {b:.2f} at {a:.3g}")}</title>'
                     f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="5" class="{"dot" if point in front else "ring"}"/></g>')
        if len(points) <= MOST or point in front:
            label, anchor, box = beside(x(a), y(b), clipped(name, 160), taken, width)
            taken.append(box)
            parts.append(text(*label, clipped(name, 160), "name", anchor))
    return svg(width, height, parts, f"{y_label} against {x_label}")


Box = tuple[float, float, float, float]  # left, top, right, bottom


def beside(x: float, y: float, words: str, taken: Sequence[Box], width: float) -> tuple[tuple[float, float], str, Box]:
    """Place, anchor and box of a label: right of a point, else left, above or below it, where the first is free; right where none is."""
    long = len(words) * FONT
    places: list[tuple[tuple[float, float], str, Box]] = [
        ((x + 9, y + 4), "start", (x + 7, y - 6, x + 9 + long, y + 6)), ((x - 9, y + 4), "end", (x - 9 - long, y - 6, x - 7, y + 6)),
        ((x, y - 10), "middle", (x - long / 2, y - 20, x + long / 2, y - 8)), ((x, y + 19), "middle", (x - long / 2, y + 8, x + long / 2, y + 20)),
    ]
    for place in places:
        left, top, right, bottom = place[2]
        if left > 0 and right < width and not any(left < c and a < right and top < d and b < bottom for a, b, c, d in taken):
            return place
    return places[1] if places[0][2][2] > width else places[0]


def rank_diagram(mean: Mapping[str, float], critical: float, groups: Sequence[Sequence[str]]) -> str:
    """Mean ranks on a line, best on the left; a thick bar joins methods within the critical difference (Demsar 2006, Figure 1)."""
    names = list(mean)[:MOST]
    groups = [shown for group in groups if len(shown := [n for n in group if n in names]) > 1]
    groups = [g for i, g in enumerate(groups) if not any(set(g) <= set(h) for h in groups[:i])]  # where names are left out, groups may fall together
    half = (len(names) + 1) // 2
    room = min(206.0, max(map(len, names)) * FONT + 76)
    width, top = 640.0, 58.0 + 12 * len(groups)
    height = top + 20 * half + 14
    last = len(names) if len(names) == len(mean) else max(2, math.ceil(mean[names[-1]]))
    x = Scale(1, last, room, width - room)
    end = x(min(1 + critical, last))
    parts = [line(x.start, 46, x.end, 46, "axis"), line(x(1), 14, end, 14, "axis"), line(x(1), 10, x(1), 18, "axis"),
             *([line(end, 10, end, 18, "axis")] if 1 + critical <= last else []), text(end + 6, 18, f"critical difference {critical:.2f}", "tick")]
    for place in range(1, last + 1, math.ceil(last / MOST)):
        parts += [line(x(place), 42, x(place), 46, "axis"), text(x(place), 36, str(place), "tick", "middle")]
    for i, group in enumerate(groups):
        parts.append(line(x(mean[group[0]]) - 4, 56 + 12 * i, x(mean[group[-1]]) + 4, 56 + 12 * i, "group"))
    for i, name in enumerate(names):
        left = i < half
        y = top + 20 * (i if left else len(names) - 1 - i) + 8
        end = room - 8 if left else width - room + 8
        parts += [line(x(mean[name]), 46, x(mean[name]), y, "axis"), line(x(mean[name]), y, end, y, "axis"),
                  text(end + (-6 if left else 6), y + 4, f"{clipped(name, room - 52)} {mean[name]:.2f}", "name", "end" if left else "start")]
    parts += [text(4, height - 4, f"the best {len(names)} of {len(mean)}", "tick")] if len(names) < len(mean) else []
    return svg(width, height, parts, "Mean ranks: " + ", ".join(f"{n} {mean[n]:.2f}" for n in names))
