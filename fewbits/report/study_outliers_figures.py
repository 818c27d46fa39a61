"""The figures of `fewbits study outliers`. Blocks are numbered from 1; 0 is the embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.report.figure import INK, MUTED, SERIES
from fewbits.report.words import TIMES

Results = Mapping[str, Any]

CLASSES = {"first": "first token", "delimiter": "delimiters", "other": "other tokens"}
KINDS = {"q_proj": "into q, k, v", "o_proj": "into o", "gate_proj": "into gate, up", "down_proj": "into down"}
NAMES = {
    "magnitude": "outlier features, magnitude 6",
    "relative": "outlier features, 6 rms",
    "largest": "largest rms",
    "random": "random dimensions",
    "massive zero": "massive to zero",
    "massive mean": "massive to their mean",
    "massive random": "random, same tokens",
}


def name_of(key: str, run: Mapping[str, Any]) -> str:
    """What `run` took out, for a label."""
    dimensions = run.get("dimensions") or run.get("draws", [{"dimensions": ()}])[0]["dimensions"]
    if key.startswith("only "):
        return f"dimension {key.removeprefix('only ')} alone"
    count = f" ({len(dimensions)})" if not key.startswith("massive") or key == "massive random" else ""
    return NAMES[key] + count


def amount(value: float, like: float | None = None) -> str:
    """1.0771 -> '1.077', 21.67 -> '21.7', 90486 -> '90,000', 1.5e6 -> '1.5 million'; as many digits as `like` gets."""
    size = value if like is None else like
    if size >= 1e6:
        return f"{value / 1e6:,.1f} million"
    if size >= 1000:
        return f"{float(f'{value:.2g}'):,.0f}"
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1.2 else 3}f}"


def _panels(canvas: Any, wide: bool, count: int, **options: Any) -> list[Any]:
    shape = (1, count) if wide else (count, 1)
    return list(canvas.subplots(*shape, squeeze=False, **options).flat)


def _plain() -> Any:
    """Ticks as plain numbers: 0.01, 1, 10,000."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _percent() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:.3g} %")


