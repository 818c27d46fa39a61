"""The element types: one line each.

| name | levels | source |
|---|---|---|
| int2 ... int8 | -2**(b-1) ... 2**(b-1)-1; with `-asym` 0 ... 2**b-1 and a zero point | |
| fp8_e4m3 | E4M3FN, bias 7, largest 448, no infinity | OFP8 1.0 |
| fp8_e5m2 | E5M2, bias 15, largest 57344 | OFP8 1.0 |
| fp4_e2m1 | 0 .5 1 1.5 2 3 4 6 and negatives | OCP MX 1.0 |
| fp6_e2m3, fp6_e3m2 | largest 7.5 and 28, no infinity, no NaN | OCP MX 1.0 |
| dynamic8 | bitsandbytes' signed dynamic map (dynamic.py) | arXiv 2110.02861 |
| nf4 | sixteen quantiles of N(0,1), scaled to [-1, 1] | QLoRA, arXiv 2305.14314, code |
"""

from __future__ import annotations

import torch

from fewbits.formats.dynamic import dynamic_levels
from fewbits.formats.grid import Grid, integer_grid, minifloat_grid, narrow_integer_grid

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

ELEMENTS: dict[str, Grid] = {
    **{f"int{bits}": integer_grid(bits, signed=True) for bits in range(2, 9)},
    "fp8_e4m3": minifloat_grid("fp8_e4m3", 4, 3, 7, 448.0, torch.float8_e4m3fn),
    "fp8_e5m2": minifloat_grid("fp8_e5m2", 5, 2, 15, 57344.0, torch.float8_e5m2),
    "fp4_e2m1": minifloat_grid("fp4_e2m1", 2, 1, 1, 6.0),
    "fp6_e2m3": minifloat_grid("fp6_e2m3", 2, 3, 1, 7.5),
    "fp6_e3m2": minifloat_grid("fp6_e3m2", 3, 2, 3, 28.0),
    "nf4": Grid("nf4", 4, NF4_LEVELS),
    "dynamic8": Grid("dynamic8", 8, dynamic_levels(signed=True)),
}

# The same codes read as 0 ... 2**b-1, for use with a zero point.
UNSIGNED: dict[str, Grid] = {f"int{bits}": integer_grid(bits, signed=False) for bits in range(2, 9)}

# The restricted range -(2**(b-1)-1) ... 2**(b-1)-1: symmetric in fact, at the price of one code.
NARROW: dict[str, Grid] = {f"int{bits}": narrow_integer_grid(bits) for bits in range(2, 9)}
