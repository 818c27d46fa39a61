"""Printing: tables for people, JSON for machines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def message(text: str) -> None:
    """A line for the person at the terminal: standard error, so that results can be piped."""
    print(text, file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    """`value` with what JSON cannot say (NaN, infinities) as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, allow_nan=False), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output; columns after the first whose cells all start with a digit align right."""
    cells = [list(map(str, row)) for row in rows]
    table = Table(header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        figures = index > 0 and all(row[index][:1].isdigit() or row[index] == "-" for row in cells)
        table.add_column(column, justify="right" if figures else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text: a cell is never read as markup
    # Piped output is not folded at 80 columns: a name that grep should find stays in one piece.
    wide = None if sys.stdout.isatty() else 200
    Console(file=sys.stdout, width=wide, highlight=False).print(table)


def plus_minus(estimate: dict[str, Any] | None, digits: int = 4) -> str:
    """{"mean", "stderr"} as '0.1234 ± 0.0056'; '-' where there is none."""
    if not estimate or estimate.get("mean") is None:
        return "-"
    text = f"{estimate['mean']:.{digits}f}"
    return text if estimate.get("stderr") is None else f"{text} ± {estimate['stderr']:.{digits}f}"
