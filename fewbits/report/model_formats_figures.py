"""The figures of `fewbits study formats MODEL`. Each fills a matplotlib figure from the study's results."""

from __future__ import annotations

import bisect
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from fewbits.report import model_formats_results as found
from fewbits.report.figure import BASELINE, INK, METHOD, MUTED, SERIES, SURFACE
from fewbits.report.model_formats_results import Results
from fewbits.report.study_formats import label

_STEPS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 99.0)  # dB below the best that share a colour
_SCALES = {"weights": ("tensor", "channel", "group"), "activations": ("static", "rest", "absmax", "token")}
_WORDS = {"rest": "without first"}


def _panels(canvas: Any, wide: bool, shape: tuple[int, int], **options: Any) -> list[Any]:
    """`shape` (rows, columns) of panels, one below the other where narrow."""
    rows, columns = shape if wide else (shape[0] * shape[1], 1)
    return list(canvas.subplots(rows, columns, squeeze=False, **options).flat)


def layers(canvas: Any, wide: bool, results: Results) -> None:
    """Format by layer: how far below the best, of the model."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    colours = ScalarMappable(BoundaryNorm(_STEPS, 256), "cividis_r")
    axes = _panels(canvas, False, (2, 1))
    for axis, (operand, scale) in zip(axes, found.OPERANDS, strict=True):
        entries = results["model"][operand]
        kinds = found.kinds_of(entries)
        ordered = sorted(entries, key=lambda entry: (kinds.index(entry["kind"]), entry["block"]))
        formats = [*found.of_bits(results, 8), "", *found.of_bits(results, 4)]
        rows = [[_below(results, entry, scale, format) for entry in ordered] if format else [] for format in formats]
        _cells(axis, rows, colours)
        axis.set_xlim(0, len(ordered))
        axis.set_ylim(len(formats), 0)
        axis.set_yticks([index + 0.5 for index in range(len(formats))], [label(format) for format in formats])
        axis.grid(False)
        axis.spines["bottom"].set_visible(False)
        _mark_kinds(axis, wide, [found.short(entry["kind"]) for entry in ordered])
        axis.set_title(f"{operand.capitalize()}, {len(ordered)} layers")
    bar = canvas.colorbar(
        colours, ax=axes, location="bottom", shrink=0.6 if wide else 1.0, aspect=40, pad=0.02, spacing="uniform"
    )
    bar.outline.set_visible(False)
    bar.set_label("dB below the best of as many bits")
    bar.set_ticks(list(_STEPS[:-1]), labels=[f"{step:g}" for step in _STEPS[:-1]])


def _below(results: Results, entry: Mapping[str, Any], scale: str, format: str) -> float:
    best = found.winner(results, entry, scale, results["formats"][format])
    return found.sqnr(results, entry, scale, best) - found.sqnr(results, entry, scale, format)


def _cells(axis: Any, rows: Sequence[Sequence[float]], colours: Any) -> None:
    """A heat map as one shape a colour, runs of a colour joined: the page shows no images, and this stays small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    shapes: dict[int, list[Path]] = {}
    for height, row in enumerate(rows):
        steps = [bisect.bisect_right(_STEPS, value) - 1 for value in row]
        start = 0
        for step, run in itertools.groupby(steps):
            end = start + len(list(run))
            corners = [(start, height), (end, height), (end, height + 1), (start, height + 1), (start, height)]
            shapes.setdefault(step, []).append(Path(corners, closed=True))
            start = end
    for step, paths in shapes.items():
        colour = colours.to_rgba((_STEPS[step] + _STEPS[step + 1]) / 2)
        axis.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=colour, edgecolor=colour, linewidth=0.2))


def _mark_kinds(axis: Any, wide: bool, kinds: Sequence[str]) -> None:
    """The name of each kind under its columns, lines between them."""
    counts = Counter(kinds)
    ends, start, centres = [], 0, []
    for count in counts.values():
        centres.append(start + count / 2)
        start += count
        ends.append(start)
    tilted = {} if wide and len(counts) < 9 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(centres, list(counts), **tilted)
    axis.tick_params(axis="x", length=0)
    for end in ends[:-1]:
        axis.axvline(end, color=SURFACE, linewidth=2.5)


def wins(canvas: Any, wide: bool, results: Results, group: int) -> None:
    """Shares of layers each format wins: 8 and 4 bits, model and contrast."""
    from matplotlib.ticker import PercentFormatter

    axes = _panels(canvas, wide, (2, 2), sharex=wide)
    cases = [(bits, role) for bits in (8, 4) for role in ("model", "contrast")]
    for axis, (bits, role) in zip(axes, cases, strict=True):
        _bars(axis, results, role, bits, group)
        axis.set_title(f"{results[role]['name']}, {bits} bits", pad=24 if wide or bits == 4 else 38)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axis.grid(False)
        axis.legend(
            loc="lower left",
            bbox_to_anchor=(0, 0.98),
            ncols=5 if wide or bits == 4 else 3,
            columnspacing=1.0,
            handlelength=1.0,
            handletextpad=0.4,
            borderpad=0.2,
        )
        if wide and role == "contrast":
            axis.tick_params(axis="y", labelleft=False)


def _colour(format: str) -> int:
    """By exponent bits, integers first and tables last, so that it means the same at any width."""
    exponent = re.search(r"_e(\d)m", format)
    return int(exponent[1]) - 1 if exponent else 0 if format.startswith("int") else 5


