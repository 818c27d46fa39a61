"""Tokens rounded to E4M3 as `many` takes them: in the order of its weights, with sums beside them.

    scale[m] = max_k |x[m, k]| / 448        q[m, k] = E4M3(x[m, k] / scale[m])        sums[m, p] = sum of q[m, part p]

A word of a weight of 4 bits masked with 0x0f0f0f0f leaves columns 2 c, 2 c + 8, 2 c + 1, 2 c + 9 of a tile of 16 in the
four bytes that the tensor cores take for columns 4 c .. 4 c + 3 (fragment_layout.py has that of a word). A product does
not mind the order of columns that both sides have: it is the tokens that are written in it, where it costs nothing. The
sums of `Layout.part` columns, in float16 and times 2**-9, are what zero points are multiplied by.

Rounded values and scales are those of triton_quantize.py, to the bit; unlike that pass this one lets the product after
it begin to read its weights (programmatic dependent launch).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.kernels import nvrtc

_MOST_THREADS = 512
_MOST_TOKENS = 256  # of a tile
_INPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """levels: uint8 [M, K to the next 16], the bits of E4M3.  scale: float32 [M and more].
    sums: float16 [M, parts to the next 8]."""

    levels: Tensor
    scale: Tensor
    sums: Tensor


@lru_cache(maxsize=64)
def source(dtype: torch.dtype, columns: int, part: int) -> str:
    """e4m3_tokens.cu for x of `dtype` with `columns`, and sums of `part` of them."""
    threads, chunks = shape(columns)
    macros = {"INPUT": _INPUTS[dtype], "THREADS": threads, "CHUNKS": chunks, "PART": part}
    return nvrtc.program(macros, "e4m3_tokens")


def shape(columns: int) -> tuple[int, int]:
    """Threads of a block, and chunks of 16 columns of a thread."""
    chunks = -(-columns // 16)
    each = -(-chunks // _MOST_THREADS)
    return -(-chunks // each // 32) * 32, each


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
    run = nvrtc.kernel(source(x.dtype, k, part), "round_tokens", device.index)
    pitch = x.stride(0) * x.element_size()
    aligned = k % 8 == 0 and pitch % 16 == 0 and x.data_ptr() % 16 == 0
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, levels, scale, sums)]
    sizes = [ctypes.c_int(size) for size in (k, levels.shape[1], sums.shape[1], aligned)]
    run.launch((m, 1), shape(k)[0], 0, (*pointers, ctypes.c_longlong(pitch), *sizes))
    return Rounded(levels=levels, scale=scale, sums=sums)
