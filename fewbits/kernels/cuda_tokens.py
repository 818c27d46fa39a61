"""Tokens to 8 bits on an NVIDIA GPU, in CUDA C++ (cuda/tokens.cu): what triton_quantize.py tells, in less time.

    tokens     a block has one, read once, 16 bytes at a time, and held in 16 bits if x is: many loads on their way
    INT8       compute capability 8.0 up
    E4M3       8.9 up, which converts to it

Triton fills a row up to a power of two: 14336 columns to 16384, with what comes before them computed there, too. Here
a row of any width is cut into pieces of 8 columns. On an H200 that saves an eighth to a third of the time of wide rows,
and nothing of narrow ones (LOG.md, 2026-12-01), which are left to Triton. Rounded values and scales are equal to the
bit where nothing comes before; the sum of squares of the norm is added in another order.

The kernel after it may start early (programmatic dependent launch), for instance to read its weights.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.kernels import nvrtc

_THREADS = 256
_MOST_WORDS = 64  # of registers that a thread holds a token in
_WIDE = 8192  # columns: below, Triton's pass is as fast or faster, but for E4M3 with nothing before
_INPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_BEFORE = {"none": 0, "rms_norm": 1, "silu": 2}
_OUT = {torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}  # the compute capability it takes


def shape(columns: int, part: int = 0) -> tuple[int, int]:
    """Threads of a block, and chunks of a thread: of 16 columns with sums of parts, else of 8."""
    chunks, most = (-(-columns // 16), 512) if part else (-(-columns // 8), _THREADS)
    each = -(-chunks // most)
    return -(-chunks // each // 32) * 32, each


@lru_cache(maxsize=64)
def source(input: torch.dtype, columns: int, output: torch.dtype, before: str = "none", part: int = 0) -> str:
    """tokens.cu for tokens of `columns`; part: see e4m3_tokens.py."""
    threads, chunks = shape(columns, part)
    macros = {
        "INPUT": _INPUTS[input], "THREADS": threads, "CHUNKS": chunks, "BEFORE": _BEFORE[before],
        "INTEGERS": int(output == torch.int8), "PART": part,
    }  # fmt: skip
    return nvrtc.program(macros, "tokens")


def takes(x: Tensor, dtype: torch.dtype, before: str, weight: Tensor | None) -> bool:
    """Whether `run` does, and faster: x on an NVIDIA GPU that has what it takes, a row in registers, a weight
    like x."""
    if not x.is_cuda or torch.version.hip is not None or x.dtype not in _INPUTS or dtype not in _OUT:
        return False
    if weight is not None and (weight.dtype != x.dtype or not weight.is_contiguous()):
        return False
    k = x.shape[1] // (2 if before == "silu" else 1)
    if not k or (k <= _WIDE and (dtype == torch.int8 or before != "none")):
        return False
    held = shape(k)[1] * (8 if x.dtype == torch.float32 else 4)
    capable = torch.cuda.get_device_capability(x.device) >= _OUT[dtype]
    return capable and held <= _MOST_WORDS and nvrtc.available() is None


def run(
    x: Tensor, k: int, output: torch.dtype, q: Tensor, scale: Tensor, limits: tuple[float, float, float],
    before: str = "none", weight: Tensor | None = None, eps: float = 0.0, sums: Tensor | None = None, part: int = 0,
) -> None:  # fmt: skip
    """x [M, K] (silu: [M, 2 K]), a row contiguous -> q [M, K to the next 16], the bytes of `output`, and scale float32
    [M]. limits: what the largest magnitude is scaled to, what is clamped to. sums, part: see e4m3_tokens.py."""
    if not x.shape[0]:
        return
    pitch = x.stride(0) * x.element_size()
    given = [tensor for tensor in (x, weight) if tensor is not None]
    aligned = k % 8 == 0 and pitch % 16 == 0 and not any(tensor.data_ptr() % 16 for tensor in given)
    pointers = [ctypes.c_void_p(0 if tensor is None else tensor.data_ptr()) for tensor in (x, weight, q, scale, sums)]
    sizes = [ctypes.c_int(size) for size in (k, q.shape[1], 0 if sums is None else sums.shape[1], aligned)]
    numbers = [ctypes.c_float(number) for number in (eps, *limits)]
    kernel = nvrtc.kernel(source(x.dtype, k, output, before, part), "round_tokens", x.device.index)
    threads, _ = shape(k, part)
    kernel.launch((x.shape[0], 1), threads, 0, (*pointers, ctypes.c_longlong(pitch), *sizes, *numbers))
