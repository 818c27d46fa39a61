"""Tables of levels that no arithmetic gives: made for weights scaled into [-1, 1] by their block's absmax.

| table | idea | source |
|---|---|---|
| NF4 | quantiles of N(0,1), 8 positive, 7 negative, an exact zero | QLoRA, arXiv 2305.14314, code |
| AF4 | least absolute error over blocks of 64 normal weights | Yoshida 2023, arXiv 2306.06965 |
| FP4 of bitsandbytes | 3-bit magnitudes with a tiny first step; not OCP's E2M1 | bitsandbytes |
| quantile codes | levels that are used equally often by N(0,1) | arXiv 2212.09720; QLoRA, equation 4 |

All hold zero exactly, so that a pruned weight or an empty block stays what it is.
"""

from __future__ import annotations

import itertools
from statistics import NormalDist

# The published table. QLoRA's printed equation does not give these values; its code does: quantiles of
# N(0,1) at 8 positive and 7 negative evenly spaced probabilities up to 0.9677083, and an exact zero.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

AF4_LEVELS = (
    *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
    *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
)

# As bitsandbytes keeps them: twelfths of an unnormalised table that ends at 12 (and begins at 1/16).
_FP4_MAGNITUDES = (0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
FP4_BNB_LEVELS = (*(-value for value in reversed(_FP4_MAGNITUDES)), 0.0, *_FP4_MAGNITUDES)


def quantile_levels(bits: int) -> tuple[float, ...]:
    """(Q(i/n) + Q((i+1)/n)) / 2 for n = 2**bits + 1 and i = 1 ... n-2, over the largest: 2**bits - 1 levels.

    The cells of a distribution's quantiles have equal probability; the outermost two of the n are unbounded
    and have no midpoint.
    """
    parts = (1 << bits) + 1
    # Upper half only, mirrored: the middle is then 0 exactly.
    edges = [NormalDist().inv_cdf(i / parts) for i in range(parts // 2 + 1, parts)]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    positive = [value / middles[-1] for value in middles]
    return (*(-value for value in reversed(positive)), 0.0, *positive)
