"""A grid: the sorted levels a code can name.

Every scalar data type of at most 8 bits is a sorted tuple of real levels; a code is an index into it.
INT4 is -8..7, E2M1 is 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, NF4 is sixteen quantiles. Rounding
is to the nearest level. On a tie, arithmetic types go to the even code (round half to even, as IEEE 754
and `torch.round` do); tables go to the lower level (as bitsandbytes' NF4 does).

`Grid` works by table look-up and is the definition. `IntegerGrid` and `FloatGrid` (minifloat.py) override it with
arithmetic that equals the table bit for bit (the contract tests compare them).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype).to(device)


@lru_cache(maxsize=256)
def _boundaries(
    levels: tuple[float, ...], ties_up: tuple[bool, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Midpoints between levels, nudged down one ulp where a tie goes to the upper level.

    `bucketize` sends x == boundary to the lower side, so "x >= m goes up" is "x > the number before m".
    """
    exact = torch.tensor(levels, dtype=torch.float64)
    middle = ((exact[1:] + exact[:-1]) / 2).to(dtype)
    before = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    return torch.where(torch.tensor(ties_up), before, middle).to(device)


_CELLS = 1 << 16  # of float32, by its upper half
_LARGE = 1 << 14  # values from which a table of cells pays


def _ordered(x: Tensor) -> Tensor:
    """float32 as int32 of the same order."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@lru_cache(maxsize=64)
def _cells(levels: tuple[float, ...], ties_up: tuple[bool, ...]) -> Tensor | None:
    """For each cell, the float32 numbers whose upper halves agree: (code of the first) << 17 | (how many have it).

    None where a cell has three codes or more. A search by bisection takes as many steps as a code has bits; this
    takes one look, and floats are finer than any grid where the grid is fine.
    """
    bounds = _ordered(_boundaries(levels, ties_up, torch.float32, torch.device("cpu"))).long() + (1 << 31)
    first = torch.arange(_CELLS, dtype=torch.int64) << 16
    code = torch.bucketize(first, bounds)
    last = torch.bucketize(first + 0xFFFF, bounds)
    if bool((last - code > 1).any()):
        return None
    upper = torch.cat([bounds, torch.full((1,), 1 << 33)])[code]
    count = (upper - first + 1).clamp(max=_CELLS)
    return (code << 17 | count).int()


def _working(x: Tensor) -> Tensor:
    """16-bit inputs are rounded in float32; float32 and float64 in themselves."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _look_up(x: Tensor, cells: Tensor) -> Tensor:
    """Codes of `x` by the table of `_cells`."""
    ordered = _ordered(x)
    found = torch.index_select(cells, 0, (ordered >> 16).add_(_CELLS // 2).flatten()).view(x.shape)
    # One more where the lower half is not below the count: the sign of their difference, for comparisons are slow.
    after = (ordered & 0xFFFF).sub_(found & 0x1FFFF) >> 31
    return (found >> 17).add_(after).add_(1).to(torch.uint8)


@dataclass(frozen=True)
class Grid:
    """Sorted `levels`, at most 2**bits of them. `top` is where absmax scaling puts the largest magnitude."""

    name: str
    bits: int
    levels: tuple[float, ...]
    ties_up: tuple[bool, ...] = ()
    kind: str = "table"

    def __post_init__(self) -> None:
        assert list(self.levels) == sorted(set(self.levels)), f"{self.name}: levels must be sorted and distinct"
        assert 2 <= len(self.levels) <= 1 << self.bits <= 256
        if not self.ties_up:
            object.__setattr__(self, "ties_up", (False,) * (len(self.levels) - 1))

    @property
    def top(self) -> float:
        """Scaled magnitude of the largest element under absmax scaling."""
        return max(abs(self.levels[0]), abs(self.levels[-1]))

    def nearest(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the levels nearest to `x`, elementwise."""
        x = _working(x)
        if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() >= _LARGE:
            cells = _cells(self.levels, self.ties_up)
            if cells is not None:
                return _look_up(x, cells)
        bounds = _boundaries(self.levels, self.ties_up, x.dtype, x.device)
        return torch.bucketize(x, bounds, out_int32=True).to(torch.uint8)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels of `codes`, elementwise."""
        table = _table(self.levels, dtype, codes.device)
        return torch.index_select(table, 0, codes.flatten().int()).view(codes.shape)

    def snap(self, x: Tensor) -> Tensor:
        """`x` moved to its nearest level; dtype kept (16-bit input gives float32)."""
        x = _working(x)
        return self.value(self.nearest(x), x.dtype)

    def snap_(self, x: Tensor) -> Tensor:
        """`snap` of a float32 or float64 tensor that nobody else needs; it may be overwritten."""
        return self.snap(x)


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Consecutive integers: rounding is `torch.round` and a clamp."""

    @property
    def top(self) -> float:
        # (2**b - 1) / 2 for the full range -2**(b-1) .. 2**(b-1)-1: the absmax element sits half a step
        # outside on the positive side, as in GPTQ and compressed-tensors, and the step is smallest.
        return (self.levels[-1] - self.levels[0]) / 2

    def nearest(self, x: Tensor) -> Tensor:
        # By way of int16: no vector instruction takes floats to uint8.
        return self.snap(x).to(torch.int16).sub_(int(self.levels[0])).to(torch.uint8)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype) + self.levels[0]

    def snap(self, x: Tensor) -> Tensor:
        return torch.round(_working(x)).clamp_(self.levels[0], self.levels[-1])

    def snap_(self, x: Tensor) -> Tensor:
        return x.round_().clamp_(self.levels[0], self.levels[-1])


def integer_grid(bits: int, *, signed: bool) -> IntegerGrid:
    """INTb: -2**(b-1) .. 2**(b-1)-1, or 0 .. 2**b-1 for use with a zero point."""
    low = -(1 << (bits - 1)) if signed else 0
    return _integers(f"int{bits}" if signed else f"uint{bits}", bits, low, low + (1 << bits) - 1)


def narrow_integer_grid(bits: int) -> IntegerGrid:
    """INTb of the restricted range -(2**(b-1)-1) .. 2**(b-1)-1."""
    top = (1 << (bits - 1)) - 1
    return _integers(f"int{bits}_narrow", bits, -top, top)


def _integers(name: str, bits: int, low: int, high: int) -> IntegerGrid:
    levels = tuple(float(level) for level in range(low, high + 1))
    # A tie between n and n+1 goes up exactly when n is odd: round half to even.
    return IntegerGrid(name, bits, levels, tuple(int(level) % 2 == 1 for level in levels[:-1]), "integer")
