"""A figure of matplotlib's as SVG within a page: in the page's colours, dark and light, and its font, with what a pointer is told, and small.

Without pyplot, and without changing or heeding settings of others. Sizes are in pixels.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 12
VARIABLES = ("text", "quiet", "rule", "ground", *(f"c{i}" for i in range(COLOURS)))  # colours in the style sheet of results/report.html
SAID = "said: "  # begins a gid: the rest is told on hover
ILLEGAL = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML


def ink(variable: str) -> str:
    """What stands for a colour of the page until `reduced` names it."""
    return f"#fade{VARIABLES.index(variable):02x}"


STYLE = {
    "axes.axisbelow": True, "axes.formatter.useoffset": False, "axes.grid": True, "axes.labelcolor": ink("quiet"), "font.size": 12, "grid.color": ink("rule"),
    "lines.solid_capstyle": "butt", "svg.fonttype": "none", "svg.hashsalt": "", "text.color": ink("text"), "text.parse_math": False,
}


def drawn(paint: Callable[[Axes], None], label: str, aloud: str, width: float, height: float) -> str:
    """A picture that scales with the page: `label`, and below it what `paint` draws in the colours of `ink`. `aloud` is read aloud."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # the reader's fonts have it
        figure = Figure((width / 72, height / 72), dpi=72, layout="constrained", frameon=False)
        canvas = FigureCanvasSVG(figure)
        figure.suptitle(label, x=0.01, ha="left", size=12, color=ink("quiet"))
        axes = figure.add_subplot(frame_on=False)
        axes.tick_params(left=False, bottom=False, labelsize=11, labelcolor=ink("quiet"))
        paint(axes)
        canvas.print_svg(stream, metadata={"Date": None})
    text = ILLEGAL.sub("?", stream.getvalue())
    mark = hashlib.sha256(text.encode()).hexdigest()[:6]  # no id is that of another chart of the page
    parts = "".join(ElementTree.tostring(e, encoding="unicode") for e in reduced(ElementTree.fromstring(text), mark))
    size, aloud = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px"', html.escape(ILLEGAL.sub("?", aloud))
    return f'<svg {size} role="img" aria-label="{aloud}">{parts}</svg>'


def reduced(element: ElementTree.Element, mark: str) -> list[ElementTree.Element]:
    """What a page needs of an element, a fifth of what matplotlib writes: of a group that says nothing its children, tenths of pixels, no clipping."""
    tag, name = element.tag.rpartition("}")[2], element.get("id", "")
    children = [c for child in element for c in reduced(child, mark)] if tag not in ("metadata", "style", "clipPath") else []
    if tag not in ("path", "text", "use") and not (children and (tag == "defs" or name.startswith(SAID))):
        return children
    found = ElementTree.Element(tag, {k: rounded(element.attrib[k]) for k in ("d", "x", "y") if k in element.attrib})
    if tag == "path" and name:  # a mark that `use` draws, in the colours that it names
        found.set("id", f"{name}-{mark}")
    elif look := re.sub("font-family:[^;]*;? ?", "", element.get("style", "")):
        found.set("style", re.sub("#fade(..)", lambda hit: f"var(--{VARIABLES[int(hit[1], 16)]})", look))
    if tag == "use":
        found.set("href", f"{element.get('{http://www.w3.org/1999/xlink}href')}-{mark}")
    if name.startswith(SAID):
        ElementTree.SubElement(found, "title").text = name.removeprefix(SAID)
    found.text = element.text if tag == "text" else None
    found.extend(children)
    return [found]


def rounded(numbers: str) -> str:
    """Coordinates to a tenth of a pixel, without room around letters."""
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", re.sub(r"-?\d+\.\d+", lambda hit: f"{round(float(hit[0]), 1) + 0.0:g}", numbers).strip())
