"""Writes what docs/w8a8.md says of results, tables and figure, from the newest "w8a8", "prefill" and
"w8a8_peers" records.

python benchmarks/make_w8a8_page.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench_w8a8 import FACTORS
from peers import w8a8_page
from recorded import ROOT, every, latest, source_line, write_between
from rows import devices, rise

from fewbits.report.figure import INK, SERIES, save

PAGE = ROOT / "docs" / "w8a8.md"
FIGURE = ROOT / "docs" / "images" / "w8a8"
# Row -> what the figure and the table call it, colour, marker, dash.
ROTATED = "SmoothQuant, down_proj rotated"
LINES: dict[str, tuple[str, int, str, Any]] = {
    "static": ("one static scale a linear", 5, "X", (1, 1)),
    "token": ("one scale a token", 4, "s", (4, 2)),
    "llm_int8": ("LLM.int8(), outliers from 6", 1, "^", (2, 1, 2, 1)),
    "smoothquant": ("SmoothQuant, one scale a token", 0, "o", (1, 0)),
    "static smoothquant, down_proj rotated, sinks apart": (f"{ROTATED}, one static scale", 2, "v", (5, 1, 1, 1)),
    "smoothquant, down_proj rotated": (f"{ROTATED}, one scale a token", 6, "P", (2, 2)),
    "rotate": ("rotation, one scale a token", 3, "D", (3, 1)),
    "llm_int8 at 2": ("LLM.int8(), outliers from 2", 1, "<", (1, 0)),
}
_TEXT = """## What outliers cost

The embedded model, weights in INT8 with one scale a row and rounded to nearest unless said. Rise of the perplexity over
fp32 in %, ± one standard error by windows: {windows} of 512 tokens that no method learns from; methods learn from
{learned} others. `python benchmarks/bench_w8a8.py` ({device}).

![Perplexity over fp32 as outliers grow](images/w8a8.png)

{factors}
Without injected outliers:

{one}
{source}
"""
LEAST = 0.02  # percent: what the figure draws of anything that loses less


def command(row: dict[str, Any]) -> str:
    """How `row` is asked for, without what injects outliers."""
    method = row["method"].removeprefix("inject,")
    options = {name: value for name, value in row["options"].items() if not name.startswith("inject.")}
    text = f"`--scheme {row['scheme']} --method {method}"
    text += "".join(f" --option {name}={str(value).lower()}" for name, value in options.items())
    if row["act_range"] not in (None, "absmax"):
        text += f" --act-range {row['act_range']}"
    return text + "`"


def percent(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    share, error = rise(row)
    digits = 2 if abs(share) < 0.1 else 1 if share < 10 else 0
    return f"{100 * share:+,.{digits}f} ± {100 * error:,.{digits}f}"


def label(factor: int) -> str:
    return "as it is" if factor == 1 else f"x {factor}"


def by_factor(rows: dict[tuple[str, int], dict[str, Any]]) -> str:
    measured = [factor for factor in FACTORS if any((name, factor) in rows for name in LINES)]
    lines = [f"| | {' | '.join(map(label, measured))} |", "|---|" + "---:|" * len(measured)]
    for name, (called, *_) in LINES.items():
        cells = [percent(rows.get((name, factor))) for factor in measured]
        if set(cells) != {"-"}:
            lines.append(f"| {called} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def at_one(rows: dict[tuple[str, int], dict[str, Any]]) -> str:
    lines = ["| | perplexity over fp32, % | KL | bits per weight |", "|---|---:|---:|---:|"]
    ordered = sorted((row for (_, factor), row in rows.items() if factor == 1), key=lambda row: row["kl"]["mean"])
    for row in ordered:
        kl = row["kl"]
        found = f"{kl['mean']:.5f} ± {kl['stderr']:.5f}"
        lines.append(f"| {command(row)} | {percent(row)} | {found} | {row['bits_per_weight']:.2f} |")
    return "\n".join(lines) + "\n"


def draw(figure: Any, rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    axis = figure.subplots()
    for name, (called, colour, marker, dash) in LINES.items():
        found = [(factor, *rise(rows[name, factor])) for factor in FACTORS if (name, factor) in rows]
        if not found:
            continue
        axis.errorbar(
            [factor for factor, _, _ in found], [max(100 * share, LEAST) for _, share, _ in found],
            yerr=[100 * error for _, _, error in found], label=called, color=SERIES[colour], marker=marker,
            markersize=5.5, linewidth=1.6, dashes=dash, elinewidth=0.9, capsize=2,
        )  # fmt: skip
    axis.axhline(2, color=INK, linewidth=0.8, dashes=(1, 2))
    axis.text(1.005, 2, "+2 %", transform=axis.get_yaxis_transform(), va="center", fontsize=8.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    least = min(rise(row)[0] for (name, _), row in rows.items() if name in LINES)
    axis.set_ylim(bottom=max(100 * least / 3, LEAST / 1.4))
    measured = [factor for factor in FACTORS if any((name, factor) in rows for name in LINES)]
    axis.set_xticks(measured, [label(factor) for factor in measured])
    axis.yaxis.set_major_formatter(lambda value, _: f"+{value:,.10g} %")
    axis.set_xlabel("size of six injected outlier channels")
    axis.set_ylabel("perplexity over fp32")
    figure.legend(loc="outside lower center", ncols=2)


def instructions(record: dict[str, Any]) -> str:
    """Which of the narrow products the record's CPU has instructions for."""
    having = [name for name, has in record.get("multiplies", {}).items() if has]
    return f"with instructions for {' and '.join(having)}" if having else "without instructions for INT8 or bfloat16"


