"""The dynamic map: 8-bit codes whose resolution follows the magnitude, by decades.

A code spends unary bits on the decade and what is left on a linear fraction within it:

    10**(i - 6) * m,   i = 0 ... 6,   m = the 2**i midpoints of 2**i equal parts of [0.1, 1]

and the negatives of those, 0, and 1. So seven decades are covered, the highest with 64 levels, the lowest with
one. The signed map has 127 negative levels, 0, and 128 positive ones: 1 has no counterpart. The unsigned map
has the sign bit as one more bit of fraction. Made for quantities that span orders of magnitude: optimizer
states, and the scales of other formats (double quantization).
Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; bitsandbytes.
"""

from __future__ import annotations

import torch

_DECADES = 7


def dynamic_levels(*, signed: bool) -> tuple[float, ...]:
    """The 256 levels, ascending, as float32 holds them."""
    levels = [0.0, 1.0]
    for decade in range(_DECADES):
        parts = 2**decade * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - _DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += [*middles, *(-value for value in middles)] if signed else middles
    return tuple(sorted(levels))