def _blocks(axis: Any) -> None:
    """Whole numbers on the axis of blocks."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=2))


def _style(index: int, dash: Any = "-") -> dict[str, Any]:
    return {"color": SERIES[index], "linewidth": 1.6, "linestyle": dash}


def _legend(canvas: Any, axis: Any, wide: bool) -> None:
    handles, labels = axis.get_legend_handles_labels()
    narrow = 1 if max(map(len, labels)) > 26 else 2
    columns = narrow if not wide else len(labels) if sum(map(len, labels)) < 90 else 3
    canvas.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.0, handlelength=2.4)


def _heat(axis: Any, rows: Sequence[Sequence[float]], labels: Sequence[str], norm: Any) -> Any:
    """rows [label][column] as shaded cells."""
    from matplotlib import colormaps

    columns = len(rows[0])
    edges = [column - 0.5 for column in range(columns + 1)]
    mesh = axis.pcolormesh(
        edges,
        [row - 0.5 for row in range(len(rows) + 1)],
        rows,
        cmap=colormaps["cividis"].resampled(48),  # more, and the bar would be a picture, which the page refuses
        norm=norm,
        edgecolors="face",
        linewidth=0.3,
    )
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(visible=False)
    return mesh


def _bar(canvas: Any, mesh: Any, axes: Any, label: str, format: Any = None) -> None:
    bar = canvas.colorbar(mesh, ax=axes, location="bottom", aspect=45, pad=0.03, format=format)
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    if format is None:
        bar.ax.xaxis.set_major_formatter(_plain())
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")  # no hairlines between the shades


def channels(canvas: Any, wide: bool, results: Results) -> None:
    from matplotlib.colors import LogNorm

    found = results["maps"]["hidden"]
    labels = [str(dimension) for dimension in found["dimensions"]]
    values = [value for part in ("first", "others") for row in found[part] for value in row if value > 0]
    norm = LogNorm(max(min(values, default=0.1), max(values, default=1.0) / 1e5), max(values, default=1.0))
    axes = _panels(canvas, wide, 2, sharey=wide)
    for axis, (part, title) in zip(axes, (("first", "first tokens"), ("others", "all other tokens")), strict=True):
        rows = [[max(place[index], norm.vmin) for place in found[part]] for index in range(len(labels))]
        mesh = _heat(axis, rows, labels, norm)
        axis.set_title(title)
        axis.set_xlabel("after block (0: embeddings)")
        if axis is axes[0] or not wide:
            axis.set_ylabel("dimension")
    _bar(canvas, mesh, axes, "largest magnitude")


def tokens(canvas: Any, wide: bool, results: Results) -> None:
    observed = results["observed"]
    panels: list[tuple[str, list[Any]]] = [("residual stream", observed["hidden"])]
    down = [place for place in observed["inputs"] if place["kind"] == "down_proj"]
    if down and all(place["absmax_of"]["first"] is not None for place in down):
        panels.append(("inputs of down_proj", down))
    axes = _panels(canvas, wide, len(panels))
    for axis, (title, places) in zip(axes, panels, strict=True):
        x = [place["block"] + 1 for place in places]
        for index, (key, label) in enumerate(CLASSES.items()):
            y = [place["absmax_of"][key] or None for place in places]
            axis.plot(x, y, label=label, marker="osD"[index], markersize=3.5, markeredgewidth=0, **_style(index))
        axis.plot(x, [place["median"] for place in places], label="median", **_style(6, (0, (1, 1.6))))
        if places is observed["hidden"]:
            bar = [max(observed["massive"]["magnitude"], observed["massive"]["ratio"] * p["median"]) for p in places]
            axis.plot(x, bar, label="massive above", color=INK, linewidth=1.1, linestyle=(0, (5, 2)))
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_plain())
        _blocks(axis)
        axis.set_title(title)
        axis.set_xlabel("after block (0: embeddings)" if places is observed["hidden"] else "block")
        axis.set_ylabel("magnitude")
    _legend(canvas, axes[0], wide)


def carried(canvas: Any, wide: bool, results: Results) -> None:
    from matplotlib.colors import Normalize

    read = results["error"]["read"]
    found = results["error"]["dimensions"]["token"]
    labels = [str(dimension) for dimension in found["dimensions"]]
    kinds = list(dict.fromkeys(place["kind"] for place in read))[:2]
    top = max(max(row) for row in found["by_place"])
    norm = Normalize(0.0, max(top, 1e-9))
    axes = _panels(canvas, wide, len(kinds), sharey=wide)
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [index for index, place in enumerate(read) if place["kind"] == kind]
        rows = [[max(found["by_place"][index][row], 0.0) for index in chosen] for row in range(len(labels))]
        mesh = _heat(axis, rows, labels, norm)
        blocks = [read[index]["block"] + 1 for index in chosen]
        step = max(1, len(blocks) // 6)
        axis.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
        axis.set_title(KINDS.get(kind, kind))
        axis.set_xlabel("block")
        if axis is axes[0] or not wide:
            axis.set_ylabel("dimension")
    _bar(canvas, mesh, axes, "share of the INT8 error carried", _percent())


def curve(canvas: Any, wide: bool, results: Results) -> None:
    found = results["curve"]
    kept = found["kept"]
    axes = _panels(canvas, wide, 2, sharey=wide)
    titles = {"token": "one scale per token", "tensor": "one scale per window"}
    for axis, (scaling, title) in zip(axes, titles.items(), strict=True):
        for index, of in enumerate(("inputs", "outputs")):
            lines = found[scaling][of]
            look = {**_style(index), "marker": "os"[index], "markersize": (8, 4)[index], "linewidth": (4.0, 1.4)[index]}
            axis.plot(kept, lines["worst"], label=f"error of {of}, worst kept", **look)
        _band(axis, kept, found[scaling]["inputs"])
        _marks(axis, found["features"], found[scaling]["inputs"])
        axis.set_xscale("symlog", base=2, linthresh=1)
        axis.set_xticks(kept, [str(count) for count in kept])
        axis.set_xlim(-0.15, kept[-1] * 1.15)
        axis.set_ylim(0, 1.06)
        axis.yaxis.set_major_formatter(_percent())
        axis.set_title(title)
        axis.set_xlabel("dimensions kept in 16 bits")
        if axis is axes[0] or not wide:
            axis.set_ylabel("error left")
    _legend(canvas, axes[0], wide)


def _marks(axis: Any, features: Mapping[str, Sequence[int]], lines: Mapping[str, float]) -> None:
    """What is left of the inputs' error with the outlier features kept."""
    for (name, members), marker, text in zip(features.items(), "PX", ("6", "6 rms"), strict=True):
        if members:
            look = {"marker": marker, "markersize": 9, "markeredgecolor": INK, "color": SERIES[4], "linestyle": "none"}
            axis.plot([len(members)], [lines[name]], label=f"outlier features, {text}, kept", **look)


