"""Draws docs/images/demo.svg from the newest "demo" record: what 4 bits cost, and what they give."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from recorded import ROOT, latest

FIGURE = ROOT / "docs" / "images" / "demo.svg"
GREY, RED, BLUE = "#8a8f98", "#d1495b", "#2e6fbb"


def draw(record: dict[str, Any]) -> plt.Figure:
    rows = record["rows"]
    names = [row["model"] for row in rows]
    colours = [GREY, RED, BLUE][: len(rows)]
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.5), layout="constrained")
    panels = (
        ("size, MB", [row["bytes"] / 1e6 for row in rows], None),
        (
            "KL to the original, nats per token",
            [row["kl"]["mean"] if row["kl"] else 0.0 for row in rows],
            [row["kl"]["stderr"] if row["kl"] else 0.0 for row in rows],
        ),
        ("tokens/s, batch 1", [row["tokens_per_second"] for row in rows], None),
    )
    for axis, (title, values, errors) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, xerr=errors, color=colours, height=0.62, ecolor="#333333")
        axis.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=6, fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
        axis.invert_yaxis()
        axis.set_xlim(0, max(values) * 1.3)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0, labelsize=9)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
    return figure


def main() -> None:
    found = latest("demo")
    if found is None:
        print("no 'demo' record under benchmarks/results: no figure drawn")
        return
    # The same record gives the same bytes: no date, no random ids; text stays text.
    plt.rcParams.update({"svg.hashsalt": "fewbits", "svg.fonttype": "none", "font.family": "sans-serif"})
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    draw(found[1]).savefig(FIGURE, metadata={"Date": None}, facecolor="white")
    print(FIGURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
