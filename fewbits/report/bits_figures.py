"""The figures of `fewbits study bits`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.report.figure import INK, LINE, SERIES
from fewbits.report.study_formats import MARKS

Results = Mapping[str, Any]

TYPE_LABELS = {
    "int-asym": "integer, zero point",
    "int": "integer, symmetric",
    "float": "float (E2M1, E2M3, E4M3)",
    "float-e3": "float (E3M0, E3M2, E3M4)",
    "quantile": "quantile (NF4 at 4 bits)",
    "lloyd": "Lloyd-Max, Gaussian",
    "dynamic": "dynamic exponent",
}


def type_label(name: str) -> str:
    return TYPE_LABELS.get(name, name)


def block_label(block: str) -> str:
    return {"channel": "row", "tensor": "tensor"}.get(block, block)


def style(index: int) -> dict[str, Any]:
    """The look of series `index`; beyond the palette, colours come again with another marker."""
    marker = MARKS[(index + index // len(SERIES)) % len(MARKS)]
    colour = SERIES[index % len(SERIES)]
    return {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.5, "markeredgewidth": 0}


def scaling(canvas: Any, wide: bool, results: Results) -> None:
    """NLL against the bits of the model and of its blocks, a curve for each bit-width."""
    axes = _panels(canvas, wide, 2, sharey=wide)
    widths = sorted({point["bits"] for point in results["curves"]})
    for axis, (measure, text) in zip(axes, _MEASURES.items(), strict=True):
        for index, bits in enumerate(widths):
            points = sorted((p for p in results["curves"] if p["bits"] == bits), key=lambda p: p[measure])
            _bars(axis, [p[measure] for p in points], [p["nll"] for p in points], f"{bits} bits", style(index))
        sizes = sorted((s for s in results["sizes"] if not s["draw"]), key=lambda s: s[measure])
        _bars(axis, [s[measure] for s in sizes], [s["nll"] for s in sizes], "16 bits", _PLAIN)
        axis.set_xscale("log")
        axis.set_yscale("log")
        largest = max(size[measure] for size in sizes)
        unit, scale = ("Gbit", 1e9) if largest >= 1e10 else ("Mbit", 1e6) if largest >= 1e7 else ("kbit", 1e3)
        _plain_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7), scale)
        _plain_ticks(axis.yaxis, (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8))
        axis.set_xlabel(f"{text}, {unit}")
        if axis is axes[0] or not wide:
            axis.set_ylabel("negative log-likelihood, nats per token")
    _legend(canvas, axes[0], wide, 8)


_MEASURES = {"total_bits": "bits of the whole model", "block_bits": "bits of its blocks"}


def data_types(canvas: Any, wide: bool, results: Results) -> None:
    """KL of each data type by bits, and its ratio to the base type."""
    axes = _panels(canvas, wide, 2)
    base = results["grid"]["base_type"]
    types = [name for name in results["grid"]["types"] if any(e["type"] == name for e in results["types"])]
    for index, name in enumerate(types):
        entries = sorted((e for e in results["types"] if e["type"] == name), key=lambda e: e["bits"])
        look = style(index)
        _bars(axes[0], [e["bits"] for e in entries], [e["kl"] for e in entries], type_label(name), look)
        ratios = [e for e in entries if e["log2_against_base"] and e["log2_against_base"]["mean"] is not None]
        shift = 0.07 * (index - len(types) / 2)  # so that error bars lie side by side
        if ratios:
            _bars(axes[1], [e["bits"] + shift for e in ratios], [e["log2_against_base"] for e in ratios], "", look)
    _decades(axes[0])
    axes[0].set_ylabel("KL from the unquantized model, nats per token")
    axes[1].axhline(0, color=style(0)["color"], linewidth=1.5)
    axes[1].set_ylabel(f"doublings of the KL over {type_label(base)}")
    for axis in axes:
        axis.set_xlabel("bits per code")
        _whole_numbers(axis)
    _legend(canvas, axes[0], wide, 3, narrow=1)


def block_sizes(canvas: Any, wide: bool, results: Results) -> None:
    """KL against bits per weight as blocks shrink; what a stored bit buys, spent either way."""
    axes = _panels(canvas, wide, 2)
    entries = results["blocks"]
    widths = sorted({e["bits"] for e in entries})
    for index, bits in enumerate(widths):
        here = sorted((e for e in entries if e["bits"] == bits), key=lambda e: e["bits_per_weight"])
        _bars(axes[0], [e["bits_per_weight"] for e in here], [e["kl"] for e in here], f"{bits} bits", style(index))
    _decades(axes[0])
    axes[0].set_xlabel("bits per weight, scales and zero points counted")
    axes[0].set_ylabel("KL from the unquantized model, nats per token")
    _whole_numbers(axes[0])
    blocks = [b for b in results["grid"]["blocks"] if any(e["block"] == b and e["smaller"] for e in entries)]
    order = {block: place for place, block in enumerate(results["grid"]["blocks"])}
    for index, block in enumerate(blocks):
        found = [e for e in entries if e["block"] == block and e["smaller"] and _rate(e["smaller"]) is not None]
        finer = results["grid"]["blocks"][order[block] - 1]
        label = f"block {block_label(block)} to {block_label(finer)}"
        x = [e["bits"] + 0.09 * (index - len(blocks) / 2) for e in found]
        _bars(axes[1], x, [e["smaller"]["per_bit"] for e in found], label, style(index) | {"linestyle": "none"})
    base = results["grid"]["base_block"]
    wider = [e for e in entries if e["block"] == base and e["wider"] and _rate(e["wider"]) is not None]
    plain = {"color": INK, "linewidth": 1.4, "linestyle": (0, (5, 2)), "marker": ".", "markersize": 6}
    label = f"one more bit, block {block_label(base)}"
    _bars(axes[1], [e["bits"] + 0.2 for e in wider], [e["wider"]["per_bit"] for e in wider], label, plain)
    axes[1].axhline(0, color=LINE, linewidth=1)
    axes[1].set_xlabel("bits per code before")
    axes[1].set_ylabel("halvings of the KL per bit stored")
    _whole_numbers(axes[1])
    for axis, columns in ((axes[0], 4), (axes[1], 2 if wide else 1)):
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, columnspacing=1.2, handlelength=1.8)


def pareto(canvas: Any, wide: bool, results: Results) -> None:
    """KL against bits per weight of every format on the largest size, with the front."""
    axis = _panels(canvas, wide, 1)[0]
    whole = [p for p in results["points"] if p["size"] == results["largest"]]
    best = sorted((p for p in whole if p["format"] in results["pareto"]), key=lambda p: p["bits_per_weight"])
    front = {"color": INK, "linewidth": 1.2, "drawstyle": "steps-post"}
    axis.plot([p["bits_per_weight"] for p in best], [p["kl"]["mean"] for p in best], label="nothing cheaper", **front)
    types = list(dict.fromkeys(p["type"] for p in whole))
    for index, name in enumerate(types):
        points = [p for p in whole if p["type"] == name]
        look = style(index) | {"linestyle": "none"}
        _bars(axis, [p["bits_per_weight"] for p in points], [p["kl"] for p in points], type_label(name), look)
    _decades(axis)
    axis.set_xlabel("bits per weight, scales and zero points counted")
    axis.set_ylabel("KL from the unquantized model, nats per token")
    _whole_numbers(axis)
    _legend(canvas, axis, wide, 3, narrow=1)


def truncations(canvas: Any, wide: bool, results: Results) -> None:
    """NLL of the unquantized model by blocks left; bit-widths at equal bits if sizes were trained."""
    axis, other = _panels(canvas, wide, 2)
    found = results["truncations"]
    hows = list(dict.fromkeys(entry["how"] for entry in found))
    for index, how in enumerate(hows):
        groups = sorted({(e["draw"]) for e in found if e["how"] == how})
        for number, draw in enumerate(groups):
            points = sorted((e for e in found if e["how"] == how and e["draw"] == draw), key=lambda e: e["depth"])
            label = _HOW.get(how, how) if number == 0 else ""
            look = style(index) if how != "trained" else _PLAIN
            _bars(axis, [e["depth"] for e in points], [e["nll"] for e in points], label, look)
    axis.set_xlabel("blocks left")
    axis.set_ylabel("NLL of the unquantized model, nats per token")
    least = min(entry["nll"]["mean"] for entry in results["trained"]["widths"])
    widths = [entry for entry in results["trained"]["widths"] if entry["nll"]["mean"] < _SHOWN * least]
    _bars(other, [e["bits"] for e in widths], [e["nll"] for e in widths], "", style(0))
    other.set_xlabel("bits per code")
    other.set_ylabel("NLL at equal bits of the blocks, by the power law")
    for each in (axis, other):
        _whole_numbers(each)
    _legend(canvas, axis, wide, 3, narrow=1)


_PLAIN: dict[str, Any] = {"color": INK, "linestyle": (0, (1, 1.6)), "linewidth": 1.4, "marker": ".", "markersize": 5}
_SHOWN = 1.5  # times the least: what lies far above would flatten the rest
_HOW = {
    "importance": "least important blocks left out",
    "random": "blocks drawn at random",
    "trained": "trained at its size, by the power law",
}


# ---- parts


def _panels(canvas: Any, wide: bool, count: int, **options: Any) -> list[Any]:
    """`count` panels, side by side or one above the other."""
    shape = (1, count) if wide else (count, 1)
    return list(canvas.subplots(*shape, squeeze=False, **options).flat)


def _rate(bought: Mapping[str, Any]) -> float | None:
    rate: float | None = bought["per_bit"]["mean"]
    return rate


def _bars(axis: Any, x: Sequence[float], values: Sequence[Mapping[str, Any]], label: str, look: Any) -> None:
    """Estimates as a line with error bars of one standard error."""
    means = [value["mean"] for value in values]
    errors = [value.get("stderr") or 0.0 for value in values]
    axis.errorbar(x, means, yerr=errors, label=label or "_nolegend_", elinewidth=0.9, capsize=0, **look)


def _legend(canvas: Any, axis: Any, wide: bool, columns: int, narrow: int = 3) -> None:
    handles, labels = axis.get_legend_handles_labels()
    canvas.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns if wide else narrow,
        borderaxespad=0.0,
        handlelength=2.0,
        columnspacing=1.4,
    )


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain_ticks(axis: Any, subs: Sequence[float], scale: float = 1) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
    axis.set_minor_locator(NullLocator())


def _decades(axis: Any) -> None:
    axis.set_yscale("log")
    _plain_ticks(axis.yaxis, (1, 3))


def bits_text(count: float) -> str:
    """457_000_000 -> '457 Mbit'."""
    units = ["bit", "kbit", "Mbit", "Gbit"]
    while abs(count) >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"
