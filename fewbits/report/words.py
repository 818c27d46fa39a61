"""Values as the page writes them."""

from __future__ import annotations

import html
from typing import Any

from fewbits.report.certificate import Value

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
DASH = '<span class="none">\N{EN DASH}</span>'


def esc(value: Any) -> str:
    """`value` as text that HTML cannot take for markup."""
    return html.escape(str(value), quote=True)


def percent(value: float) -> str:
    """0.0123 -> '1.2 %': two digits, and all of them from 100 % on."""
    share = 100 * value
    return f"{share:.0f} %" if share >= 99.5 else f"{share:#.2g}".rstrip(".") + " %"


def change(ratio: float, digits: int = 0) -> str:
    """1.112 -> '+11 %', with a true minus sign where it fell."""
    return f"{100 * (ratio - 1):+.{digits}f} %".replace("-", MINUS)


def plus_minus(value: Value | None, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """'12.34 ± 0.05' as HTML; a dash when there is no value. `unit` follows the mean."""
    if value is None:
        return DASH
    error = "" if value.stderr is None else f' <span class="pm">± {value.stderr * scale:.{digits}f}</span>'
    return f"{value.mean * scale:.{digits}f}{esc(unit)}{error}"
