"""Search for the scales of K-quants: which (scale, minimum) per sub-block, and which integers say them.

For a sub-block of K weights x with importances v, a candidate range gives levels l = round((x + m0) / s0). Given the
levels, the best scale and minimum are a weighted least-squares fit in closed form,

    minimise  sum v (x - s l + m)^2      =>   s = (Sv Sxl - Sx Sl) / (Sv Sll - Sl^2),   m = (s Sl - Sx) / Sv

(symmetric types: s = Sxl / Sll), and its error follows from the same five sums: no second pass. The best candidate is
re-rounded and re-fitted (Lloyd's iteration: the error cannot grow). Then the scales of a super-block become
integers under one fp16, and a joint descent polishes what is really stored: levels given scales, the two
fp16 given levels and integers, integers given levels and fp16; the best of all rounds is kept.

Weights lie as [K, n], sub-blocks side by side: sums over a sub-block then run along whole vectors.

Differs from llama.cpp's make_qkx3_quants, make_qx_quants and make_qp_quants: the objective is the plain (or
importance-weighted) squared error, without their factor that favours large weights; integers are chosen for the
fp16 that is stored, which matters where it is subnormal; and the joint descent is new.
Source of the idea: I. Kawrakow, llama.cpp pull requests 1684 (k-quants) and 4861 (importance matrix).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import BadInput

# By the highest level: factors on each end of a sub-block's range, all pairs of which the search tries.
_SHRUNK = {3: (1.0, 0.85, 0.7, 0.55), 15: (1.0, 0.94, 0.87, 0.78), 31: (1.0, 0.97, 0.93, 0.88)}
# The level on which the largest weight is put, as a multiple of the lowest level.
_SYMMETRIC = (1.0, 0.925, 1.075, 0.85, 1.15, 0.78, 1.25, 0.7)
_REFITS = 2
_ROUNDS = 4


@dataclass(frozen=True)
class Sums:
    """Weighted sums over each sub-block, [n]: of v, x, l, l^2, x*l."""

    v: Tensor
    x: Tensor
    level: Tensor
    square: Tensor
    product: Tensor

    def gain(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """sum v x^2 less the squared error of  scale * l - minimum."""
        cross = scale * self.product - minimum * self.x
        own = scale * scale * self.square - 2 * scale * minimum * self.level + minimum * minimum * self.v
        return 2 * cross - own

    def scale_alone(self) -> Tensor:
        return _ratio(self.product, self.square)

    def fit(self, *, affine: bool) -> tuple[Tensor, Tensor]:
        """Scale and minimum (0 where symmetric, never negative) of the least squared error."""
        alone = self.scale_alone()
        if not affine:
            return alone, torch.zeros_like(alone)
        scale = _ratio(self.v * self.product - self.x * self.level, self.v * self.square - self.level * self.level)
        minimum = _ratio(scale * self.level - self.x, self.v)
        valid = (minimum > 0) & (scale > 0)
        return torch.where(valid, scale, alone), torch.where(valid, minimum, torch.zeros_like(minimum))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))


@dataclass(frozen=True)
class Columns:
    """Sub-blocks as columns: `x` [K, n] float32, importances `v` [K, n] or None for 1; levels `low` ... `high`."""

    x: Tensor
    v: Tensor | None
    low: float
    high: float

    @property
    def affine(self) -> bool:
        return self.low == 0

    def levels(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """Nearest levels [K, n]; 0 where the scale is 0."""
        inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
        inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
        shifted = self.x * inverse if minimum is None else (self.x + minimum).mul_(inverse)
        return shifted.round_().clamp_(self.low, self.high)

    def sums(self, level: Tensor, fixed: tuple[Tensor, Tensor]) -> Sums:
        """`fixed`: what does not depend on the levels, from `constants`."""
        weighted = level if self.v is None else level * self.v
        return Sums(*fixed, weighted.sum(0), (weighted * level).sum(0), weighted.mul(self.x).sum(0))

    def constants(self) -> tuple[Tensor, Tensor]:
        if self.v is None:
            return torch.full_like(self.x[0], self.x.shape[0]), self.x.sum(0)
        return self.v.sum(0), (self.v * self.x).sum(0)

    def candidates(self) -> list[tuple[Tensor, Tensor | None]]:
        """First guesses of scale and minimum, [n] each."""
        low, high = torch.aminmax(self.x, dim=0)
        if not self.affine:
            largest = torch.where(-low > high, low, high)
            return [(largest / (self.low * factor), None) for factor in _SYMMETRIC]
        low, high = low.clamp(max=0), high.clamp(min=0)
        factors = _SHRUNK[int(self.high)]
        return [((b * high - a * low) / self.high, -a * low) for a, b in itertools.product(factors, factors)]

    def search(self) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each sub-block, before they are stored."""
        fixed = self.constants()
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for guess in self.candidates():
            best = self._better(best, guess, fixed)
        for _ in range(_REFITS):
            assert best is not None
            best = self._better(best, (best[1], best[2] if self.affine else None), fixed)
        assert best is not None
        return best[1], best[2]

    def _better(
        self,
        best: tuple[Tensor, Tensor, Tensor] | None,
        guess: tuple[Tensor, Tensor | None],
        fixed: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The better of `best` and the fit to the levels that `guess` gives: (gain, scale, minimum)."""
        sums = self.sums(self.levels(*guess), fixed)
        scale, minimum = sums.fit(affine=self.affine)
        gain = sums.gain(scale, minimum)
        if best is None:
            return gain, scale, minimum
        better = gain > best[0]
        return (
            torch.where(better, gain, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, minimum, best[2]),
        )


def half(x: Tensor) -> Tensor:
    """`x` as fp16; BadInput where it overflows."""
    stored = x.half()
    if not bool(torch.isfinite(stored).all()):
        raise BadInput(
            f"a scale of {float(x.abs().max()):.3g} overflows the fp16 of GGUF blocks: scale the tensor down"
        )
    return stored


@dataclass(frozen=True)
class Stored:
    """What a super-block says: integers [S, G] and their fp16 unit [S, 1] (as float32)."""

    unit: Tensor
    integer: Tensor

    @property
    def value(self) -> Tensor:
        return self.unit * self.integer


def integers(value: Tensor, unit: Tensor, low: int, high: int) -> Tensor:
    """`value` [S, G] in whole multiples of `unit` [S, 1]; 0 where the unit is 0."""
    multiple = torch.where(unit == 0, torch.zeros_like(value), value / unit)
    return multiple.round_().clamp_(low, high)


def store(value: Tensor, low: int, high: int) -> Stored:
    """Scales or minima [S, G] of super-blocks as integers low ... high under one fp16 per row, by least squares."""
    # With negative integers the largest goes on the lowest, which reaches one further than the highest.
    reach = _signed(value) / (low or high)
    best: Stored | None = None
    for factor in (1.0, 0.97, 0.985, 1.015, 1.03):
        first = integers(value, reach * factor, low, high)
        fitted = _ratio((value * first).sum(1, keepdim=True), (first * first).sum(1, keepdim=True))
        unit = half(fitted).float()
        now = Stored(unit, integers(value, unit, low, high))
        best = now if best is None else _choose(_error(now, value) < _error(best, value), now, best)
    assert best is not None
    return best


def _signed(value: Tensor) -> Tensor:
    """The entry of largest magnitude of each row, with its sign."""
    low, high = torch.aminmax(value, dim=1, keepdim=True)
    return torch.where(-low > high, low, high)


def _error(stored: Stored, value: Tensor) -> Tensor:
    return (stored.value - value).square().sum(1, keepdim=True)


def _choose(first: Tensor, a: Stored, b: Stored) -> Stored:
    return Stored(torch.where(first, a.unit, b.unit), torch.where(first, a.integer, b.integer))


def descend(columns: Columns, scale: Stored, minimum: Stored, limits: tuple[int, int]) -> tuple[Stored, Stored]:
    """Scales and minima polished together; `limits`: the integers a scale may take (a minimum: 0 ... the upper)."""
    fixed, shape = columns.constants(), scale.integer.shape
    best: tuple[Tensor, Stored, Stored] | None = None
    for turn in range(_ROUNDS):
        s, m = scale.value.flatten(), minimum.value.flatten()
        sums = columns.sums(columns.levels(s, m if columns.affine else None), fixed)
        gain = sums.gain(s, m).view(shape).sum(1, keepdim=True)
        if best is None:
            best = gain, scale, minimum
        else:
            better = gain > best[0]
            best = (
                torch.where(better, gain, best[0]),
                _choose(better, scale, best[1]),
                _choose(better, minimum, best[2]),
            )
        if turn < _ROUNDS - 1:
            scale, minimum = _refit(sums, scale, minimum, limits, affine=columns.affine)
    assert best is not None
    return best[1], best[2]


def _refit(
    sums: Sums, scale: Stored, minimum: Stored, limits: tuple[int, int], *, affine: bool
) -> tuple[Stored, Stored]:
    """The fp16 units given levels and integers, then the integers given levels and units."""
    shape = scale.integer.shape
    sc, mn = scale.integer, minimum.integer

    def total(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)

    v, x, level, square, product = (t.view(shape) for t in (sums.v, sums.x, sums.level, sums.square, sums.product))
    a, b, c = total(sc * sc * square), total(sc * mn * level), total(mn * mn * v)
    p, q = total(sc * product), total(mn * x)
    determinant = a * c - b * b
    solvable = determinant > 1e-6 * a * c
    unit = torch.where(solvable, (p * c - q * b) / determinant, _ratio(p, a))
    below = torch.where(solvable, (p * b - q * a) / determinant, torch.zeros_like(unit))
    usable = solvable & (below > 0)
    unit = half(torch.where(usable, unit, _ratio(p + minimum.unit * b, a))).float()
    below = half(torch.where(usable, below, minimum.unit)).float()
    fitted, _ = sums.fit(affine=affine)
    scale = Stored(unit, integers(fitted.view(shape), unit, *limits))
    wanted = _ratio(scale.value * level - x, v)
    return scale, Stored(below, integers(wanted, below, 0, limits[1]) if affine else mn)
