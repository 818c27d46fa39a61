"""How keys and values of attention are stored: names such as `int4`, `int2-recent64`, `int4-rotated-token`.

A token leaves one key and one value a head in the cache, and they differ in what stands out. Keys have *channels* that
are large for every token, so their scales run along tokens: a group is one channel of 32 tokens. Values have no such
channels, and a value is multiplied by one attention weight, so a group is 32 channels of one token. What attention
looks at most stays as it is: the most recent tokens and the first ones (KIVI, Liu et al. 2024, arXiv 2402.02750;
first tokens: Xiao et al. 2023, arXiv 2309.17453).

A name is an element, then options in any order:

| part | says | without it |
|---|---|---|
| `int2` ... `int8` | integers and a real minimum a group: KIVI's | |
| `fp8` or any other element | scales without offset | |
| `-g32` | numbers a group | 32 |
| `-recent128` | tokens at the end that are never quantized | 128 |
| `-first4` | tokens at the beginning that are never quantized | 4 |
| `-rotated` | heads go through a Hadamard transform first, which leaves no channel large | |
| `-token` | scales of keys run along channels, as those of values do | along tokens |

Scales and minima take 16 bits each: a number of `int4` takes 4 + 32/32 = 5 bits, of `int2` 3, of `fp8` 8.5.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch

from fewbits.core.errors import BadInput, unknown
from fewbits.formats.base import Format
from fewbits.formats.elements import ELEMENTS, UNSIGNED
from fewbits.formats.hadamard import block_factors
from fewbits.formats.parse import FITTED, parse_format

_ALIASES = {"fp8": "fp8_e4m3", "fp4": "fp4_e2m1"}
ELEMENTS_OF_CACHES = tuple(name for name, grid in ELEMENTS.items() if grid.levels[0] < 0 and name not in FITTED)
_OPTION = re.compile(r"g(?P<group>\d+)|recent(?P<recent>\d+)|first(?P<first>\d+)|(?P<rotated>rotated)|(?P<token>token)")


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """group: numbers that share a scale. recent, first: tokens kept as they are. by_token: of the scales of keys."""

    element: str
    group: int = 32
    recent: int = 128
    first: int = 4
    rotated: bool = False
    by_token: bool = False

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS_OF_CACHES:
            raise unknown("element of a key-value cache", self.element, [*_ALIASES, *ELEMENTS_OF_CACHES])
        if self.group < 2:
            raise BadInput(f"groups of {self.group} in a key-value cache; 32 is usual, 2 the least")
        if self.recent < 0 or self.first < 0:
            raise BadInput(f"{self.recent} recent and {self.first} first tokens are kept; 0 or more")

    @property
    def name(self) -> str:
        """The name that `parse_kv` reads, with what is not default."""
        parts = [self.element]
        for field, spelled in (("group", "g"), ("recent", "recent"), ("first", "first")):
            value = getattr(self, field)
            if value != next(f.default for f in dataclasses.fields(self) if f.name == field):
                parts.append(f"{spelled}{value}")
        return "-".join([*parts, *(["rotated"] * self.rotated), *(["token"] * self.by_token)])

    def format(self, length: int) -> Format:
        """The format of rows of `length` numbers: groups of `group` of them, the last shorter where they do not fit."""
        offset = "-min" if self.element in UNSIGNED else ""
        name = f"{self.element}{offset}-g{min(self.group, length)}"
        return parse_format(name).with_scale_dtype(torch.float16)

    def orders(self, width: int) -> tuple[int, ...]:
        """Of the Hadamard transform of a head of `width`; none where nothing is rotated."""
        return block_factors(width) if self.rotated else ()

    def bits_per_number(self, width: int) -> tuple[float, float]:
        """Stored bits of a number of (keys, values), scales and minima counted, for heads of `width`."""
        values = self.format(width).bits_per_weight((1, width))
        if self.by_token:
            return values, values
        return self.format(self.group).bits_per_weight((1, self.group)), values

    def bytes_per_token(self, heads: int, width: int) -> float:
        """Of one layer, for a token that is quantized: keys and values of `heads` heads of `width`."""
        return heads * width * sum(self.bits_per_number(width)) / 8


def parse_kv(name: str) -> KVFormat:
    """The cache called `name`. BadInput says what is wrong and what is allowed."""
    element, *options = name.lower().split("-")
    element = _ALIASES.get(element, element)
    if element not in ELEMENTS_OF_CACHES:
        raise unknown("key-value cache", name, [*_ALIASES, *ELEMENTS_OF_CACHES])
    fields: dict[str, Any] = {}
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            raise BadInput(f"key-value cache {name!r}: {option!r} is none of g32, recent128, first4, rotated, token")
        found, text = next((key, text) for key, text in match.groupdict().items() if text is not None)
        field = {"token": "by_token"}.get(found, found)
        fields[field] = int(text) if text.isdigit() else True
    return KVFormat(element=element, **fields)
