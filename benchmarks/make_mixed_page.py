"""Writes mixed bit-rates, between linears and within them, into docs/plans.md and draws docs/images/mixed.svg.

Reads the newest "mixed" and "within" records under benchmarks/results; what has no record stays as it is.
"""

from __future__ import annotations

from typing import Any

from recorded import ROOT, latest, source_line, write_between

from fewbits.report.figure import BASELINE, LINE, METHOD, save

PAGE = ROOT / "docs" / "plans.md"
FIGURE = ROOT / "docs" / "images" / "mixed"


def table(record: dict[str, Any], names: tuple[str, str] = ("uniform", "planned"), ratio: str = "ratio") -> str:
    first, second = names
    lines = [
        f"| budget | {first}: bits | KL | perplexity | {second}: bits | KL | perplexity | {second} / {first} |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        cells = [f"{row['bits']:.1f}"]
        for name in names:
            found = row[name]
            kl = found["kl"]
            cells += [
                f"{found['bits_per_weight']:.3f}",
                f"{kl['mean']:.4f} ± {kl['stderr']:.4f}",
                f"{found['perplexity']['mean']:.2f}",
            ]
        cells.append(f"{row[ratio]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(canvas: Any, record: dict[str, Any]) -> None:
    """Bits against KL, with what the plan saves written between the two."""
    axes, rows = canvas.subplots(), sorted(record["rows"], key=lambda row: row["bits"])
    for name, colour, marker in (("uniform", BASELINE, "s"), ("planned", METHOD, "o")):
        found = [row[name] for row in rows]
        axes.errorbar(
            [each["bits_per_weight"] for each in found], [each["kl"]["mean"] for each in found],
            yerr=[each["kl"]["stderr"] for each in found], color=colour, marker=marker, markersize=6, linewidth=1.4,
            elinewidth=1.0, label=name,
        )  # fmt: skip
    for row in rows:
        at, kl = row["planned"]["bits_per_weight"], row["planned"]["kl"]
        axes.annotate(
            f"{100 * (row['ratio'] - 1):.0f} %", (at, kl["mean"] - kl["stderr"]), textcoords="offset points",
            xytext=(0, -6), ha="center", va="top", color=METHOD, fontsize=8.5,
        )  # fmt: skip
    axes.set_yscale("log")
    lowest = min(row["planned"]["kl"]["mean"] for row in rows)
    axes.set_ylim(bottom=lowest / 1.4)
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, axis="both", color=LINE)
    axes.set_xlabel("bits per weight, scales and zero points counted")
    axes.set_ylabel("KL to the original, nats per token")
    axes.legend(loc="upper right")


def main() -> None:
    if found := latest("mixed"):
        path, record = found
        figure = "![Bits against KL, uniform and planned](images/mixed.svg)"
        write_between(PAGE, mixed=f"{table(record)}\n\n{figure}\n\n{source_line(path, 'bench_mixed.py')}")
        save(FIGURE, lambda canvas, _: draw(canvas, record), 3.6, kinds=["svg"])
    else:
        print("no 'mixed' record under benchmarks/results: its part of docs/plans.md left as it is")
    if found := latest("within"):
        path, record = found
        shown = table(record, ("planned", "within"), "within_ratio")
        write_between(PAGE, within=f"{shown}\n\n{source_line(path, 'bench_mixed.py --within')}")
    else:
        print("no 'within' record under benchmarks/results: its part of docs/plans.md left as it is")


if __name__ == "__main__":
    main()
