"""fewbits eval MODEL [--against REF]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.certify import add_to_certificate, read_certificate
from fewbits.cli.console import message, plus_minus, print_json, print_table
from fewbits.cli.progress import ProgressBar


@guarded()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or 'demo'.")],
    against: Annotated[
        str | None, typer.Option(metavar="REF", help="The original: adds KL divergence and top-1 agreement.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file. Default: built-in, held out.")] = None,
    samples: Annotated[int | None, typer.Option(help="Sequences to evaluate on.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the sequences.")] = 0,
    kv: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="Read the text piece by piece, keys and values stored as int4, int2, …"),
    ] = None,
    certify: Annotated[
        bool,
        typer.Option("--certify", help="Add the result to the certificate of MODEL, a quantized directory."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Perplexity of MODEL and, against the original, KL divergence with error bars and top-1 agreement."""
    from fewbits.evaluation import evaluate as run

    if certify:
        read_certificate(Path(model))  # before minutes of measuring for one that cannot be read
    given = {"samples": samples, "sequence_length": sequence_length}
    with ProgressBar() as bar:
        evaluation = run(
            model,
            against=against,
            text=text,
            seed=seed,
            kv=kv,
            progress=bar.step,
            **{name: value for name, value in given.items() if value is not None},
        )
    result = evaluation.to_dict()
    if certify:
        add_to_certificate(Path(model), evaluations=[result])
    if as_json:
        print_json(result)
    else:
        tell(result)


def tell(result: dict[str, Any]) -> None:
    """An evaluation as a table on standard output."""
    rows = [("perplexity", plus_minus(result["perplexity"], 3))]
    if result.get("reference_perplexity"):
        rows.append(("perplexity of the original", plus_minus(result["reference_perplexity"], 3)))
    if result.get("lost"):
        rows.append(("  logarithm of their ratio, nats per token", plus_minus(result["lost"])))
    if kl := result.get("kl"):
        rows.append(("KL(original || model), nats per token", plus_minus(kl)))
        rows.append(("  median, 99th percentile", f"{kl['median']:.4f}, {kl['p99']:.4f}"))
    if result.get("top1"):
        rows.append(("same most likely token", plus_minus(result["top1"])))
    print_table(("measure", "value"), rows)
    used = result["text"]
    message(f"on {used['description']}: {used['tokens']} tokens in sequences of {used['sequence_length']}")
