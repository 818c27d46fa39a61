"""Format names: element, then how zero is treated, then which block shares a scale, then how scales are stored.

Of activations last whether scales are decided beforehand.

    int4-g128   int4-asym-g64   int4-min-g64   int4-narrow-channel   int8-token   fp8_e4m3-tensor   fp8_e4m3-tile128
    nf4-g64     nf4-g64-dq      fp4_e2m1-g32-e8m0     fp4_e2m1-g16-e4m3

| part | says |
|---|---|
| `-asym` | integers with a zero point |
| `-min` | integers from 0 and a real minimum per block, stored as its scale is: HQQ's zero |
| `-narrow` | integers of the restricted range, -(2**(b-1)-1) up: zero is the middle level |
| `-tensor` `-channel` `-token` `-g64` `-tile128` | which block shares a scale |
| `-dq` `-e8m0` `-e4m3` | scales stored twice quantized, as powers of two, as E4M3 under an outer float32 |
| `-e4m3d` | as `-e4m3` with the outer scale's reciprocal, to divide by |
| `-static` | activations: scales from calibration, for `-tensor` and groups (rows.py) |
| `-sinks` | after `-static`: a token far beyond the range takes a scale of its own |

Scales are plain floats where nothing is said. Formats known under a name of their own are in `NAMED`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from fewbits.core.errors import BadInput, unknown
from fewbits.formats.base import Format
from fewbits.formats.best_minifloat import BestMinifloat
from fewbits.formats.blocks import Scaling
from fewbits.formats.elements import ELEMENTS, NARROW, UNSIGNED
from fewbits.formats.ggml_tables import FORMATS as GGML_TABLES
from fewbits.formats.grid import Grid
from fewbits.formats.kquant import FORMATS as GGUF
from fewbits.formats.nvfp4 import LIMIT, FourOverSix
from fewbits.formats.scales import DividedScale, DoubleScale, FloatScale, PlainScale, PowerScale, ScaleStore

_BLOCKS = ("tensor", "channel", "token")
STORES: dict[str, Callable[[], ScaleStore]] = {
    "dq": DoubleScale,
    "e8m0": PowerScale,
    "e4m3": FloatScale,
    "e4m3d": DividedScale,
}
_NAME = re.compile(
    r"(?P<element>[a-z0-9_]+?)(?:-(?P<zero>asym|min|narrow))?"
    r"-(?P<block>tensor|channel|token|g(?P<size>\d+)|tile(?P<tile>\d+))"
    rf"(?:-(?P<store>{'|'.join(STORES)}))?"
    r"(?P<static>-static(?P<sinks>-sinks)?)?"
)


def _four_over_six() -> Format:
    scaling = Scaling(block="group", group_size=16, store=FloatScale(LIMIT))
    return FourOverSix(name="nvfp4_4over6", grid=ELEMENTS["fp4_e2m1"], scaling=scaling)


# Formats with a name of their own: another spelling, or a class of their own.
NAMED: dict[str, str | Callable[[], Format]] = {
    "mxfp4": "fp4_e2m1-g32-e8m0",
    "mxfp6": "fp6_e2m3-g32-e8m0",
    "mxfp6_e3m2": "fp6_e3m2-g32-e8m0",
    "mxfp8": "fp8_e4m3-g32-e8m0",
    "mxfp8_e5m2": "fp8_e5m2-g32-e8m0",
    "nvfp4": "fp4_e2m1-g16-e4m3",
    "nvfp4_ct": "fp4_e2m1-g16-e4m3d",
    "nvfp4_4over6": _four_over_six,
    "fp8_block": "fp8_e4m3-tile128",
    **GGUF,
    **GGML_TABLES,
}


@cache
def parse_format(name: str) -> Format:
    """The format called `name`, e.g. ``int4-asym-g64``. Plain scales are float32 until `with_scale_dtype`.

    Raises BadInput with the known names, nearest first.
    """
    named = NAMED.get(name)
    if callable(named):
        return named()
    match = _NAME.fullmatch(named or name)
    if match is None:
        element = name.split("-")[0]
        if element in ELEMENTS:
            raise BadInput(f"format {name!r} names no scaling; known: {', '.join(_examples(element))}")
        raise unknown("format", name, known_formats())
    if match["element"] not in ELEMENTS:
        raise unknown("format", name, known_formats())
    size = next((int(match[part]) for part in ("size", "tile") if match[part] is not None), None)
    if size == 0:
        raise BadInput(f"format {name!r}: a group holds at least 1 weight; common sizes are 32, 64 and 128")
    block = match["block"] if size is None else "group" if match["size"] is not None else "tile"
    moved, fit = match["zero"] if match["zero"] in ("asym", "min") else None, match["element"] in FITTED
    if moved and match["store"] is not None:
        raise BadInput(f"format {name!r}: scales stored as {match['store']} take no offset; leave -{moved} out")
    kind = BestMinifloat if match["element"] in BEST_MINIFLOATS else Format
    return kind(
        name=name,
        grid=_grid(name, match["element"], match["zero"]),
        scaling=Scaling(
            block=block,
            group_size=size,
            zero_point=moved == "asym",
            minimum=moved == "min",
            store=STORES[match["store"]]() if match["store"] else PlainScale(),
            static=match["static"] is not None,
            sinks=match["sinks"] is not None,
        ),
        fit=fit,
    )


# Elements whose levels are computed from the tensor.
FITTED = frozenset(name for name in ELEMENTS if name.endswith("_fit"))
BEST_MINIFLOATS = frozenset({"fp4_fit", "fp8_fit"})


def _grid(name: str, element: str, zero: str | None) -> Grid:
    if zero is None:
        return ELEMENTS[element]
    table = NARROW if zero == "narrow" else UNSIGNED
    if element not in table:
        takes = {"asym": "a zero point", "min": "a minimum", "narrow": "a restricted range"}[zero]
        raise BadInput(f"format {name!r}: only integer types take {takes}; use {name.replace(f'-{zero}', '')!r}")
    return table[element]


# The elements most files are made of are listed under every scaling, the others under two.
_COMMON = (*UNSIGNED, "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4")


def _examples(element: str) -> list[str]:
    if element not in _COMMON:
        return [f"{element}-g64", f"{element}-channel"]
    names = [f"{element}-g64", f"{element}-g128", *(f"{element}-{block}" for block in _BLOCKS), f"{element}-tile128"]
    if element in UNSIGNED:
        names += [f"{element}-asym-g64", f"{element}-asym-channel", f"{element}-min-g64", f"{element}-narrow-g64"]
    return names


def known_formats() -> list[str]:
    """A name for every element under every scaling; groups may have any size, 64 and 128 stand for it."""
    stored = ["nf4-g64-dq", "int4-g64-dq"]
    return [*(name for element in ELEMENTS for name in _examples(element)), *stored, *NAMED]