def _bars(axis: Any, results: Results, role: str, bits: int, group: int) -> None:
    rows = [(operand, scale) for operand, scales in _SCALES.items() for scale in scales]
    formats = found.of_bits(results, bits)
    heights = [index + (0.5 if operand == "activations" else 0.0) for index, (operand, _) in enumerate(rows)]
    left = [0.0] * len(rows)
    for format in formats:
        shares = []
        for operand, scale in rows:
            entries = results[role][operand]
            best = [found.winner(results, entry, scale, bits) for entry in entries]
            shares.append(best.count(format) / max(len(best), 1))
        colour = SERIES[_colour(format)]
        axis.barh(heights, shares, left=left, height=0.72, color=colour, label=label(format), linewidth=0)
        for height, start, share in zip(heights, left, shares, strict=True):
            if share >= 0.14:
                style = {"ha": "center", "va": "center", "color": SURFACE, "fontsize": 8.0}
                axis.text(start + share / 2, height, label(format), **style)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    words = [
        f"{operand}, {scale} {group}" if scale == "group" else f"{operand}, {_WORDS.get(scale, scale)}"
        for operand, scale in rows
    ]
    axis.set_yticks(heights, words)
    axis.invert_yaxis()


_MARKS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("weights", "tensor", "weights", {"marker": "o", "color": SERIES[0], "markerfacecolor": "none"}),
    ("activations", "static", "activations", {"marker": "D", "color": SERIES[1], "markeredgewidth": 0}),
    ("activations", "rest", "activations without first tokens, where that changes much", {"marker": "x", "color": INK}),
)
_MUCH = 0.5  # dB


def tails(canvas: Any, wide: bool, results: Results) -> None:
    """E4M3 ahead of INT8, against the largest magnitude over the rms."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = _panels(canvas, wide, (1, 2), sharex=True, sharey=True)
    for axis, role in zip(axes, ("model", "contrast"), strict=True):
        for operand, scale, text, style in _MARKS:
            at = [_point(results, entry, scale) for entry in results[role][operand] if _shown(results, entry, scale)]
            options = {"linestyle": "none", "markersize": 4.0, "alpha": 0.8, "label": text}
            axis.plot([x for x, _ in at], [y for _, y in at], **options, **style)
        axis.axhline(0, color=INK, linewidth=0.9)
        low, high = min(found.peaks(results)) / 1.2, max(found.peaks(results)) * 1.2
        dotted = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (1, 1.6))}
        axis.plot([low, high], [found.unclipped(results, at) for at in (low, high)], label="INT8 unclipped", **dotted)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.tick_params(axis="x", labelbottom=True)
        axis.set_title(results[role]["name"])
        axis.set_xlabel("largest magnitude of the tensor / its rms")
        if axis is axes[0] or not wide:
            axis.set_ylabel("SQNR of E4M3 less that of INT8, dB")
        style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "color": MUTED}
        axis.annotate("E4M3 better", (1, 0), xytext=(-2, 4), va="bottom", fontsize=8.5, **style)
        axis.annotate("INT8 better", (1, 0), xytext=(-2, -4), va="top", fontsize=8.5, **style)
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper left", ncols=4 if wide else 1, borderaxespad=0.0)


def _point(results: Results, entry: Mapping[str, Any], scale: str) -> tuple[float, float]:
    of = entry["rest"] if scale == "rest" else entry
    return of["peak"], found.gain(results, entry, scale)


def _shown(results: Results, entry: Mapping[str, Any], scale: str) -> bool:
    """Whether the point is one of its own: without first tokens only where the two differ."""
    return scale != "rest" or abs(found.gain(results, entry, "rest") - found.gain(results, entry, "static")) > _MUCH


_NETWORKS = {
    "model": {"color": METHOD, "marker": "o", "markeredgewidth": 0},
    "contrast": {"color": BASELINE, "marker": "s", "markerfacecolor": "none"},
}


def contrast(canvas: Any, wide: bool, results: Results) -> None:
    """Medians by format of the two networks, and what a Gaussian has."""
    panels = (
        ("weights", "tensor", "Weights, one scale a tensor"),
        ("activations", "static", "Activations, one static scale"),
        ("activations", "token", "Activations, a scale a token"),
    )
    groups = [found.of_bits(results, bits) for bits in (8, 4)]
    formats = [format for group in groups for format in group]
    # A gap between 8 and 4 bits.
    places = {format: index + (0.6 if format in groups[1] else 0) for index, format in enumerate(formats)}
    axes = _panels(canvas, wide, (1, len(panels)), sharey=wide)
    for axis, (operand, scale, title) in zip(axes, panels, strict=True):
        for index, group in enumerate(groups if scale != "token" else []):
            exact = [results["gaussian"][format] for format in group]
            style = {"color": INK, "linestyle": (0, (1, 1.6)), "linewidth": 1.2}
            axis.plot([places[f] for f in group], exact, label="Gaussian values, exact" if not index else None, **style)
        for shift, (role, style) in zip((-0.14, 0.14), _NETWORKS.items(), strict=True):
            spread = [_spread(results, role, operand, scale, format) for format in formats]
            x = [places[format] + shift for format in formats]
            axis.vlines(x, [low for low, _, _ in spread], [high for _, _, high in spread], color=style["color"], lw=1.2)
            middle = [value for _, value, _ in spread]
            axis.plot(x, middle, linestyle="none", markersize=5.0, label=results[role]["name"], **style)
        axis.set_title(title)
        ticks = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(list(places.values()), [label(format) for format in formats], **ticks)
        if axis is axes[0] or not wide:
            axis.set_ylabel("SQNR, dB")
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper left", ncols=3 if wide else 1, borderaxespad=0.0)


def _spread(results: Results, role: str, operand: str, scale: str, format: str) -> tuple[float, float, float]:
    """Tenth percentile, median and ninetieth over the layers."""
    values = [found.sqnr(results, entry, scale, format) for entry in results[role][operand]]
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], median(values), tenths[-1]
