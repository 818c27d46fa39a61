"""The page of `fewbits inspect`: what a model is made of, what each scheme costs it, which to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.core.units import bytes_text
from fewbits.report import inspection_figures as figures
from fewbits.report.html import tile
from fewbits.report.study import Part, StudyPage
from fewbits.report.tables import table
from fewbits.report.words import DASH, esc, percent

Results = Mapping[str, Any]


def page(record: dict[str, Any]) -> StudyPage:
    results = record["results"]
    model = results["model"]
    measured = "schemes" in results
    parts = [*(_measured(record) if measured else ()), _sizes(results)]
    if measured:
        parts = [parts[0], parts[-1], *parts[1:-1]]
    return StudyPage(
        brand="fewbits inspect",
        title=_title(model["name"]),
        verdict=_verdict(results) if measured else _already(results["quantized"]),
        chips=_chips(model),
        tiles=_tiles(results),
        parts=parts,
    )


# ---- the top


def _title(name: str) -> str:
    """A hub id whole, of a path the last part."""
    return name if name.count("/") < 2 and not name.startswith(("/", ".")) else name.rstrip("/").rpartition("/")[2]


def _chips(model: Results) -> list[str]:
    chips = [model["type"] or "unknown type", model["dtype"], f"{model['blocks']} blocks"]
    if model["tied"]:
        chips.append("head tied to the embeddings")
    if model["experts"]:
        chips.append("experts")
    return chips if model["family"] else [*chips, "no table of this family: no transforms"]


def _verdict(results: Results) -> str:
    choices = {choice["purpose"]: choice for choice in results["recommended"]}
    rows = {row["label"]: row for row in results["schemes"]}
    sentences = []
    for purpose, text in (("little loss", "With little loss"), ("about 4 bits", "At about 4 bits")):
        if (choice := choices[purpose])["scheme"]:
            row = rows[choice["scheme"]]
            sentences.append(
                f"{text}: {row['label']}, {bytes_text(row['bytes'])}, KL {_short(row['kl'])} nats per token by "
                "rounding to nearest."
            )
        else:
            sentences.append(f"{text}: {choice['why']}.")
    return " ".join(sentences)


def _already(quantized: Results) -> str:
    formats = ", ".join(f"{count} in {name}" for name, count in quantized["formats"].items())
    count = f": {quantized['modules']} linears ({formats})" if quantized["modules"] else ""
    return (
        f"Quantized already by {quantized['method']}{count}. What that cost is in its certificate, if it has one: "
        f"fewbits report. {quantized['note']}"
    )


def _tiles(results: Results) -> list[str]:
    model = results["model"]
    share = model["quantizable"] / model["parameters"]
    tiles = [
        tile(
            "Parameters", f"{model['parameters'] / 1e6:,.1f}", "million", f"{percent(share)} in linears of the blocks."
        ),
        tile("On disk", esc(bytes_text(model["bytes"])), "", f"In 16 bits: {bytes_text(2 * model['parameters'])}."),
    ]
    if "outliers" not in results:
        return tiles
    outliers = results["outliers"]
    note = f"of {outliers['width']}. {outliers['large']} of {outliers['inputs']} inputs of linears reach magnitude 6."
    largest = max((abs(found["value"]) for found in outliers["massive"]), default=None)
    tiles.append(tile("Outlier dimensions", str(len(outliers["dimensions"])), "", note))
    massive = "none" if largest is None else f"{largest:,.0f}"
    tiles.append(
        tile("Massive activations", massive, "", "Largest value of the residual stream above 1000 times its median.")
    )
    return tiles


def _short(estimate: Results) -> str:
    """Mean and error to the error's second digit."""
    mean, error = estimate["mean"], estimate["stderr"]
    if not error:
        return f"{mean:.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


# ---- the sections


def _measured(record: dict[str, Any]) -> list[Part]:
    results, settings = record["results"], record["settings"]
    text = f"{settings['tokens']:,} tokens of {settings['text']}"
    agreement = results["agreement"]
    agrees = "" if agreement is None else (
        f" On this model the mean output error of the layers ranks the schemes as the KL does to {agreement:.2f} "
        "(Spearman's correlation); how errors add up differs from model to model, so the KL is measured."
    )  # fmt: skip
    return [
        Part(key="recommended", title="Recommended", lead=_ADVICE, table=_recommended(results)),
        Part(
            key="loss",
            title="Loss by scheme",
            lead=f"Size of the weights against KL to the original, measured on {text} (the first of each window left "
            "out), weights rounded to nearest and activations rounded where the scheme says so. Bars are one standard "
            "error over the windows. Lower left is better; the line joins those that nothing smaller betters."
            f"{agrees}",
            draw=lambda canvas, wide: figures.loss(canvas, wide, results["schemes"]),
            heights=(5.6, 6.6),
            description="KL divergence against size, one point a scheme",
            table=_schemes(results),
        ),
        Part(
            key="layers",
            title="Error by layer",
            lead="The share of the energy of a linear's outputs that the scheme changes, on the inputs it has in the "
            "original model. Blocks from left to right.",
            draw=lambda canvas, wide: figures.layers(canvas, wide, results),
            heights=figures.layer_heights(results),
            description="Heat maps of relative output error by kind of linear and block, for a few schemes",
        ),
        Part(
            key="outliers",
            title="Outliers",
            lead=" ".join(f"{line[:1].upper()}{line[1:]}." for line in outlier_lines(results["outliers"])),
            draw=lambda canvas, wide: figures.outliers(canvas, wide, results["outliers"]),
            heights=(3.9, 7.2),
            description="Largest magnitudes of the residual stream by block, and peaks of the linears' inputs",
        ),
    ]


