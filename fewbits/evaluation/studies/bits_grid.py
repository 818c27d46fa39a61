"""The grid of `fewbits study bits`: data types by bits, block sizes, and which cell is measured on which model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewbits.core.errors import BadInput, unknown
from fewbits.formats import Format, parse_format

BITS = tuple(range(2, 9))
LADDER_ONLY = (7,)  # bits at which types and blocks are compared in a full run only: 6 and 8 say the same
BLOCK_SIZES = ("32", "64", "128", "channel")
FULL_BLOCK_SIZES = ("16", "32", "64", "128", "256", "channel")
WHOLE = ("channel", "tensor")

# Data type -> bits -> element (with the word that says how zero is treated). Types exist where somebody defined them.
TYPES: dict[str, dict[int, str]] = {
    "int-asym": {bits: f"int{bits}-asym" for bits in BITS},
    "int": {bits: f"int{bits}" for bits in BITS},
    "float": {4: "fp4_e2m1", 6: "fp6_e2m3", 8: "fp8_e4m3"},
    "quantile": {3: "quantile3", 4: "nf4", 8: "quantile8"},
    "lloyd": {bits: f"lloyd{bits}" for bits in BITS},
    "float-e3": {4: "fp4_e3m0", 6: "fp6_e3m2", 8: "fp8_e3m4"},
    "dynamic": {8: "dynamic8"},
}
TYPES_SHOWN = ("int-asym", "int", "float", "quantile", "lloyd")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One format of the grid. block: "64", "channel", ...; type: a key of TYPES, or the format's own name."""

    type: str
    bits: int
    block: str
    format: Format


@dataclass(frozen=True, kw_only=True)
class Grid:
    """ladder: measured on every size. rest: on the largest of each model."""

    base_type: str
    base_block: str
    ladder: tuple[Cell, ...]
    rest: tuple[Cell, ...]

    def cells(self, *, largest: bool) -> tuple[Cell, ...]:
        return self.ladder + self.rest if largest else self.ladder

    def described(self) -> dict[str, Any]:
        cells = self.ladder + self.rest
        return {
            "base_type": self.base_type,
            "base_block": self.base_block,
            "bits": sorted({cell.bits for cell in self.ladder}),
            "types": list(dict.fromkeys(cell.type for cell in cells)),
            "blocks": sorted({cell.block for cell in cells}, key=block_order),
        }


def grid_of(
    bits: Sequence[int], types: Sequence[str], block_sizes: Sequence[str], formats: Sequence[str], *, full: bool
) -> Grid:
    """The grid; BadInput for bits, types, blocks or formats that do not exist."""
    if full:
        types = tuple(dict.fromkeys((*types, *TYPES)))
        block_sizes = tuple(dict.fromkeys((*block_sizes, *FULL_BLOCK_SIZES)))
    for what, values in (("bits", bits), ("data types", types), ("block sizes", block_sizes)):
        if not values:
            raise BadInput(f"no {what}: name at least one")
    for width in bits:
        if width not in BITS:
            raise BadInput(f"{width} bits: the study covers {BITS[0]} to {BITS[-1]}")
    for name in types:
        if name not in TYPES:
            raise unknown("data type", name, TYPES)
    blocks = sorted({_block(size) for size in block_sizes}, key=block_order)
    base_block = min(blocks, key=lambda block: abs(block_order(block) - 64))
    base = types[0]
    bits = sorted(set(bits))

    def row(name: str, block: str) -> list[Cell]:
        return [_cell(name, width, block) for width in bits if width in TYPES[name]]

    ladder = row(base, base_block)
    if not ladder:
        defined = ", ".join(map(str, TYPES[base]))
        raise BadInput(f"data type {base!r} has none of the bits asked for; it has {defined}")
    rest = [cell for block in blocks if block != base_block for cell in row(base, block)]
    for name in types[1:]:
        rest += [cell for block in (blocks if full else [base_block]) for cell in row(name, block)]
    if not full and len(bits) > len(LADDER_ONLY) + 1:
        rest = [cell for cell in rest if cell.bits not in LADDER_ONLY]
    rest += [_named(name) for name in formats]
    if full:
        ladder, rest = ladder + rest, []
    return Grid(base_type=base, base_block=base_block, ladder=tuple(ladder), rest=tuple(rest))


def block_order(block: str) -> float:
    """The size of a block, for sorting; a whole row or tensor comes last."""
    return float(block) if block.isdigit() else 1e9 + len(WHOLE[: WHOLE.index(block)]) if block in WHOLE else 2e9


def _block(text: str) -> str:
    text = str(text).strip()
    if text in WHOLE or re.fullmatch(r"[1-9]\d{0,5}", text):
        return text
    raise BadInput(f"block size {text!r}: a number of weights such as 64, or {' or '.join(WHOLE)}")


def _cell(name: str, bits: int, block: str) -> Cell:
    format = parse_format(f"{TYPES[name][bits]}-{block if block in WHOLE else f'g{block}'}")
    return Cell(type=name, bits=bits, block=block, format=format.with_scale_dtype(torch.float16))


def _named(name: str) -> Cell:
    """A format by name: a type of its own. A name without a scaling (`q4_k`) says its block itself."""
    format = parse_format(name).with_scale_dtype(torch.float16)
    size = format.scaling.group_size
    block = str(size) if size is not None else format.scaling.block
    return Cell(type=name, bits=format.bits, block=block, format=format)
