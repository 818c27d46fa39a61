"""fewbits study NAME: measure a figure of the literature again, write its record, figures and page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import print_json
from fewbits.cli.progress import ProgressBar
from fewbits.core.errors import BadInput

app = typer.Typer(
    help="Measure a figure of the literature again: a page, its figures (PNG, SVG) and a JSON record.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Out = Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write to. Default: study-NAME.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the paths written, and the results, as JSON.")]


def run(name: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Runs the study `name` of STUDIES and writes what it found."""
    from fewbits.evaluation.studies import STUDIES
    from fewbits.report.study import write_study

    study = STUDIES.get(name)
    with ProgressBar(quiet=as_json) as progress:
        record = study(on_progress=progress, **options)
    paths = write_study(record, out or Path(f"study-{name}"))
    if as_json:
        print_json({**paths, "results": record["results"]})
    else:
        print(paths["page"])


@app.command("formats")
@guarded()
def formats(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Measure its tensors: directory, .gguf file, hub id, or 'demo'."),
    ] = None,
    contrast: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|gaussian",
            help="With MODEL: what to measure beside it; also a directory with an encoder. "
            "Default: gaussian, a ResNet with Gaussian weights.",
        ),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="With MODEL: weights that share a scale. Default: 64.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="With MODEL: UTF-8 text file to show it. Default: built-in.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="With MODEL: sequences of text. Default: up to 8.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="With MODEL: tokens per sequence. Default: 512.")] = None,
    seed: Annotated[int | None, typer.Option(help="With MODEL: chooses sequences and samples. Default: 0.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Which data type suits which distribution, exactly: uniform, Gaussian, Laplace, Student-t, with outliers.

    Every format at its best clipping, against the best there can be at as many bits (Lloyd-Max, rate-distortion).

    With MODEL the same on its own tensors: every weight, and every activation on some text, in every format at its best
    clipping; which wins where, and how outliers decide it, beside a network that has none.
    """
    options = {
        "contrast": contrast,
        "group_size": group_size,
        "text": text,
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if model is not None:
        run("model_formats", out, as_json, model=model, **given)
    elif given:
        option = next(iter(given)).replace("_", "-")
        raise BadInput(f"--{option} needs a MODEL to measure: fewbits study formats MODEL --{option} ...")
    else:
        run("formats", out, as_json)


@app.command("bits")
@guarded()
def bits(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="One model, truncated to several depths, or several models.")
    ],
    bits: Annotated[str, typer.Option(metavar="LIST", help="Bit-widths: 2-8, or 3,4,5.")] = "2-8",
    types: Annotated[
        str | None, typer.Option(metavar="LIST", help="Data types, the first on every size: int-asym,int,float,...")
    ] = None,
    block_sizes: Annotated[
        str | None, typer.Option(metavar="LIST", help="Weights that share a scale. Default: 32,64,128,channel.")
    ] = None,
    formats: Annotated[
        str, typer.Option(metavar="LIST", help="Further formats, on the largest size: nvfp4,int4-g16,...")
    ] = "",
    depths: Annotated[
        str | None, typer.Option(metavar="LIST", help="Blocks to keep. Default: all, 90 %, 80 %, two thirds.")
    ] = None,
    truncate: Annotated[str, typer.Option(help="Which blocks go first: importance or random.")] = "importance",
    draws: Annotated[int | None, typer.Option(help="Random truncations of each depth. Default: 3.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file. Default: built-in, held out.")] = None,
    samples: Annotated[int | None, typer.Option(help="Sequences to evaluate on. Default: 8.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence. Default: 96.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the sequences and the random truncations.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Every data type and block size, on every size: hours.")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """How many bits per weight are best per total bit: quality of 2 to 8 bits against the bits of the whole model.

    Round-to-nearest in memory on each size, data type and block size; Dettmers and Zettlemoyer's k-bit scaling laws.
    """
    given = {
        "types": _list(types),
        "block_sizes": _list(block_sizes),
        "depths": _numbers(depths, "depths"),
    }
    run(
        "bits",
        out,
        as_json,
        models=models,
        bits=_numbers(bits, "bits") or (),
        formats=_list(formats) or (),
        truncate=truncate,
        draws=draws,
        text=text,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        full=full,
        **{name: value for name, value in given.items() if value is not None},
    )


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str | None, what: str) -> list[int] | None:
    """'2-4,8' -> [2, 3, 4, 8]."""
    found: list[int] = []
    for part in _list(text) or []:
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if match is None:
            raise BadInput(f"--{what} {text!r}: numbers and ranges separated by commas, such as 2-4,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first > 999:
            raise BadInput(f"--{what} {text!r}: {part} is a range of {last - first + 1} numbers")
        found += range(first, last + 1)
    return found if text is not None else None


@app.command("outliers")
@guarded()
def outliers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or 'demo'.")],
    out: Out = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file: half observed, half measured. Default: built-in.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Sequences to observe, and as many to measure on.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the sequences and the random dimensions.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Outlier features and massive activations of MODEL: where, what INT8 pays for them, perplexity without them."""
    run("outliers", out, as_json, model=model, text=text, samples=samples, sequence_length=sequence_length, seed=seed)
