"""Writes what auto made of its time into docs/auto.md and draws docs/images/auto.svg.

Reads the newest "auto" record under benchmarks/results; without one the page stays as it is.
"""

from __future__ import annotations

from typing import Any

from recorded import ROOT, latest, source_line, write_between

from fewbits.core.units import duration_text
from fewbits.report.figure import BASELINE, INK, LINE, MUTED, SERIES, save

PAGE = ROOT / "docs" / "auto.md"
FIGURE = ROOT / "docs" / "images" / "auto"
_RINGS = ("v", "^", "P", "X")
NAMES = {"rtn": "rounding to nearest", "gptq": "GPTQ, the default"}


def table(record: dict[str, Any]) -> str:
    lines = ["| format | given | taken | KL | perplexity | foreseen | took |", "|---|---:|---|---:|---:|---:|---:|"]
    for row in record["rows"]:
        choice, kl = row["choice"], row["kl"]
        given = "-" if choice is None else f"{row['minutes']:g} min"
        taken = NAMES.get(row["method"], row["method"]) if choice is None else f"**{choice['chosen']}**"
        foreseen = "-" if choice is None else duration_text(choice["predicted_seconds"])
        lines.append(
            f"| {row['format']} | {given} | {taken} | {kl['mean']:.4f} ± {kl['stderr']:.4f} "
            f"| {row['perplexity']['mean']:.2f} | {foreseen} | {duration_text(row['seconds'])} |"
        )
    return "\n".join(lines)


def draw(canvas: Any, wide: bool, record: dict[str, Any]) -> None:
    """A panel for each format: KL against the time taken."""
    formats = list(dict.fromkeys(row["format"] for row in record["rows"]))
    axes = canvas.subplots(*((1, len(formats)) if wide else (len(formats), 1)), squeeze=False).flat
    limits = [row["seconds"] / 60 for row in record["rows"]] + [
        row["minutes"] for row in record["rows"] if row["choice"]
    ]
    for axis, name in zip(axes, formats, strict=True):
        _panel(axis, name, [row for row in record["rows"] if row["format"] == name])
        axis.set_xscale("log")
        axis.set_xlim(min(limits) / 1.3, max(limits) * 1.3)
        ticks = [tick for tick in (0.2, 0.5, 1, 2, 6, 20, 60) if min(limits) / 1.3 <= tick <= max(limits) * 1.3]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("time taken, minutes")
    axes = canvas.axes
    axes[0].set_ylabel("KL to the original, nats per token")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    canvas.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4 if wide else 1, borderaxespad=0.0)


def _panel(axis: Any, name: str, rows: list[dict[str, Any]]) -> None:
    chosen = sorted((row for row in rows if row["choice"]), key=lambda row: row["minutes"])
    for row in chosen:
        axis.axvline(row["minutes"], color=LINE, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    for row, marker in zip((row for row in rows if not row["choice"]), _RINGS, strict=False):
        axis.errorbar(
            row["seconds"] / 60, row["kl"]["mean"], yerr=row["kl"]["stderr"], color=BASELINE, marker=marker,
            markerfacecolor="none", markersize=6.5, linewidth=0.0, elinewidth=1.0,
            label=NAMES.get(row["method"], row["method"]),
        )  # fmt: skip
    if chosen:
        axis.errorbar(
            [row["seconds"] / 60 for row in chosen], [row["kl"]["mean"] for row in chosen],
            yerr=[row["kl"]["stderr"] for row in chosen], color=SERIES[0], marker="o", markersize=6.5, linewidth=1.4,
            elinewidth=1.0, label="auto (dashed: the time given)",
        )  # fmt: skip
    for row in chosen:
        # Long names are broken at their commas, so that they stay beside their point.
        text = row["choice"]["chosen"].replace(",", ",\n")
        axis.annotate(
            text, (row["seconds"] / 60, row["kl"]["mean"] - row["kl"]["stderr"]), textcoords="offset points",
            xytext=(0, -5), ha="center", va="top", color=INK, fontsize=8.0,
        )  # fmt: skip
    low, high = min(row["kl"]["mean"] for row in rows) / 1.8, max(row["kl"]["mean"] for row in rows) * 1.2
    ticks = [step * 10.0**decade for decade in range(-5, 2) for step in (1, 2, 5)]
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_title(name, color=MUTED)


def main() -> None:
    found = latest("auto")
    if found is None:
        print("no 'auto' record under benchmarks/results: docs/auto.md left as it is")
        return
    path, record = found
    where = f"{record['environment']['cpu']}, {record['environment']['cores']} cores"
    content = (
        f"{table(record)}\n\n![KL against time](images/auto.svg)\n\nOn {where}. {source_line(path, 'bench_auto.py')}"
    )
    write_between(PAGE, auto=content)
    save(FIGURE, lambda figure, wide: draw(figure, wide, record), 4.2, kinds=["svg"])


if __name__ == "__main__":
    main()
