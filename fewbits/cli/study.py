"""fewbits study NAME: measure a figure of the literature again, write its record, figures and page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import print_json
from fewbits.cli.progress import ProgressBar

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
def formats(out: Out = None, as_json: AsJson = False) -> None:
    """Which data type suits which distribution, exactly: uniform, Gaussian, Laplace, Student-t, with outliers.

    Every format at its best clipping, against the best there can be at as many bits (Lloyd-Max, rate-distortion).
    """
    run("formats", out, as_json)
