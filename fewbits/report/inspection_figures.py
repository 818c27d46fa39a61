"""The figures of `fewbits inspect`: sizes, loss against size, errors by layer, outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.core.units import bytes_text
from fewbits.report.figure import GRID, METHOD, MUTED, SERIES
from fewbits.report.labels import place

Row = Mapping[str, Any]

# Kinds of scheme: label, marker, colour.
_GROUPS = (
    ("weights only", "o", SERIES[0]),
    ("weights and activations", "s", SERIES[1]),
    ("for diagnosis", "X", SERIES[6]),
)
_MAPPED = 4  # schemes with a heat map
_LADDER = (1, 3)  # steps of the heat maps' colours within a decade


def sizes(canvas: Any, wide: bool, parts: Sequence[Row]) -> None:
    axis = canvas.subplots()
    rows = [part for part in parts if part["bytes"]][::-1]
    millions = [part["bytes"] / 1e6 for part in rows]
    colours = [METHOD if part["quantized"] else GRID for part in rows]
    axis.barh(range(len(rows)), millions, color=colours, height=0.62)
    total = sum(millions)
    for index, value in enumerate(millions):
        text = f"{bytes_text(1e6 * value)}, {100 * value / total:.1f} %"
        axis.annotate(
            text, (value, index), xytext=(5, 0), textcoords="offset points", va="center", color=MUTED, fontsize=8.5
        )
    axis.set_yticks(range(len(rows)), [part["part"] for part in rows])
    axis.set_xlim(0, max(millions) * (1.25 if wide else 1.75))
    axis.set_xlabel("MB on disk")
    axis.grid(visible=False)
    _legend(canvas, [("can be quantized", "s", METHOD), ("stays as it is", "s", GRID)])


def _legend(canvas: Any, entries: Sequence[tuple[str, str, str]], columns: int = 3) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=6, label=label)
        for label, marker, colour in entries
    ]
    canvas.legend(
        handles=handles, loc="outside upper left", ncols=columns, borderaxespad=0.0, handletextpad=0.3,
        columnspacing=1.2,
    )  # fmt: skip


def _group(row: Row) -> int:
    return 2 if not row["command"] else 1 if row["activations"] else 0


def loss(canvas: Any, wide: bool, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = canvas.subplots()
    shown = [row for row in rows if row["kl"]["mean"] > 0]
    frontier = _frontier([row for row in shown if row["command"]])
    axis.plot(*zip(*frontier, strict=True), color=GRID, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for row in shown:
        _, marker, colour = _GROUPS[_group(row)]
        mean, error = row["kl"]["mean"], row["kl"]["stderr"] or 0.0
        low = min(error, 0.9 * mean)  # a logarithmic axis ends above zero
        axis.errorbar(
            row["bytes"] / 1e6, mean, yerr=[[low], [error]], fmt=marker, color=colour, markersize=5.5, elinewidth=1.0
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.margins(x=0.22 if wide else 0.3, y=0.06)
    axis.set_xlabel("weights, MB")
    axis.set_ylabel("KL to the original, nats per token")
    used = sorted({_group(row) for row in shown})
    _legend(canvas, [_GROUPS[index] for index in used], 3 if wide else 2)
    points = [(row["bytes"] / 1e6, row["kl"]["mean"]) for row in shown]
    place(canvas, axis, points, [row["label"] for row in shown], 8.0 if wide else 7.0)


def _frontier(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(MB, KL) of the schemes that no smaller one betters, by size."""
    kept: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row["bytes"], row["kl"]["mean"])):
        if not kept or row["kl"]["mean"] < kept[-1][1]:
            kept.append((row["bytes"] / 1e6, row["kl"]["mean"]))
    return kept or [(math.nan, math.nan)]


# ---- heat maps


def mapped(results: Mapping[str, Any]) -> list[str]:
    """The schemes whose layers are shown: first those recommended, then the outlier diagnosis, least loss first."""
    labels = [row["label"] for row in results["schemes"]]
    recommended = [choice["scheme"] for choice in results["recommended"] if choice["scheme"]]
    diagnosed = [row["label"] for row in results["schemes"] if not row["command"]]
    wanted = list(dict.fromkeys([*recommended[:3], *diagnosed[:1], *labels]))[:_MAPPED]
    return [label for label in labels if label in wanted]


def layer_heights(results: Mapping[str, Any]) -> tuple[float, float]:
    count = len(mapped(results))
    kinds = len(results["errors"][mapped(results)[0]])
    panel = 0.6 + 0.19 * kinds
    return 0.9 + panel * math.ceil(count / 2), 0.9 + panel * count


