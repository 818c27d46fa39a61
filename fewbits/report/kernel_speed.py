"""What `fewbits bench kernels` measured: a table, and a figure of time against the number of tokens for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewbits.report.figure import INK, LINE, METHOD, SERIES, save


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['us']:.1f}"


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: shape, tokens, roof of the first contestant, then microseconds of each.

    "-" for what was not measured, or not asked for; a line of nothing else is left out.
    """
    names = list(record["accuracy"])  # of all contestants that were here, ours first
    found = {(row["who"], row["shape"], row["tokens"]): row for row in record["rows"] if "us" in row}
    lines = []
    for shape, (n, k) in record["shapes"].items():
        for m in record["tokens"]:
            if not any((name, shape, m) in found for name in names):
                continue
            ours, share = found.get((names[0], shape, m)), "-"
            if ours is not None and m <= 256:
                share = f"{ours['roof_us']:.1f} ({100 * ours['roof_us'] / ours['us']:.0f} %)"
            lines.append([f"{shape} {n} x {k}", str(m), share, *(_cell(found.get((name, shape, m))) for name in names)])
    return ["shape", "tokens", "roof (reached)", *names], lines


def accuracy_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Decibels of the product against float32: with the weights it decodes, and with the original ones."""
    kinds = ("few", "many", "prompt")
    keys = [f"{what}_{kind}" for what in ("kernel_sqnr", "sqnr") for kind in kinds]
    rows = [
        [name, *(f"{found[key]:.1f}" if key in found else "-" for key in keys)]
        for name, found in record["accuracy"].items()
    ]
    return ["", "kernel, 8 tokens", "kernel, 64", "256", "with rounding of weights, 8 tokens", "64", "256"], rows


def draw(record: dict[str, Any], to: Path) -> None:
    """Writes the figure as `to`.svg and `to`.png: a panel a shape, both axes logarithmic, the roof drawn in."""
    names = list(record["accuracy"])
    shapes = list(record["shapes"].items())
    across = min(3, len(shapes))
    down = -(-len(shapes) // across)

    def fill(canvas: Any, _: bool) -> None:
        panels = canvas.subplots(down, across, squeeze=False).flat
        for panel, (shape, (n, k)) in zip(panels, shapes, strict=False):
            _panel(panel, [row for row in record["rows"] if row["shape"] == shape and "us" in row], names)
            panel.set_title(f"{shape}, {n} x {k}", fontsize=9)
            panel.set_xticks(record["tokens"], [str(m) for m in record["tokens"]])
        handles, labels = panels[0].get_legend_handles_labels()
        for spare in panels[len(shapes) :]:
            spare.axis("off")
        panels[0].set_ylabel("microseconds a product")
        panels[len(shapes) - 1].set_xlabel("tokens")
        canvas.legend(handles, labels, loc="outside lower center", ncols=4)

    save(to, fill, 2.4 * down + 0.8)


def _panel(panel: Any, rows: list[dict[str, Any]], names: Sequence[str]) -> None:
    for name, colour in zip(names, (METHOD, *SERIES, *SERIES), strict=False):
        points = [row for row in rows if row["who"] == name]
        ours = name == names[0]
        panel.plot(
            [point["tokens"] for point in points], [point["us"] for point in points], color=colour, label=name,
            marker="o" if ours else "s", markersize=4 if ours else 2.5, linewidth=2 if ours else 1,
            zorder=3 if ours else 2,
        )  # fmt: skip
    roof = [row for row in rows if row["who"] == names[0] and row["tokens"] <= 256]
    panel.plot(
        [row["tokens"] for row in roof], [row["roof_us"] for row in roof], color=INK, linewidth=1, linestyle=":",
        label="reading our bytes",
    )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.minorticks_off()
    panel.grid(True, axis="both", color=LINE)
