"""Figures as SVG that belong to the page: its fonts, its colours, light and dark.

Drawing code names colours by role. For the page the roles are placeholders that become CSS variables in the SVG,
so the browser colours the figure as it does the text around it. A figure is drawn twice, wide and narrow, and
CSS shows the one that fits: scaling one drawing down to a phone would make its labels unreadable. `save` writes
the wide one as PNG and SVG files, in the page's light colours.

SERIES are for lines that only a legend tells apart: the palette of Okabe and Ito (2008), distinct to readers who
do not see all colours; drawing code varies the marker or the dash as well.
"""

from __future__ import annotations

import html
import importlib.resources
import io
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fewbits.core.errors import MissingExtra
from fewbits.core.record import atomic_path

# The roles, as names of colours that `styled` gives to matplotlib.
_ROLES = ("ink", "muted", "line", "method", "baseline", "grid", "surface", *(f"series{n}" for n in range(1, 8)))
INK, MUTED, LINE, METHOD, BASELINE, GRID, SURFACE, *SERIES = (f"fewbits:{role}" for role in _ROLES)
# Role -> placeholder. The values only need to be distinct and to occur nowhere else.
_PLACEHOLDERS = {role: f"#01fe{index:02x}" for index, role in enumerate(_ROLES, start=1)}
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


def styled(colours: dict[str, str] | None = None) -> AbstractContextManager[None]:
    """The style every figure is drawn in, by default with placeholders for colours; `MissingExtra` without
    matplotlib."""
    matplotlib = _matplotlib()
    from matplotlib.colors import get_named_colors_mapping

    palette = _PLACEHOLDERS if colours is None else colours
    for role in _ROLES:  # one by one: only setting an item makes matplotlib forget the colour it had
        get_named_colors_mapping()[f"fewbits:{role}"] = palette[role]
    context: AbstractContextManager[None] = matplotlib.rc_context(_STYLE)
    return context


def _light() -> dict[str, str]:
    """The page's colours on white, from its style sheet."""
    style = importlib.resources.files("fewbits.report").joinpath("page.css").read_text(encoding="utf-8")
    found = re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6});", style[: style.index("@media")])
    return dict(found)


def label_steps(side: Any, low: float, high: float, text: Callable[[float], str]) -> None:
    """Labels the logarithmic `side` of an axis at decades, at 1-2-5 steps, or finer when short; seven at most."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) > 2:
            break
    side.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 7) or 1]))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def save(
    path: Path, draw: Callable[[Any, bool], None], height: float, kinds: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Writes what `draw` draws wide as `path`.png and `path`.svg, in the page's light colours; their paths."""
    _matplotlib()
    from matplotlib.figure import Figure

    colours, written = _light(), []
    for kind in kinds:
        with styled(colours):
            canvas = Figure(figsize=(WIDE, height), layout="constrained", facecolor=SURFACE)
            draw(canvas, True)
            target = path.with_name(f"{path.name}.{kind}")
            with atomic_path(target) as temporary:
                about = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
                canvas.savefig(temporary, format=kind, dpi=160, metadata=about, facecolor=SURFACE)
        written.append(target)
    return written


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
    for variable, placeholder in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    label = f'<svg role="img" aria-label="{html.escape(description, quote=True)}" '
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", label, 1)
