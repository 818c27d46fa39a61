"""The figures of the report. Each takes what the certificate recorded and returns HTML, or "" without data.

Two series run through all of them: the method that made the checkpoint, filled, in one colour, and
round-to-nearest on the same layers, hollow, in another. Shape tells them apart as well as colour does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fewbits.report.certificate import Certificate, Distribution, Layer, Row
from fewbits.report.figure import BASELINE, GRID, INK, LINE, METHOD, MUTED, figure, label_steps
from fewbits.report.words import change, percent

_MAX_KINDS = 12
_MAX_DISTRIBUTIONS = 6


def _percent_axis(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis of shares, labelled in percent."""
    label_steps(axis, low, high, lambda value: f"{100 * value:.3g} %")


def _beside(axis: Any, x: float, y: float, label: str) -> None:
    """A quiet label to the right of a point."""
    style = {"textcoords": "offset points", "va": "center", "color": MUTED, "fontsize": 8.5}
    axis.annotate(label, (x, y), xytext=(9, 0), **style)


def kinds_of(layers: Sequence[Layer]) -> list[str]:
    """The kinds of layer, in the order in which the model has them."""
    return list(dict.fromkeys(layer.kind for layer in layers))


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _by_block(layers: Sequence[Layer], attribute: str) -> tuple[list[int], list[float]]:
    """(blocks, values of `attribute`): means where a block has several (experts), positive ones only."""
    groups: dict[int, list[float | None]] = {}
    for layer in layers:
        groups.setdefault(layer.block, []).append(getattr(layer, attribute))
    means = {block: _mean(values) for block, values in sorted(groups.items())}
    kept = {block: mean for block, mean in means.items() if mean is not None and mean > 0}
    return list(kept), list(kept.values())


def _bounds(layers: Sequence[Layer]) -> tuple[float, float] | None:
    values = [v for layer in layers for v in (layer.error, layer.rtn_error) if v is not None and v > 0]
    return (min(values) / 1.35, max(values) * 1.35) if values else None


# The two series: filled and hollow, so that shape tells them apart where colour does not.
_DOT: dict[str, Any] = {"color": METHOD, "marker": "o", "markeredgewidth": 0}
_RING: dict[str, Any] = {"color": BASELINE, "marker": "o", "markerfacecolor": "none"}