def prefill() -> str:
    """A prompt through whole models, and the products it is made of: the newest record of each kind of CPU."""
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path, record in every("prefill"):
        newest.setdefault(instructions(record), (path, record))
    return "\n".join(prefill_on(kind, *found) for kind, found in newest.items())


def prefill_on(kind: str, path: Path, record: dict[str, Any]) -> str:
    models = [row for row in record["rows"] if "model" in row]
    base = next(row["seconds"] for row in models if row["model"] == "transformers, bfloat16")
    parts = list(models[0].get("spent", {}))  # older records have none
    titles = ["tokens/s", "times bfloat16", *(["ms", *(f"of it {part}" for part in parts)] if parts else [])]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row in models:
        times = [f"{1e3 * value:.0f}" for value in (row["seconds"], *row["spent"].values())] if parts else []
        cells = [row["model"], f"{row['tokens_per_second']:.0f}", f"{base / row['seconds']:.2f}", *times]
        lines.append(f"| {' | '.join(cells)} |")
    tokens, inputs, outputs = record["shape"]
    lines += ["", f"| {tokens} x {inputs} by {inputs} x {outputs} | ms | largest error of a sum |", "|---|---:|---:|"]
    for row in record["rows"]:
        if "product" in row:
            lines.append(f"| {row['product']} | {1e3 * row['seconds']:.1f} | {100 * row['largest_error']:.2g} % |")
    where = f"{record['environment'].get('cpu', 'this CPU')}, {record['threads']} threads"
    return (
        f"{record['tokens']} tokens through the embedded model on a CPU {kind} ({where}).\n\n"
        + "\n".join(lines)
        + f"\n\n{source_line(path)}\n"
    )


def peers() -> str:
    """Other projects at the same bits."""
    found = latest("w8a8_peers")
    if found is None:
        return ""
    path, record = found
    return f"{w8a8_page.page(record)} {source_line(path, 'bench_w8a8_peers.py')}\n"


def main() -> None:
    found = latest("w8a8")
    if found is None:
        raise SystemExit('no "w8a8" record under benchmarks/results: run benchmarks/bench_w8a8.py first')
    path, record = found
    rows = {(row["name"], row["factor"]): row for row in record["rows"]}
    save(FIGURE, lambda figure, wide: draw(figure, rows), 4.6, kinds=["png"])
    any_row = record["rows"][0]
    said = _TEXT.format(
        factors=by_factor(rows), one=at_one(rows), source=source_line(path), windows=any_row["text"]["samples"],
        learned=any_row["learned_from"], device=devices(record),
    )  # fmt: skip
    write_between(PAGE, results=said, prefill=prefill(), peers=peers())


if __name__ == "__main__":
    main()
