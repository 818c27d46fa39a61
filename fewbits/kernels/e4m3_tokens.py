"""Tokens rounded to E4M3 as `many` takes them: in the order of its weights, with sums beside them.

    scale[m] = max_k |x[m, k]| / 448        q[m, k] = E4M3(x[m, k] / scale[m])        sums[m, p] = sum of q[m, part p]

A word of a weight of 4 bits masked with 0x0f0f0f0f leaves columns 2 c, 2 c + 8, 2 c + 1, 2 c + 9 of a tile of 16 in the
four bytes that the tensor cores take for columns 4 c .. 4 c + 3 (fragment_layout.py has that of a word). A product does
not mind the order of columns that both sides have: it is the tokens that are written in it, where it costs nothing. The
sums of `Layout.part` columns, in float16 and times 2**-9, are what zero points are multiplied by.

It is done by the kernel of cuda_tokens.py, which writes another order here and adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels import cuda_tokens

_MOST_TOKENS = 256  # of a tile
_TOP = 448.0


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """levels: uint8 [M, K to the next 16], the bits of E4M3.  scale: float32 [M and more].
    sums: float16 [M, parts to the next 8]."""

    levels: Tensor
    scale: Tensor
    sums: Tensor


def round_tokens(x: Tensor, part: int) -> Rounded:
    """x [M, K] bfloat16, float16 or float32, M > 0, of any row stride.

    `scale` goes on beyond M, for a last tile that is not full.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    (m, k), device = x.shape, x.device
    levels = torch.empty(m, -(-k // 16) * 16, dtype=torch.uint8, device=device)
    scale = torch.empty(m + _MOST_TOKENS, dtype=torch.float32, device=device)
    sums = torch.empty(m, -(-k // part // 8) * 8, dtype=torch.float16, device=device)
    cuda_tokens.run(x, k, torch.float8_e4m3fn, levels, scale, (_TOP, -_TOP, _TOP), sums=sums, part=part)
    return Rounded(levels=levels, scale=scale, sums=sums)
