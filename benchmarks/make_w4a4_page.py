"""Writes the table of docs/w4a4.md and its figure from the newest "w4a4" record.

python benchmarks/make_w4a4_page.py
"""

from __future__ import annotations

from typing import Any

from recorded import ROOT, latest, source_line, write_between
from rows import devices

from fewbits.formats import parse_format
from fewbits.report.figure import BASELINE, INK, LINE, METHOD, save

PAGE = ROOT / "docs" / "w4a4.md"
FIGURE = ROOT / "docs" / "images" / "w4a4"


def sides(row: dict[str, Any]) -> str:
    return f"`{row['weights']}` / " + (f"`{row['activations']}`" if row["activations"] else "16 bits")


def method(row: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    return f"`{row['method']}`" + (f" ({options})" if options else "")


def plain_method(row: dict[str, Any]) -> str:
    return ", ".join([row["method"], *(f"{name.rpartition('.')[2]} {value}" for name, value in row["options"].items())])


def within(found: dict[str, float]) -> str:
    digits = 3 if found["stderr"] >= 5e-4 else 4
    return f"{found['mean']:.{digits}f} ± {found['stderr']:.{digits}f}"


def share(row: dict[str, Any], record: dict[str, Any]) -> float:
    """Of what the baseline loses, what this row does not."""
    (base,) = (r for r in record["rows"] if (r["scheme"], r["method"]) == ("W4A4", "rtn"))
    return 1 - row["lost"]["mean"] / base["lost"]["mean"]


def table(record: dict[str, Any]) -> str:
    lines = [
        "| scheme | weights / inputs | method | nats lost | recovered | perplexity | KL |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        few = row["activations"] and parse_format(row["activations"]).bits == 4
        recovered = f"{100 * share(row, record):.0f} %" if few else "-"
        lines.append(
            f"| {row['scheme'].partition('/')[0]} | {sides(row)} | {method(row)} "
            f"| {within(row['lost'])} | {recovered} | {row['perplexity']['mean']:.1f} | {within(row['kl'])} |"
        )
    return "\n".join(lines) + "\n"


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    axis = figure.subplots()
    axis.grid(axis="x", color=LINE)
    axis.grid(visible=False, axis="y")
    axis.set_axisbelow(True)
    for place, row in enumerate(rows):
        plain = row["method"] == "rtn"
        value, error = row["lost"]["mean"], row["lost"]["stderr"]
        axis.barh(place, value, height=0.62, color=BASELINE if plain else METHOD, xerr=error, ecolor=INK)
        axis.text(value + error + 0.06, place, f"{value:.2f}", va="center", fontsize=8.5)
    axis.set_yticks(range(len(rows)), [f"{row['scheme'].partition('/')[0]}   {plain_method(row)}" for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max(row["lost"]["mean"] for row in rows))
    axis.set_xlabel("rise of the negative log-likelihood, nats per token (± one standard error)")


def main() -> None:
    found = latest("w4a4")
    if found is None:
        raise SystemExit('no "w4a4" record under benchmarks/results: run benchmarks/bench_w4a4.py first')
    path, record = found
    rows = sorted(record["rows"], key=lambda row: -row["lost"]["mean"])
    save(FIGURE, lambda figure, wide: draw(figure, rows), 0.27 * len(rows) + 0.7, kinds=["png"])
    write_between(PAGE, table=f"{table(record)}\nComputed on {devices(record)}. {source_line(path)}")


if __name__ == "__main__":
    main()
