"""The page of `fewbits study formats MODEL`: which data type suits which tensor of a model, beside a contrast."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from fewbits.report import model_formats_figures as figures
from fewbits.report.html import tile
from fewbits.report.model_formats_results import (
    OPERANDS,
    Entry,
    Results,
    common,
    crossing,
    gain,
    kinds_of,
    of_bits,
    points,
    short,
    winner,
)
from fewbits.report.study import Part, StudyPage
from fewbits.report.study_formats import label
from fewbits.report.tables import table
from fewbits.report.words import DASH, esc


def page(record: dict[str, Any]) -> StudyPage:
    results, group = record["results"], record["settings"]["group_size"]
    model, contrast = results["model"], results["contrast"]
    return StudyPage(
        title=f"Which data type suits which tensor of {model['name']}",
        verdict=" ".join(_verdict(results)),
        chips=(
            f"{len(model['weights'])} weights",
            f"{len(model['activations'])} activations",
            f"{len(results['formats'])} formats",
            f"contrast: {contrast['name']}",
        ),
        tiles=_tiles(results),
        parts=(
            Part(
                key="layers",
                title="Layer by layer",
                lead="Signal to quantization noise below the best format of as many bits, at the best clipping of one "
                "scale a tensor. A column is a layer: kinds side by side, each from the first block to the last. What "
                "is bright is best.",
                draw=lambda canvas, wide: figures.layers(canvas, wide, results),
                heights=(5.0, 6.6),
                description="Heat map of SQNR below the best format, by format and layer, for weights and activations",
                table=_kinds(results),
            ),
            Part(
                key="wins",
                title="How often each wins",
                lead="Share of the layers in which a format is best. Finer scales take over what exponent bits are "
                "for: within a channel, a group or a token, values differ less in size.",
                draw=lambda canvas, wide: figures.wins(canvas, wide, results, group),
                heights=(5.4, 11.0),
                description="Stacked bars: share of layers each format wins, by operand and scale, at 8 and 4 bits",
                table=_scales(group),
            ),
            Part(
                key="tails",
                title="Where exponent bits pay",
                lead="One point a layer and operand: how far E4M3 is ahead of INT8, against how far the largest value "
                "stands out. The steps of INT8 are equal and have to reach that value, so what it loses grows with it: "
                "20 dB a decade where nothing is clipped (dotted), less where clipping pays. The error of E4M3 follows "
                "the magnitude and hardly changes.",
                draw=lambda canvas, wide: figures.tails(canvas, wide, results),
                heights=(4.4, 8.0),
                description="Scatter of the lead of E4M3 over INT8 against the largest magnitude over the rms",
                table=_exponents(results),
            ),
            Part(
                key="contrast",
                title="Beside the contrast",
                lead=f"Model: {model['about']}. Contrast: {contrast['about']}. Medians over the layers, bars from the "
                "tenth to the ninetieth percentile. The dotted line is what Gaussian values have, computed exactly.",
                draw=lambda canvas, wide: figures.contrast(canvas, wide, results),
                heights=(4.4, 10.0),
                description="SQNR by format of model and contrast, for weights and activations",
            ),
        ),
    )


# ---- words


def _bests(results: Results, role: str, bits: int) -> str:
    """'E2M5 for 69 % of the weights and E3M4 for all activations'; one format is named once."""
    words: dict[str, list[str]] = {}
    for operand, scale in OPERANDS:
        entries = results[role][operand]
        format, count = common(results, entries, scale, bits)
        share = "all" if count == len(entries) else f"{100 * count / len(entries):.0f} % of the"
        words.setdefault(label(format), []).append(f"{share} {operand}")
    return " and ".join(f"{format} for {' and '.join(parts)}" for format, parts in words.items())


def _ahead(results: Results, role: str, operand: str, scale: str) -> str:
    lead = median(gain(results, entry, scale) for entry in results[role][operand])
    first, second = ("E4M3", "INT8") if lead > 0 else ("INT8", "E4M3")
    return f"{first} is {abs(lead):.1f} dB ahead of {second} on {operand}"


def _verdict(results: Results) -> list[str]:
    model, contrast = results["model"]["name"], results["contrast"]["name"]
    duel = ", and ".join(_ahead(results, "model", operand, scale) for operand, scale in OPERANDS)
    sentences = [
        f"With one scale a tensor, the best of 8 bits in {model} is {_bests(results, 'model', 8)}; in "
        f"{contrast} it is {_bests(results, 'contrast', 8)}.",
        f"Of the two that hardware has, {duel} (medians).",
    ]
    if (peak := crossing(results)) is not None:
        sentences.append(
            f"What decides is outliers: E4M3 passes INT8 where the largest magnitude is about {peak:.0f} times the rms."
        )
    return [*sentences, f"The best of 4 bits is {_bests(results, 'model', 4)}."]


def _tiles(results: Results) -> list[str]:
    tiles = []
    for operand, scale in OPERANDS:
        entries = results["model"][operand]
        format, count = common(results, entries, scale, 8)
        duel = _ahead(results, "model", operand, scale)
        note = f"Best of 8 bits in {count} of {len(entries)}, one scale a tensor. {duel}, median."
        tiles.append(tile(operand.capitalize(), esc(label(format)), "", note))
    if (peak := crossing(results)) is not None:
        right = sum((at > peak) == (lead > 0) for at, lead in points(results))
        true = f"{right} of {len(points(results))} tensors"
        note = f"Where the largest magnitude is more, E4M3 is better than INT8: so for {true}."
        tiles.append(tile("Outliers decide", f"{peak:.0f}", "times the rms", note))
    return [*tiles, _first_tokens(results)]


def _first_tokens(results: Results) -> str:
    """How much of the energy the first token of a window holds, where it holds most."""
    entries = results["model"]["activations"]
    most = max(entries, key=lambda entry: entry["first_share"])
    many = sum(entry["first_share"] > 0.5 for entry in entries)
    note = (
        f"of the energy of {most['name']} is in first tokens; more than half in {many} of {len(entries)} activations."
    )
    return tile("First tokens", f"{100 * most['first_share']:.1f} %", "", note)


# ---- tables


def _kinds(results: Results) -> str:
    """Best format per kind of layer and operand, of both networks."""
    fine = {"weights": "channel", "activations": "token"}
    rows = []
    for role in ("model", "contrast"):
        for operand, scale in OPERANDS:
            for kind in kinds_of(results[role][operand]):
                entries = [entry for entry in results[role][operand] if entry["kind"] == kind]
                rows.append(
                    [
                        f"{esc(results[role]['name'])}, {operand}",
                        esc(short(kind)),
                        _number(median(entry["peak"] for entry in entries)),
                        _number(median(entry["kurtosis"] for entry in entries)),
                        _best(results, entries, scale, 8),
                        _best(results, entries, fine[operand], 8),
                        f"{median(gain(results, entry, scale) for entry in entries):+.1f} dB",
                        _best(results, entries, scale, 6),
                        _best(results, entries, scale, 4),
                    ]
                )
    heads = [
        "Operand",
        "Layer",
        "Max / rms",
        "Kurtosis",
        "8 bits",
        "finer scales",
        "E4M3 over INT8",
        "6 bits",
        "4 bits",
    ]
    note = (
        '<p class="note">The format that is best most often, and in how many layers of how many. One scale a tensor, '
        "but under “finer scales” one a channel (weights) or token (activations), 8 bits. Max / rms, "
        "kurtosis and the lead of E4M3 over INT8 are medians.</p>"
    )
    return table(heads, rows, numbers_from=2) + note


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _best(results: Results, entries: Sequence[Entry], scale: str, bits: int) -> str:
    format, count = common(results, entries, scale, bits)
    return f"{esc(label(format))} <small>{count}/{len(entries)}</small>"


def _scales(group: int) -> str:
    """What the names of scales mean."""
    rows = [
        ["weights", "tensor, channel, group", f"one scale a tensor, output channel, or {group} inputs, best clipping"],
        ["activations", "static", "one scale for all tokens, best clipping"],
        ["activations", "without first", "the same without the first token of each window"],
        ["activations", "absmax", "one scale that clips nothing of any token; error of all tokens but the first"],
        ["activations", "token", "absmax of each token as it comes; error of all tokens but the first"],
    ]
    return table(["Operand", "Scale", "Means"], rows, numbers_from=3)


def _exponents(results: Results) -> str:
    """Tails of the tensors that ask for so many exponent bits at 8 bits in all."""
    rows = []
    for format in of_bits(results, 8):
        cells = []
        for operand, scale in OPERANDS:
            found = sorted(
                entry["peak"]
                for role in ("model", "contrast")
                for entry in results[role][operand]
                if winner(results, entry, scale, 8) == format
            )
            span = " … ".join(map(_number, (found[0], median(found), found[-1]))) if found else DASH
            cells += [str(len(found)), span]
        rows.append([esc(label(format)), *cells])
    heads = ["Best of 8 bits", "Weights", "Their max / rms", "Activations", "Their max / rms"]
    note = '<p class="note">Smallest, median and largest; both networks, one scale a tensor.</p>'
    return table(heads, rows) + note
