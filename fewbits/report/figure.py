"""Figures as SVG that belong to the page: its fonts, its colours, light and dark.

matplotlib draws each figure with placeholder colours, one per role; in the SVG they become CSS variables, so
the browser colours the figure as it does the text around it. A figure is drawn twice, wide and narrow, and
CSS shows the one that fits: scaling one drawing down to a phone would make its labels unreadable.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from fewbits.core.errors import MissingExtra

# Role -> placeholder. The values only need to be distinct and to occur nowhere else.
INK, MUTED, LINE, METHOD, BASELINE, GRID, SURFACE = (f"#01fe{index:02x}" for index in range(1, 8))
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    METHOD: "method",
    BASELINE: "baseline",
    GRID: "grid",
    SURFACE: "surface",
}
WIDE, NARROW = 9.6, 4.1  # inches; a point is about a third larger on the page

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fewbits",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 7.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
    # The page's own text is never a formula: a dollar sign in a layer's name stays one.
    "text.parse_math": False,
}


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "the report") from error
    return matplotlib


def styled() -> AbstractContextManager[None]:
    """The style every figure is drawn in; `MissingExtra` without matplotlib."""
    context: AbstractContextManager[None] = _matplotlib().rc_context(_STYLE)
    return context


def figure(key: str, description: str, draw: Callable[[Any, bool], None], heights: tuple[float, float]) -> str:
    """HTML of a figure: `draw(figure, wide)` fills an empty matplotlib figure, once wide and once narrow.

    key: unique on the page; it keeps the ids of the drawings apart. description: what a reader who cannot see
    it is told. heights: in inches, (wide, narrow).
    """
    _matplotlib()
    from matplotlib.figure import Figure

    drawings = []
    for name, width, height in (("wide", WIDE, heights[0]), ("narrow", NARROW, heights[1])):
        with styled():
            canvas = Figure(figsize=(width, height), layout="constrained")
            draw(canvas, name == "wide")
            buffer = io.StringIO()
            canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        svg = _adopt(buffer.getvalue(), f"{key}-{name}", description)
        drawings.append(f'<div class="{name}">{svg}</div>')
    return f'<div class="figure">{"".join(drawings)}</div>'


def _adopt(svg: str, prefix: str, description: str) -> str:
    """matplotlib's SVG file as an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    label = f'<svg role="img" aria-label="{html.escape(description, quote=True)}" '
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", label, 1)