def _band(axis: Any, kept: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
    """Random sets: their mean, and a standard deviation to both sides."""
    pairs = list(zip(lines["random"], lines["random_std"], strict=True))
    axis.plot(kept, lines["random"], label="error of inputs, random kept", color=MUTED, linewidth=1.2)
    low, high = [mean - std for mean, std in pairs], [mean + std for mean, std in pairs]
    axis.fill_between(kept, low, high, color=MUTED, alpha=0.18, linewidth=0)


def first_token(canvas: Any, wide: bool, results: Results) -> None:
    places = results["error"]["places"]
    kinds = [kind for kind in KINDS if any(place["kind"] == kind for place in places)]
    kinds = kinds or list(dict.fromkeys(place["kind"] for place in places))[:4]
    axes = _panels(canvas, wide, len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        members = [place for place in places if place["kind"] == kind]
        x = [place["block"] + 1 for place in members]
        lines = (
            ("one scale per window", [place["others"]["tensor"] for place in members], "-"),
            ("first token kept in 16 bits", [place["others"]["spared"] for place in members], (0, (5, 2))),
            ("one scale per token", [place["others"]["token"] for place in members], (0, (1, 1.6))),
        )
        for index, (label, y, dash) in enumerate(lines):
            axis.plot(x, y, label=label, **_style((1, 0, 2)[index], dash))
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_percent())
        _blocks(axis)
        axis.set_title(KINDS.get(kind, kind))
        axis.set_xlabel("block")
        if axis is axes[0] or not wide:
            axis.set_ylabel("squared error / energy of the tokens")
    _legend(canvas, axes[0], wide)


def removal(canvas: Any, wide: bool, results: Results) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    runs = results["removal"]["runs"]
    axis = canvas.subplots()
    ratios = [run["ratio"] for run in runs.values()]
    floor = min(0.8, *(ratio["mean"] * 0.8 for ratio in ratios))
    for row, (key, run) in enumerate(runs.items()):
        mean, stderr = run["ratio"]["mean"], run["ratio"]["stderr"] or 0.0
        colour = MUTED if "random" in key else SERIES[1] if key.startswith("massive") else SERIES[0]
        low = max(mean - stderr, floor)
        axis.plot([1.0, mean], [row, row], color=colour, linewidth=1.4)
        axis.plot([low, mean + stderr], [row, row], color=INK, linewidth=1.1, marker="|", markersize=7)
        axis.plot([mean], [row], color=colour, marker="s" if "random" in key else "o", markersize=6, linestyle="none")
        text = f"{TIMES} {amount(mean)}"
        axis.annotate(text, (max(mean + stderr, 1.0), row), (9, 0), textcoords="offset points", va="center", color=INK)
    axis.set_yticks(range(len(runs)), [name_of(key, run) for key, run in runs.items()])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.grid(True, axis="x")
    axis.axvline(1.0, color=INK, linewidth=1.0)
    axis.set_xscale("log")
    top = max(ratio["mean"] + (ratio["stderr"] or 0.0) for ratio in ratios)
    axis.set_xlim(floor, max(top, 1.5) ** (1.25 if wide else 1.6) * 1.2)
    decades = max(int(math.log10(top)), 0)
    if decades < 2:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_xticks([10.0**power for power in range(0, decades + 1, 1 if wide else max(1, decades // 2))])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("perplexity, times the model's own")
