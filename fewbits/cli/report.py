"""fewbits report OUT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import print_json


@guarded()
def report(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="A directory `fewbits quantize` wrote.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The page to write. Default: report.html in OUT.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the path of the page as JSON.")] = False,
) -> None:
    """Write one self-contained HTML page: sizes, accuracy, error by layer, distributions, samples."""
    from fewbits.report.html import write_report

    path = write_report(directory, out)
    if as_json:
        print_json({"report": str(path)})
    else:
        print(path)