def layers(canvas: Any, wide: bool, results: Mapping[str, Any]) -> None:
    labels = mapped(results)
    columns = 2 if wide and len(labels) > 1 else 1
    axes = canvas.subplots(math.ceil(len(labels) / columns), columns, squeeze=False, sharex=True, sharey=True).flatten()
    values = [value for label in labels for series in results["errors"][label].values() for value in series if value]
    levels = _levels(min(values, default=0.01), max(values, default=0.1))
    mesh = None
    for index, (axis, label) in enumerate(zip(axes, labels, strict=False)):
        mesh = _heat(axis, results["errors"][label], levels)
        axis.set_title(label)
        lowest = index + columns >= len(labels)
        axis.tick_params(labelbottom=lowest)
        axis.set_xlabel("block" if lowest else "")
    for axis in axes[len(labels) :]:
        axis.set_axis_off()
    _bar(canvas, mesh, levels, [f"{100 * level:.3g} %" for level in levels], "share of the output's energy changed")


def _levels(low: float, high: float) -> list[float]:
    """Steps of 1 and 3 in every decade that cover [low, high], six decades at most."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    first = max(first, last - 6)
    steps = [step * 10.0**decade for decade in range(first, last) for step in _LADDER] + [10.0**last]
    inside = [level for level in steps if low / 3.5 <= level <= high * 3.5]
    return inside if len(inside) > 1 else steps[:2]


def _heat(axis: Any, table: Mapping[str, Sequence[float | None]], levels: Sequence[float]) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    kinds = list(table)
    colours = colormaps["cividis"].resampled(len(levels) - 1)
    grid = [[math.nan if value is None else value for value in table[kind]] for kind in kinds]
    mesh = axis.pcolormesh(
        [index - 0.5 for index in range(len(grid[0]) + 1)],
        range(len(kinds) + 1),
        grid,
        cmap=colours,
        edgecolors="face",  # no hairlines between cells
        linewidth=0.4,
        norm=BoundaryNorm(list(levels), len(levels) - 1, clip=True),
    )
    axis.set_yticks([index + 0.5 for index in range(len(kinds))], kinds)
    axis.set_ylim(len(kinds), 0)
    axis.grid(visible=False)
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=7)
    return mesh


def _bar(canvas: Any, mesh: Any, levels: Sequence[float], texts: Sequence[str], label: str, axes: Any = None) -> None:
    """The legend of a heat map; where it is crowded every second step is labelled."""
    step = 1 if canvas.get_figwidth() > 7 or len(levels) < 7 else 2
    ticks = list(levels)[::step]
    bar = canvas.colorbar(mesh, ax=axes or canvas.axes, location="bottom", ticks=ticks, aspect=45, pad=0.03)
    bar.set_ticklabels(list(texts)[::step], color=MUTED)
    bar.ax.tick_params(length=0, labelsize=7.5)
    bar.ax.minorticks_off()
    bar.set_label(label, color=MUTED, fontsize=8.5)
    bar.outline.set_visible(False)


def outliers(canvas: Any, wide: bool, found: Row) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    left, right = canvas.subplots(*((1, 2) if wide else (2, 1)))
    series = (
        ("first tokens, largest", found["largest"]["first"], "o", SERIES[1]),
        ("delimiters, largest", found["largest"]["delimiter"], "s", SERIES[0]),
        ("other tokens, largest", found["largest"]["other"], "D", SERIES[2]),
        ("all, median", found["median"], "^", SERIES[6]),
    )
    for label, values, marker, colour in series:
        shown = [value if value > 0 else math.nan for value in values]
        left.plot(range(len(shown)), shown, color=colour, marker=marker, markersize=3.2, linewidth=1.3, label=label)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(numticks=8))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    left.set_title("Residual stream after each block", pad=34)
    left.set_xlabel("block")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("magnitude")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, columnspacing=1.2, handlelength=1.6, borderpad=0.2)
    peaks = found["peaks"]
    values = [value for series_ in peaks.values() for value in series_ if value]
    levels = _levels(min(values, default=1.0), max(values, default=10.0))
    mesh = _heat(right, peaks, levels)
    right.set_title("Peak of each linear's input")
    right.set_xlabel("block")
    _bar(canvas, mesh, levels, [f"{level:g}" for level in levels], "max |x| / root mean square", [right])