def _legend(canvas: Any, method: str, baseline: bool) -> None:
    """What the two series are, above the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_DOT, markersize=4.5, linewidth=1.4, label=method.upper())]
    if baseline:
        handles.append(Line2D([], [], **_RING, markersize=4.5, linewidth=1.0, label="round-to-nearest"))
    canvas.legend(handles=handles, loc="outside upper left", ncols=2, borderaxespad=0.0, handlelength=1.8)


def error_by_layer(certificate: Certificate) -> str:
    """Small multiples, one per kind of layer: error over the depth of the model."""
    layers = certificate.layers
    kinds, bounds = kinds_of(layers)[:_MAX_KINDS], _bounds(layers)
    if bounds is None:
        return ""
    baseline = any(layer.rtn_error for layer in layers) and certificate.method.lower() != "rtn"

    def draw(canvas: Any, wide: bool) -> None:
        columns = min(len(kinds), 4 if wide else 2)
        rows = math.ceil(len(kinds) / columns)
        axes = canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for index, axis in enumerate(axes):
            if index >= len(kinds):
                axis.set_axis_off()
                continue
            members = [layer for layer in layers if layer.kind == kinds[index]]
            axis.set_title(_short(kinds[index]))
            axis.set_yscale("log")
            axis.set_ylim(*bounds)
            _percent_axis(axis.yaxis, *bounds)
            if baseline:
                x, y = _by_block(members, "rtn_error")
                axis.plot(x, y, **_RING, linewidth=1.0, markersize=2.6)
            x, y = _by_block(members, "error")
            axis.plot(x, y, **_DOT, linewidth=1.4, markersize=2.6)
            axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            axis.tick_params(axis="x", labelbottom=index + columns >= len(kinds))
        canvas.supxlabel("block", fontsize=9.0, color=MUTED)
        _legend(canvas, certificate.method, baseline)

    rows_wide, rows_narrow = math.ceil(len(kinds) / 4), math.ceil(len(kinds) / 2)
    description = f"Relative error of each layer over the depth of the model, one panel for each of {len(kinds)} kinds"
    return figure("layers", description, draw, (0.6 + 1.75 * rows_wide, 0.6 + 1.5 * rows_narrow))


def error_by_kind(certificate: Certificate) -> str:
    """One line per kind of layer: mean error, from round-to-nearest to the method."""
    layers = certificate.layers
    if _bounds(layers) is None:
        return ""
    rows = []
    for kind in kinds_of(layers)[:_MAX_KINDS]:
        members = [layer for layer in layers if layer.kind == kind]
        error, rtn = _mean([layer.error for layer in members]), _mean([layer.rtn_error for layer in members])
        if error is not None and error > 0:
            comparable = rtn is not None and rtn > 0 and certificate.method.lower() != "rtn"
            rows.append((kind, error, rtn if comparable else None))
    if not rows:
        return ""
    rows.sort(key=lambda row: row[1])

    def draw(canvas: Any, wide: bool) -> None:
        axis = canvas.subplots()
        values = [value for _, error, rtn in rows for value in (error, rtn) if value]
        low, high = (
            min(values) / 1.25,
            max(values) * (max(values) / min(values)) ** (0.2 if wide else 0.5) * 1.1,
        )
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        _percent_axis(axis.xaxis, low, high)
        axis.grid(axis="x")
        axis.grid(False, axis="y")
        axis.set_yticks(range(len(rows)), [_short(kind) for kind, _, _ in rows])
        axis.tick_params(axis="y", labelcolor=INK)
        axis.spines.bottom.set_visible(False)
        for y, (_, error, rtn) in enumerate(rows):
            if rtn:
                axis.plot([error, rtn], [y, y], color=LINE, linewidth=3.0, zorder=1)
                axis.plot(rtn, y, **_RING, markersize=6.5, markeredgewidth=1.5)
            axis.plot(error, y, **_DOT, markersize=7.5)
            label = f"{percent(error)} ({change(error / rtn)})" if rtn else percent(error)
            _beside(axis, max(error, rtn or 0.0), y, label)
        axis.set_xlabel("mean relative error")
        _legend(canvas, certificate.method, any(rtn for _, _, rtn in rows))

    height = 0.95 + 0.32 * len(rows)
    return figure("kinds", "Mean relative error of each kind of layer", draw, (height, height))


def bits_by_layer(certificate: Certificate) -> str:
    """Bits per weight over the depth, one line of cells per kind of layer."""
    layers = [layer for layer in certificate.layers if layer.bits is not None]
    kinds = kinds_of(layers)[:_MAX_KINDS]
    if not kinds:
        return ""
    high = max(8.0, max(layer.bits or 0 for layer in layers))

    def draw(canvas: Any, wide: bool) -> None:
        from matplotlib.patches import Rectangle

        axis = canvas.subplots()
        blocks = max(layer.block for layer in layers) + 1
        for row, kind in enumerate(kinds):
            x, y = _by_block([layer for layer in layers if layer.kind == kind], "bits")
            for block, bits in zip(x, y, strict=True):
                shade = {"facecolor": METHOD, "alpha": 0.15 + 0.85 * bits / high, "linewidth": 0}
                axis.add_patch(Rectangle((block - 0.44, row - 0.40), 0.88, 0.80, **shade))
            low, top = f"{min(y):.2f}", f"{max(y):.2f}"
            _beside(axis, blocks - 0.8, row, low if low == top else f"{low} to {top}")
        axis.set_xlim(-0.6, blocks - 0.4 + blocks * (0.14 if wide else 0.3))
        axis.set_ylim(len(kinds) - 0.4, -0.6)
        axis.set_yticks(range(len(kinds)), list(map(_short, kinds)))
        axis.tick_params(axis="y", labelcolor=INK)
        axis.grid(False)
        axis.spines.bottom.set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick < blocks])
        axis.set_xlabel("block", loc="left")

    height = 0.6 + 0.22 * len(kinds)
    return figure("bits", "Bits per weight of each layer, with its scales", draw, (height, height))


def distributions(certificate: Certificate) -> str:
    """Histograms of the worst layers' weights, the grid's levels drawn over them."""
    shown = certificate.distributions[:_MAX_DISTRIBUTIONS]
    if not shown:
        return ""

    def draw(canvas: Any, wide: bool) -> None:
        columns = min(len(shown), 3 if wide else 1)
        rows = math.ceil(len(shown) / columns)
        axes = canvas.subplots(rows, columns, squeeze=False).flat
        for index, axis in enumerate(axes):
            if index < len(shown):
                _distribution(axis, shown[index])
            else:
                axis.set_axis_off()

    columns, count = min(len(shown), 3), len(shown)
    heights = (0.2 + 1.9 * math.ceil(count / columns), 0.2 + 1.6 * count)
    return figure("weights", f"Weights of the {count} worst layers and the levels of their grids", draw, heights)


def _distribution(axis: Any, data: Distribution) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_yscale("log")
    axis.stairs(data.counts, data.edges, fill=True, color=GRID, alpha=0.85, linewidth=0, baseline=0.5)
    top = max(max(data.counts), 1.0)
    axis.set_ylim(0.5, top * 4)
    width = 1.0 if len(data.levels) <= 32 else 0.4
    axis.vlines(data.levels, 0.5, top * 2, color=METHOD, linewidth=width, alpha=0.7)
    axis.plot(data.levels, [top * 2] * len(data.levels), color=METHOD, linestyle="none", marker="v", markersize=3.2)
    axis.set_title(_short(data.name), fontsize=8.8)
    axis.yaxis.set_major_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(False)
    axis.xaxis.get_major_locator().set_params(nbins=5)
    if data.error is not None:
        axis.set_xlabel(f"relative error {percent(data.error)}", fontsize=8.5)


def _short(name: str) -> str:
    """'model.layers.3.mlp.down_proj' -> '3 · mlp.down_proj'; long names lose their middle."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if numbers and numbers[0] + 1 < len(parts):
        name = f"block {parts[numbers[0]]} · {'.'.join(parts[numbers[0] + 1 :])}"
    return name if len(name) <= 40 else f"{name[:20]}…{name[-18:]}"


