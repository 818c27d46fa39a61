"""Format names: element, then scaling.

int4-g128   int4-asym-g64   int8-channel   int8-token   fp8_e4m3-tensor   fp4_e2m1-g16   nf4-g64
"""

from __future__ import annotations

import re

from fewbits.core.errors import BadInput, nearest_first, unknown
from fewbits.formats.base import Format, Scaling
from fewbits.formats.elements import ELEMENTS, UNSIGNED

_BLOCKS = ("tensor", "channel", "token")
_NAME = re.compile(r"(?P<element>[a-z0-9_]+?)(?P<asym>-asym)?-(?P<block>tensor|channel|token|g(?P<size>\d+))")


def parse_format(name: str) -> Format:
    """The format called `name`, e.g. ``int4-asym-g64``. Scales are float32 until `with_scale_dtype`.

    Raises BadInput with the known names, nearest first.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        element = name.split("-")[0]
        if element in ELEMENTS:
            raise BadInput(f"format {name!r} names no scaling; known: {', '.join(_examples(element))}")
        raise unknown("format", name, known_formats())
    element = match["element"]
    if element not in ELEMENTS:
        raise unknown("format", name, known_formats())
    asymmetric = match["asym"] is not None
    if asymmetric and element not in UNSIGNED:
        raise BadInput(f"format {name!r}: only integer types take a zero point; use {name.replace('-asym', '')!r}")
    size = None if match["size"] is None else int(match["size"])
    if size == 0:
        raise BadInput(f"format {name!r}: a group holds at least 1 weight; common sizes are 32, 64 and 128")
    return Format(
        name=name,
        grid=(UNSIGNED if asymmetric else ELEMENTS)[element],
        scaling=Scaling(block="group" if size is not None else match["block"], group_size=size, zero_point=asymmetric),
    )


def _examples(element: str) -> list[str]:
    names = [f"{element}-g64", f"{element}-g128", *(f"{element}-{block}" for block in _BLOCKS)]
    if element in UNSIGNED:
        names += [f"{element}-asym-g64", f"{element}-asym-channel"]
    return names


def known_formats() -> list[str]:
    """A name for every element under every scaling; groups may have any size, 64 and 128 stand for it."""
    return [name for element in ELEMENTS for name in _examples(element)]


def suggest(name: str, count: int = 6) -> list[str]:
    """The known format names most like `name`."""
    return nearest_first(name, known_formats())[:count]
