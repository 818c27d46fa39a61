"""Minifloats ExMy: a sign, x exponent bits, y mantissa bits.

    value = 2**(e - bias) * (1 + m / 2**y),   and for e = 0   2**(1 - bias) * m / 2**y

More exponent bits buy range, more mantissa bits buy resolution: within a binade a step is 2**-y of it, so the
error follows the magnitude, where an integer's is the same everywhere. E1My is a symmetric integer in disguise.

Variants. OCP's E4M3 gives up one code for NaN (largest 448), its E5M2 a binade for infinities and NaN (57344);
OCP's 4- and 6-bit types and all others here use every code. The `_finite` variants of the FP8 papers (Kuzmin et
al. 2022, arXiv 2208.09225; van Baalen et al. 2023, arXiv 2303.17951) use every code of E4M3 and E5M2 and a real
exponent bias. A real bias multiplies every level by the same number, so it is the scale by another name:
`bias_of` and `maxval_of` convert.

Rounding by arithmetic: let p be the power of two at or below |x|, no less than 2**(1 - bias), and c = p * 2**(23 - y).
In float32 c + |x| has just y bits of |x| left after p, rounded half to even by the adder; its bits minus those of c
count the steps. With y = 0 every tie but that at half the smallest level goes up, as round(x / p) * p does.
Sources: OCP 8-bit Floating Point 1.0; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.formats.grid import Grid, _working


@dataclass(frozen=True)
class FloatGrid(Grid):
    """A minifloat, rounded by arithmetic, saturating; by torch's cast where it has the type."""

    mantissa_bits: int = 0
    exponent_bias: int = 0
    cast: torch.dtype | None = None

    def nearest(self, x: Tensor) -> Tensor:
        x = _working(x)
        _, power, shifted, shift = self._round(x)
        # Steps after p, and steps below p: (exponent of p, less that of the smallest) * 2**y.
        fraction, scale = _bits(shifted), _bits(power)
        bottom = ((127 if x.dtype == torch.float32 else 1023) - self.exponent_bias + 1) << self.mantissa_bits
        rank = fraction.sub_(scale).add_(scale >> shift).sub_((shift << shift + self.mantissa_bits) + bottom)
        # The sign in one byte per value: -1 or 0. torch.where takes ten times as long.
        negative = (_bits(x) >> (8 * x.element_size() - 1)).to(torch.int8)
        signed = rank.to(torch.int8).bitwise_xor_(negative).sub_(negative)
        return signed.view(torch.uint8).add_(len(self.levels) // 2)

    def snap(self, x: Tensor) -> Tensor:
        x = _working(x)
        if self.cast is not None and x.dtype == torch.float32:
            return x.clamp(self.levels[0], self.levels[-1]).to(self.cast).to(x.dtype)
        _, power, shifted, shift = self._round(x)
        return torch.copysign(shifted.sub_(power.mul_(2.0**shift)), x)

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """|x| saturated, its power p, |x| + c, and c / p as an exponent."""
        magnitude = x.abs().clamp_(max=self.levels[-1])
        exponent = 0x7F800000 if x.dtype == torch.float32 else 0x7FF0000000000000
        power = (_bits(magnitude) & exponent).view(x.dtype).clamp_(min=2.0 ** (1 - self.exponent_bias))
        shift = (23 if x.dtype == torch.float32 else 52) - self.mantissa_bits
        return magnitude, power, torch.add(magnitude, power, alpha=2.0**shift), shift


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def minifloat_grid(
    name: str,
    exponent_bits: int,
    mantissa_bits: int,
    bias: int | None = None,
    top: float = math.inf,
    cast: torch.dtype | None = None,
) -> FloatGrid:
    """ExMy without the magnitudes above `top`; `bias` is 2**(x-1) - 1 where not given, as in IEEE 754."""
    bias = (1 << (exponent_bits - 1)) - 1 if bias is None else bias
    steps = 1 << mantissa_bits
    magnitudes = [
        (m / steps + (e > 0)) * 2.0 ** (max(e, 1) - bias) for e in range(1 << exponent_bits) for m in range(steps)
    ]
    magnitudes = [value for value in magnitudes if value <= top]
    positive = magnitudes[1:]
    # Towards larger magnitude when the upper code is even; with no mantissa, always but next to zero.
    outwards = [code > 1 if mantissa_bits == 0 else code % 2 == 0 for code in range(1, len(magnitudes))]
    return FloatGrid(
        name,
        1 + exponent_bits + mantissa_bits,
        (*(-value for value in reversed(positive)), *magnitudes),
        (*(not out for out in reversed(outwards)), *outwards),
        "float",
        mantissa_bits,
        bias,
        cast,
    )


def bias_of(maxval: float, exponent_bits: int, mantissa_bits: int) -> float:
    """The real exponent bias at which the largest value of an all-finite ExMy is `maxval`."""
    return float(2**exponent_bits) - math.log2(maxval) + math.log2(2 - math.exp2(-mantissa_bits)) - 1


def maxval_of(bias: float, exponent_bits: int, mantissa_bits: int) -> float:
    """The largest value of an all-finite ExMy whose exponent bias is `bias`."""
    return math.ldexp(2 - 2.0**-mantissa_bits, 2**exponent_bits - 1) * math.exp2(-bias)