_ADVICE = (
    "On the figures below: measured with weights rounded to nearest. Where the command runs GPTQ, its default below "
    "8 bits, the loss is lower; how much, fewbits quantize measures and writes into the certificate."
)


def _recommended(results: Results) -> str:
    rows = {row["label"]: row for row in results["schemes"]}
    cells = []
    purposes: dict[str, list[str]] = {}  # by command
    for choice in results["recommended"]:
        row = rows.get(choice["scheme"] or "")
        if row is None:
            cells.append([esc(choice["purpose"]), DASH, DASH, DASH, esc(choice["why"])])
            continue
        purposes.setdefault(choice["command"], []).append(choice["purpose"])
        cells.append(
            [
                esc(choice["purpose"]),
                esc(row["label"]),
                esc(_short(row["kl"])),
                esc(bytes_text(row["bytes"])),
                esc(choice["why"]),
            ]
        )
    commands = "\n\n".join(f"# {', '.join(names)}\n{command}" for command, names in purposes.items())
    shown = f'<p class="note"></p><pre>{esc(commands)}</pre>' if commands else ""
    return table(["For", "Scheme", "KL", "Size", "Why"], cells, numbers_from=2, numbers_to=4) + shown


def reader(row: Results) -> str:
    """Who loads the checkpoint."""
    if not row["command"]:
        return "none: for diagnosis"
    return ", ".join(["fewbits", *row["readers"]])


def here(row: Results) -> str:
    """How this machine multiplies by it."""
    if not row["kernels"]:
        return "not run"
    return "packed" if row["packed"] else "decoded"


def _schemes(results: Results) -> str:
    rows = [
        [
            esc(row["label"]),
            esc(_short(row["kl"])),
            f"{100 * row['top1']['mean']:.1f} %",
            esc(bytes_text(row["bytes"])),
            f"{row['bits_per_weight']:.2f}",
            percent(row["error"]),
            esc(reader(row)),
            esc(f"{here(row)} ({', '.join(row['kernels'])})" if row["kernels"] else here(row)),
        ]
        for row in results["schemes"]
    ]
    heads = ["Scheme", "KL", "Same top token", "Size", "Bits", "Output error", "Loads in", "On this machine"]
    notes = [
        "Bits per quantized weight, scales included; the size has everything else in the model's own dtype. "
        "Output error: mean over the linears, weighted by their size. Packed: a kernel of this machine multiplies the "
        "weights as they are stored; decoded: they are unpacked to 16 or 32 bits first, so what is small on disk is "
        "neither small nor fast in memory here.",
        *(f"Not tried: {label}, {why}." for label, why in results["skipped"].items()),
    ]
    if any(not row["command"] for row in results["schemes"]):
        notes.append("Schemes for diagnosis show what the activations do; fewbits writes no checkpoints of them.")
    return table(heads, rows, numbers_to=6) + "".join(f'<p class="note">{esc(note)}</p>' for note in notes)


def _sizes(results: Results) -> Part:
    rows = [
        [
            esc(part["part"]),
            esc(bytes_text(part["bytes"])) if part["bytes"] else DASH,
            f"{part['parameters']:,}" if part["parameters"] else DASH,
            esc(", ".join(part["stored"])) or DASH,
            esc(part["what"]) or DASH,
        ]
        for part in results["parts"]
    ]
    return Part(
        key="sizes",
        title="Size by part",
        lead="What the file holds. Linears of the blocks are what a scheme quantizes; the rest stays as it is.",
        draw=lambda canvas, wide: figures.sizes(canvas, wide, results["parts"]),
        heights=(0.9 + 0.36 * len(rows), 0.9 + 0.36 * len(rows)),
        description="Bytes on disk by part of the model",
        table=table(["Part", "On disk", "Parameters", "Stored as", "When quantizing"], rows, numbers_to=3),
    )


def outlier_lines(outliers: Results) -> list[str]:
    """What the activations are like, a few sentences without their full stops."""
    features = [feature["dimension"] for feature in outliers["dimensions"]]
    massive = outliers["massive"]
    lines = [
        f"{outliers['large']} of {outliers['inputs']} inputs of linears reach magnitude 6, "
        f"{outliers['large_tokens']} of them in at least 6 % of the tokens",
        f"outlier dimensions: {len(features)} of {outliers['width']}{_listed(features)}",
    ]
    if not massive:
        return [*lines, "massive activations: none"]
    top = massive[0]  # the largest comes first
    where = sorted({entry["class"] for entry in massive}, key=("first", "delimiter", "other").index)
    classes = {"first": "first tokens", "delimiter": "delimiters", "other": "other tokens"}
    numbers = sorted({entry["dimension"] for entry in massive})
    found = sorted({block for entry in massive for block in entry["blocks"]})
    lines.append(
        f"massive activations: up to {abs(top['value']):,.0f}, {top['ratio']:,.0f} times the median, on "
        f"{' and '.join(classes[name] for name in where)}, after blocks {found[0]} to {found[-1]}, "
        f"in {len(numbers)} dimension{'s' if len(numbers) > 1 else ''}{_listed(numbers)}"
    )
    return lines


def _listed(numbers: Sequence[int], most: int = 6) -> str:
    if not numbers:
        return ""
    return f" ({', '.join(map(str, numbers[:most]))}{', …' if len(numbers) > most else ''})"
