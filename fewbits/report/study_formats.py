"""The page of `fewbits study formats`: which data type suits which distribution."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.report.figure import INK, MUTED, SERIES
from fewbits.report.html import tile
from fewbits.report.study import Part, StudyPage
from fewbits.report.tables import table
from fewbits.report.words import esc

Results = Mapping[str, Any]

LABELS = {
    "uniform": "uniform",
    "gaussian": "Gaussian",
    "laplace": "Laplace",
    "student-t 8": "Student-t, 8",
    "outliers": "outliers",
    "student-t 4": "Student-t, 4",
    "student-t 3": "Student-t, 3",
}
BITS = range(2, 9)
ORDER = tuple(LABELS)  # by the weight of the tails
MARKS = ("o", "s", "^", "D", "v", "P", "X")
WIDTHS = {
    8: ("int8", "fp8_e2m5", "fp8_e3m4", "fp8_e4m3", "fp8_e5m2"),
    6: ("int6", "fp6_e2m3", "fp6_e3m2"),
    4: ("int4", "fp4_e2m1", "fp4_e3m0", "nf4"),
}


def label(format: str) -> str:
    """'fp8_e4m3' -> 'E4M3', 'int4_narrow' -> 'INT4 ±7'."""
    named = {"int4_narrow": "INT4 ±7", "int8_narrow": "INT8 ±127", "fp4_bnb": "FP4 (bitsandbytes)"}
    return named.get(format) or re.sub(r"^fp\d_(?=e\d)", "", format).upper()


def page(record: dict[str, Any]) -> StudyPage:
    results = record["results"]
    return StudyPage(
        title="Which data type suits which distribution",
        verdict=_verdict(results),
        chips=(f"{len(results['formats'])} formats", f"{len(results['best'])} distributions", "exact, not sampled"),
        tiles=[_winner(results, name) for name in ("uniform", "gaussian", "laplace", "outliers")],
        parts=(
            Part(
                key="accuracy",
                title="Bits of accuracy",
                lead="Signal to quantization noise at the best clipping, in bits of 6.02 dB. Distributions from left "
                "to right: tails grow heavier. The more exponent bits, the less a format minds; the fewer, the "
                "better it is where tails are light. The dotted line is the best table of levels there can be "
                "(Lloyd-Max).",
                draw=lambda canvas, wide: _accuracy(canvas, wide, results),
                heights=(4.4, 9.6),
                description="Bits of accuracy of 8, 6 and 4 bit formats for seven distributions",
                table=_table(results),
            ),
            Part(
                key="bits",
                title="What another bit buys",
                lead="Every bit is worth about 6 dB. No table of levels lies "
                "above Lloyd-Max, and no code of any kind, vectors included, above the rate-distortion bound "
                "(Shannon's lower bound to it where the distribution is not Gaussian).",
                draw=lambda canvas, wide: _against_bits(canvas, wide, results),
                heights=(4.2, 9.8),
                description="Signal to noise against bits, with Lloyd-Max and the rate-distortion bound",
            ),
            Part(
                key="blocks",
                title="Absmax blocks",
                lead="4 bits, each block scaled by its largest magnitude and nothing clipped: small blocks follow the "
                "data, large ones stretch the levels to reach outliers. Scales are not rounded and not counted.",
                draw=lambda canvas, wide: _blocks(canvas, wide, results),
                heights=(4.2, 7.6),
                description="Squared error of 4-bit formats against the size of the block",
            ),
            Part(
                key="clip",
                title="Where to clip",
                lead="An integer has one best place to clip and loses on both sides of it. A minifloat with many "
                "exponent bits does not care: its error follows the magnitude, and its range is far larger than "
                "the data. A mark is where the error is least; on a plateau that is a matter of the last digits.",
                draw=lambda canvas, wide: _clip(canvas, wide, results),
                heights=(4.2, 7.6),
                description="Signal to noise of 8-bit formats against the clipping range",
            ),
        ),
    )


# ---- words and tables


def _ranked(results: Results, name: str, formats: Sequence[str]) -> list[str]:
    """`formats`, best first."""
    best = results["best"][name]
    return sorted(formats, key=lambda format: -best[format]["sqnr_db"])


def _verdict(results: Results) -> str:
    first = {name: label(_ranked(results, name, WIDTHS[8])[0]) for name in results["best"]}
    second = label(_ranked(results, "gaussian", WIDTHS[8])[1])
    four = label(_ranked(results, "gaussian", WIDTHS[4])[0])
    return (
        f"At 8 bits {first['uniform']} is best for uniform values, {first['gaussian']} for Gaussian ones ({second} is "
        f"second), and tails ask for exponent bits: {first['laplace']} for Laplace, {first['student-t 4']} for "
        f"Student-t with 4 degrees of freedom, {first['student-t 3']} with 3. "
        f"At 4 bits {four} is best for Gaussian values."
    )


def _winner(results: Results, name: str) -> str:
    first, second, *_ = _ranked(results, name, WIDTHS[8])
    best = results["best"][name]
    ahead = best[first]["sqnr_db"] - best[second]["sqnr_db"]
    note = f"{best[first]['sqnr_db']:.1f} dB at 8 bits, {ahead:.1f} dB ahead of {label(second)}."
    return tile(LABELS[name], esc(label(first)), "", note)


def _table(results: Results) -> str:
    """SQNR by format and distribution; formats by bits, then by what they do on Gaussian values."""
    bits = {format: facts["bits"] for format, facts in results["formats"].items()}
    best = results["best"]
    names = [name for name in ORDER if name in best]
    ordered = sorted(bits, key=lambda format: (-bits[format], -best["gaussian"][format]["sqnr_db"]))
    top = {
        (name, width): max(best[name][f]["sqnr_db"] for f in bits if bits[f] == width)
        for name in names
        for width in BITS
    }

    def cell(format: str, name: str) -> str:
        value = best[name][format]["sqnr_db"]
        return f"<b>{value:.2f}</b>" if value == top[name, bits[format]] else f"{value:.2f}"

    rows = [[esc(label(f)), str(bits[f]), *(cell(f, name) for name in names)] for f in ordered]
    note = '<p class="note">SQNR in dB at the best clipping; the best of as many bits is bold.</p>'
    return table(["Format", "Bits", *(LABELS[name] for name in names)], rows) + note


# ---- figures


def _grid(canvas: Any, wide: bool, count: int, **options: Any) -> list[Any]:
    """`count` panels, side by side or one above the other."""
    shape = (1, count) if wide else (count, 1)
    return list(canvas.subplots(*shape, squeeze=False, **options).flat)


def _legend(canvas: Any, axis: Any, wide: bool, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    canvas.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns if wide else 3 if columns > 6 else 2,
        borderaxespad=0.0,
        handlelength=2.0,
    )


def _line(index: int) -> dict[str, Any]:
    return {"color": SERIES[index], "marker": MARKS[index], "markersize": 4.5, "linewidth": 1.5, "markeredgewidth": 0}


_IDEAL: dict[str, Any] = {"color": INK, "linestyle": (0, (1, 1.6)), "linewidth": 1.4}
_BOUND: dict[str, Any] = {"color": MUTED, "linestyle": (0, (5, 2)), "linewidth": 1.2}


def _accuracy(canvas: Any, wide: bool, results: Results) -> None:
    names = [name for name in ORDER if name in results["best"]]
    x = range(len(names))
    for axis, (bits, formats) in zip(_grid(canvas, wide, len(WIDTHS)), WIDTHS.items(), strict=True):
        axis.plot(x, [results["lloyd_max"][name][str(bits)]["bits"] for name in names], label="Lloyd-Max", **_IDEAL)
        for index, format in enumerate(formats):
            values = [results["best"][name][format]["bits"] for name in names]
            axis.plot(x, values, label=label(format), **_line(index))
        axis.set_title(f"{bits} bits", pad=40)
        axis.set_ylabel("bits of accuracy (SQNR / 6.02 dB)")
        axis.set_xticks(x, [LABELS[name] for name in names], rotation=40, ha="right", rotation_mode="anchor")
        axis.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1.2, handlelength=1.6, borderpad=0.2
        )


def _against_bits(canvas: Any, wide: bool, results: Results) -> None:
    from matplotlib.ticker import MultipleLocator

    panels = ("uniform", "gaussian", "student-t 8", "outliers")
    axes = _grid(canvas, wide, len(panels), sharey=wide)
    for axis, name in zip(axes, panels, strict=True):
        for key, text, style in (("bound", "rate-distortion bound", _BOUND), ("lloyd_max", "Lloyd-Max", _IDEAL)):
            axis.plot(BITS, [results[key][name][str(bits)]["sqnr_db"] for bits in BITS], label=text, **style)
        best = results["best"][name]
        axis.plot(BITS, [best[f"int{bits}"]["sqnr_db"] for bits in BITS], label="integers", **_line(0))
        for exponent in (2, 3, 4, 5):
            found = [(b, best[f]["sqnr_db"]) for f, b in _floats(results) if f"_e{exponent}m" in f]
            axis.plot(*zip(*sorted(found), strict=True), label=f"E{exponent}My", **_line(exponent - 1))
        axis.plot([4], [best["nf4"]["sqnr_db"]], label="NF4", **_line(5) | {"linestyle": "none"})
        axis.set_title(LABELS[name])
        axis.set_xlabel("bits per value")
        axis.xaxis.set_major_locator(MultipleLocator(1))
        if axis is axes[0] or not wide:
            axis.set_ylabel("SQNR, dB")
    _legend(canvas, axes[0], wide, 8)


def _floats(results: Results) -> list[tuple[str, int]]:
    return [
        (format, facts["bits"])
        for format, facts in results["formats"].items()
        if format.startswith("fp") and "_e" in format
    ]


def _blocks(canvas: Any, wide: bool, results: Results) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = _grid(canvas, wide, 2)
    for axis, name in zip(axes, ("gaussian", "laplace"), strict=True):
        curves = [item for item in results["blocks"][name].items() if item[0] != "int4"]
        for index, (format, errors) in enumerate(curves):
            axis.plot([int(size) for size in errors], list(errors.values()), label=label(format), **_line(index))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_locator(NullLocator())
        axis.set_title(LABELS[name])
        axis.set_xlabel("values per block")
        axis.set_ylabel("squared error / variance")
    _legend(canvas, axes[0], wide, 7)


def _clip(canvas: Any, wide: bool, results: Results) -> None:
    from matplotlib.ticker import FuncFormatter

    axes = _grid(canvas, wide, 2, sharey=wide)
    for axis, name in zip(axes, ("gaussian", "student-t 8"), strict=True):
        for index, (format, curve) in enumerate(results["clip"][name].items()):
            axis.plot(*zip(*curve, strict=True), color=SERIES[index], linewidth=1.5)
            clip, most = max(curve, key=lambda point: point[1])
            axis.plot([clip], [most], label=label(format), **_line(index) | {"markersize": 6})
        axis.set_xscale("log")
        axis.set_ylim(0, None)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(LABELS[name])
        axis.set_xlabel("largest representable value, standard deviations")
        if axis is axes[0] or not wide:
            axis.set_ylabel("SQNR, dB")
    _legend(canvas, axes[0], wide, 5)
