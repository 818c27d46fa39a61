"""fewbits verify DIR --runtime X"""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message, print_json, print_table
from fewbits.cli.progress import ProgressBar


@guarded()
def verify(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint: a directory, a .gguf file or a hub id.")],
    runtime: Annotated[str, typer.Option(help="transformers, vllm, llama.cpp or mlx.")] = "transformers",
    source: Annotated[
        str | None,
        typer.Option(help="The original model, to compare weights and a few logits with.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove that a checkpoint loads and decodes right in a runtime, check by check; exit code 1 if one failed."""
    from fewbits.evaluation.verification.verify import verify as run

    with ProgressBar() as bar:
        found = run(model, runtime, source=source, progress=bar)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(("check", "verdict", "what was found"), [(c.name, c.verdict, c.detail) for c in found.checks])
        for check in found.checks:
            if check.mend:
                message(f"{check.name}: {check.mend}")
        verdict = "nothing failed" if found.passed else "it would not run right"
        message(f"{found.path} ({found.format}) for {found.runtime}: {verdict}, in {found.seconds:.1f} s")
    if not found.passed:
        raise typer.Exit(1)
