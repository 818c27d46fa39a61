"""fewbits inspect MODEL"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message, plus_minus, print_json, print_table
from fewbits.cli.progress import ProgressBar
from fewbits.core.errors import BadInput
from fewbits.core.units import bytes_text, duration_text

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 1 << 20, "gib": 1 << 30}


@guarded()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or 'demo'.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory for page, figures and record. Default: inspect-NAME.")
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Scheme or format to try (W4A16, W4A16-g64, nf4-g64); may be repeated. Default: all."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What the weights must fit in: 4GB, 800MB.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="KL, nats per token, that counts as little loss.")] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Text file, may be repeated. Default: built-in text.", show_default=False),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows of text to measure on.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: chosen.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """What MODEL is made of, what each scheme would cost it, and which to take: for a model never quantized before.

    Weights are rounded to nearest, so the loss shown is what GPTQ, the default of `fewbits quantize`, starts from.
    """
    from fewbits.evaluation.inspection import inspect as run
    from fewbits.report.inspection import page
    from fewbits.report.study import write_page

    given = {"samples": samples, "max_loss": max_loss}
    room = None if memory is None else _bytes(memory)
    with ProgressBar(quiet=as_json) as bar:
        record = run(
            model,
            schemes=scheme or (),
            text=list(calibration) if calibration else None,
            sequence_length=sequence_length,
            seed=seed,
            memory=room,
            device=device,
            on_progress=bar,
            **{name: value for name, value in given.items() if value is not None},
        )
    name = Path(model.rstrip("/")).name.removesuffix(".gguf")
    paths = write_page(record, page(record), out or Path(f"inspect-{name}"))
    if as_json:
        print_json({**record, "paths": paths})
        return
    tell(record)
    message(f"\n{duration_text(record['seconds'])}; page: {paths['page']}")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or (match[2] or "b") not in _UNITS:
        raise BadInput(f"memory {text!r}; a number with a unit is needed: 4GB, 800MB, 6GiB")
    return round(float(match[1]) * _UNITS[match[2] or "b"])


def tell(record: dict[str, Any]) -> None:
    """The record in a few tables on standard output."""
    from fewbits.report.inspection import outlier_lines

    results = record["results"]
    model = results["model"]
    family = model["family"] or f"{model['type']} (no table of this family: no transforms)"
    print(
        f"{model['name']}: {family}, {model['parameters'] / 1e6:.1f} M parameters in {model['blocks']} blocks, "
        f"{bytes_text(model['bytes'])} on disk, meant to run in {model['dtype']}\n"
    )
    print_table(("part", "parameters", "on disk", "stored as", "quantizing"), _parts(results["parts"]))
    if quantized := results.get("quantized"):
        _tell_quantized(model["name"], quantized)
        return
    print()
    for line in outlier_lines(results["outliers"]):
        print(line)
    print("\nLoss of rounding to nearest, least first; KL in nats per token")
    heads = ("scheme", "size", "bits", "output error", "KL to the original", "same top token", "reads it", "here")
    print_table(heads, _schemes(results["schemes"]))
    for label, why in results["skipped"].items():
        print(f"not tried: {label}, {why}")
    print("\nRecommended")
    for choice in results["recommended"]:
        print(f"  {choice['purpose']}: {choice['scheme'] or 'none'} ({choice['why']})")
        if choice["command"]:
            print(f"    {choice['command']}")


def _parts(parts: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            part["part"],
            f"{part['parameters'] / 1e6:.2f} M" if part["parameters"] else "-",
            bytes_text(part["bytes"]) if part["bytes"] else "-",
            ", ".join(part["stored"]) or "-",
            part["what"],
        )
        for part in parts
    ]


def _schemes(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    from fewbits.report.inspection import here, reader

    return [
        (
            row["label"],
            bytes_text(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{100 * row['error']:.3g} %",
            plus_minus(row["kl"]),
            f"{100 * row['top1']['mean']:.1f} %",
            reader(row),
            here(row),
        )
        for row in rows
    ]


def _tell_quantized(name: str, quantized: dict[str, Any]) -> None:
    what = f"quantized already by {quantized['method']}"
    print(f"\n{what}: {quantized['modules']} linears" if quantized["modules"] else f"\n{what}")
    for format, count in quantized["formats"].items():
        print(f"  {count} in {format}")
    if quantized["note"]:
        print(quantized["note"])
    message(f"next: fewbits report {name}   fewbits eval {name} --against ORIGINAL")
