"""fewbits convert SRC --to X -o OUT"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message, print_json, print_table
from fewbits.cli.progress import ProgressBar
from fewbits.core.errors import BadInput

DTYPES = ("float32", "bfloat16", "float16")


@guarded(resumes=True)
def convert(
    model: Annotated[str, typer.Argument(metavar="SRC", help="A quantized checkpoint: a directory or hub id.")],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="Checkpoint format, of `fewbits list checkpoints`, or dense.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="New directory; a killed run resumes there.")],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what the format cannot hold, and state the error.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help=f"Of what becomes dense: {', '.join(DTYPES)}.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an unfinished run did; a finished OUT is kept.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
) -> None:
    """A quantized checkpoint in another format; lossless where the formats share their numbers, else refused."""
    import torch

    from fewbits.pipeline.convert import convert as run

    if dtype is not None and dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: allowed: {', '.join(DTYPES)}")
    with ProgressBar() as bar:
        done = run(
            model, to, out, requantize=requantize, dtype=getattr(torch, dtype) if dtype else None, restart=restart,
            progress=bar,
        )  # fmt: skip
    if as_json:
        print_json(done.to_dict())
        return
    kinds: dict[tuple[str, str, str], list[float | None]] = {}
    for layer in done.layers:
        kinds.setdefault((layer.before, layer.after, layer.action), []).append(layer.sqnr_db)
    print_table(
        ("from", "to", "what happened", "layers", "least SQNR"),
        [(*kind, str(len(errors)), _decibels(errors)) for kind, errors in kinds.items()],
    )
    rounded = [layer for layer in done.layers if layer.sqnr_db is not None]
    if rounded:
        print_table(
            ("layer", "what happened", "SQNR"),
            [(layer.name, layer.action, _decibels([layer.sqnr_db])) for layer in rounded],
        )
    for note in done.notes:
        message(note)
    message(f"{done.format} -> {done.to}: {done.bytes / 1e6:.1f} MB in {done.seconds:.1f} s; {done.out}")


def _decibels(errors: Iterable[float | None]) -> str:
    """The least of `errors`; those that are None are of layers that lost nothing."""
    least = min((error for error in errors if error is not None), default=None)
    return "-" if least is None else f"{least:.1f} dB"