def kl_by_position(rows: Sequence[Row]) -> str:
    """Mean KL over the position in the window, with a band of one standard error."""
    shown = [row for row in rows if len(row.positions) > 1]
    if not shown:
        return ""

    def draw(canvas: Any, wide: bool) -> None:
        from matplotlib.ticker import FuncFormatter, NullLocator

        axis = canvas.subplots()
        for row in shown:
            colour = BASELINE if row.key == "rtn" else METHOD
            x = [(part.start + part.end - 1) / 2 + 1 for part in row.positions]
            y = [part.mean for part in row.positions]
            error = [part.stderr or 0.0 for part in row.positions]
            band = [(max(m - e, 0.0), m + e) for m, e in zip(y, error, strict=True)]
            axis.fill_between(x, *zip(*band, strict=True), color=colour, alpha=0.16, linewidth=0)
            axis.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=2.6, label=_name(row))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_ylim(bottom=0)
        axis.yaxis.get_major_locator().set_params(nbins=6)
        axis.set_xlabel("position in the window, tokens")
        axis.set_ylabel("KL, nats per token")
        canvas.legend(loc="outside upper left", ncols=3 if wide else 2, borderaxespad=0.0, handlelength=1.8)

    return figure("positions", "KL divergence from the original by position in the window", draw, (3.3, 3.0))


def _name(row: Row) -> str:
    if row.key == "rtn":
        return "round-to-nearest"
    return row.what.upper() if len(row.what) < 6 else _short(row.what)
