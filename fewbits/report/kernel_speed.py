"""What `fewbits bench kernels` measured: a table, and a figure of time against the number of tokens for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewbits.report.figure import GRID, INK, METHOD, MUTED

_COLOURS = (METHOD, "#3b6ea5", "#7a9a01", "#b5651d", "#7d5ba6", "#999999", "#444444")


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None or "us" not in row else f"{row['us']:.1f}"


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: shape, tokens, roof of the first contestant, then microseconds of each."""
    names = list(dict.fromkeys(row["who"] for row in record["rows"]))
    found = {(row["who"], row["shape"], row["tokens"]): row for row in record["rows"]}
    lines = []
    for shape, (n, k) in record["shapes"].items():
        for m in record["tokens"]:
            ours = found.get((names[0], shape, m))
            if ours is None or "us" not in ours:
                continue
            share = f"{ours['roof_us']:.1f} ({100 * ours['roof_us'] / ours['us']:.0f} %)" if m <= 256 else "-"
            lines.append([f"{shape} {n} x {k}", str(m), share, *(_cell(found.get((name, shape, m))) for name in names)])
    return ["shape", "tokens", "roof (reached)", *names], lines


def accuracy_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Decibels of the product against float32: with the weights it decodes, and with the original ones."""
    keys = ("kernel_sqnr_few", "kernel_sqnr_many", "sqnr_few", "sqnr_many")
    rows = [
        [name, *(f"{found[key]:.1f}" if key in found else "-" for key in keys)]
        for name, found in record["accuracy"].items()
    ]
    return ["", "kernel, 8 tokens", "kernel, 64", "with rounding of weights, 8 tokens", "64"], rows


def draw(record: dict[str, Any], to: Path, only: Sequence[str] | None = None) -> None:
    """Writes the figure (svg or png): a panel a shape, both axes logarithmic, the roof drawn in."""
    from matplotlib.figure import Figure

    names = [n for n in dict.fromkeys(row["who"] for row in record["rows"]) if only is None or n in only]
    shapes = list(record["shapes"].items())
    figure = Figure(figsize=(3.1 * len(shapes), 3.5), layout="constrained")
    axes = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axis, (shape, (n, k)) in zip(axes, shapes, strict=True):
        for index, name in enumerate(names):
            points = [r for r in record["rows"] if r["who"] == name and r["shape"] == shape and "us" in r]
            ours = index == 0
            axis.plot(
                [p["tokens"] for p in points], [p["us"] for p in points], marker="o", markersize=4 if ours else 3,
                color=_COLOURS[index % len(_COLOURS)], linewidth=2 if ours else 1, label=name, zorder=3 if ours else 2,
            )  # fmt: skip
        roof = [r for r in record["rows"] if r["who"] == names[0] and r["shape"] == shape and "us" in r]
        few = [r for r in roof if r["tokens"] <= 256]
        axis.plot(
            [r["tokens"] for r in few], [r["roof_us"] for r in few], color=INK, linewidth=1, linestyle=":",
            label="memory roof of 4 bits",
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{shape}\n{n} x {k}", fontsize=9.5, color=INK)
        axis.set_xlabel("tokens", fontsize=9, color=MUTED)
        axis.set_xticks(record["tokens"], [str(m) for m in record["tokens"]], fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(True, which="major", color=GRID, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("microseconds a product", fontsize=9, color=MUTED)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8.5, frameon=False)
    figure.savefig(to)
