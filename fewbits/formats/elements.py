"""The element types: one line each.

| name | levels | source |
|---|---|---|
| int2 ... int8 | -2**(b-1) ... 2**(b-1)-1; with `-asym` 0 ... 2**b-1 and a zero point | |
| fp8_e4m3 | E4M3FN, bias 7, largest 448, no infinity | OFP8 1.0 |
| fp8_e5m2 | E5M2, bias 15, largest 57344 | OFP8 1.0 |
| fp4_e2m1 | 0 .5 1 1.5 2 3 4 6 and negatives | OCP MX 1.0 |
| fp6_e2m3, fp6_e3m2 | largest 7.5 and 28, no infinity, no NaN | OCP MX 1.0 |
| fp4_e1m2, fp4_e3m0, fp8_e1m6, fp8_e2m5, fp8_e3m4 | every code finite (minifloat.py) | arXiv 2208.09225 |
| fp8_e4m3_finite, fp8_e5m2_finite | every code finite; the real exponent bias is the scale | arXiv 2303.17951 |
| nf4, af4, fp4_bnb, quantile3/4/8 | tables (codebooks.py) | |
| lloyd2 ... lloyd8 | least squared error for N(0,1), one level at 0 (lloyd_max.py) | Lloyd 1982, Max 1960 |
| lloyd2_fit ... lloyd8_fit | the same, fitted to each tensor | |
| fp4_fit, fp8_fit | of all ExMy of 4 or 8 bits the best for each tensor (best_minifloat.py) | arXiv 2310.16836 |
| ternary | -1 0 1 | |
| dynamic8, dynamic8u | bitsandbytes' dynamic maps (dynamic.py); `u` for what is never negative | arXiv 2110.02861 |
"""

from __future__ import annotations

import torch

from fewbits.formats.codebooks import AF4_LEVELS, FP4_BNB_LEVELS, NF4_LEVELS, quantile_levels
from fewbits.formats.dynamic import dynamic_levels
from fewbits.formats.grid import Grid, integer_grid, narrow_integer_grid
from fewbits.formats.lloyd_max import gaussian_with_zero
from fewbits.formats.minifloat import minifloat_grid

ELEMENTS: dict[str, Grid] = {
    **{f"int{bits}": integer_grid(bits, signed=True) for bits in range(2, 9)},
    "fp8_e4m3": minifloat_grid("fp8_e4m3", 4, 3, top=448.0, cast=torch.float8_e4m3fn),
    "fp8_e5m2": minifloat_grid("fp8_e5m2", 5, 2, top=57344.0, cast=torch.float8_e5m2),
    "fp8_e1m6": minifloat_grid("fp8_e1m6", 1, 6),
    "fp8_e2m5": minifloat_grid("fp8_e2m5", 2, 5),
    "fp8_e3m4": minifloat_grid("fp8_e3m4", 3, 4),
    "fp8_e4m3_finite": minifloat_grid("fp8_e4m3_finite", 4, 3, bias=8),
    "fp8_e5m2_finite": minifloat_grid("fp8_e5m2_finite", 5, 2, bias=16),
    "fp6_e2m3": minifloat_grid("fp6_e2m3", 2, 3),
    "fp6_e3m2": minifloat_grid("fp6_e3m2", 3, 2),
    "fp4_e2m1": minifloat_grid("fp4_e2m1", 2, 1),
    "fp4_e1m2": minifloat_grid("fp4_e1m2", 1, 2),
    "fp4_e3m0": minifloat_grid("fp4_e3m0", 3, 0),
    "nf4": Grid("nf4", 4, NF4_LEVELS),
    "af4": Grid("af4", 4, AF4_LEVELS),
    "fp4_bnb": Grid("fp4_bnb", 4, FP4_BNB_LEVELS),
    **{f"quantile{bits}": Grid(f"quantile{bits}", bits, quantile_levels(bits)) for bits in (3, 4, 8)},
    **{f"lloyd{bits}": Grid(f"lloyd{bits}", bits, gaussian_with_zero(1 << bits)) for bits in range(2, 9)},
    **{f"lloyd{bits}_fit": Grid(f"lloyd{bits}_fit", bits, gaussian_with_zero(1 << bits)) for bits in range(2, 9)},
    "fp4_fit": minifloat_grid("fp4_fit", 2, 1),
    "fp8_fit": minifloat_grid("fp8_fit", 4, 3),
    "ternary": Grid("ternary", 2, (-1.0, 0.0, 1.0)),
    "dynamic8": Grid("dynamic8", 8, dynamic_levels(signed=True)),
    "dynamic8u": Grid("dynamic8u", 8, dynamic_levels(signed=False)),
}

# The same codes read as 0 ... 2**b-1, for use with a zero point.
UNSIGNED: dict[str, Grid] = {f"int{bits}": integer_grid(bits, signed=False) for bits in range(2, 9)}

# The restricted range -(2**(b-1)-1) ... 2**(b-1)-1: symmetric in fact, at the price of one code.
NARROW: dict[str, Grid] = {f"int{bits}": narrow_integer_grid(bits) for bits in range(2, 9)}
