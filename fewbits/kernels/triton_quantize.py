"""Tokens to 8 bits in one pass: the operation before the product, the largest magnitude, rounding.

    v = f(x)        scale[m] = max_k |v[m, k]| / top        q[m, k] = round(v[m, k] / scale[m])

f is one of

| `before` | v | |
|---|---|---|
| `none` | x | |
| `rms_norm` | x * rsqrt(mean(x^2) + eps) * weight | the norm before attention and MLP |
| `silu` | silu(x[:, :K]) * x[:, K:] | between gate and up, side by side, and down |

and is rounded to x's dtype where the model would, so that fusing changes no result. Read once and written in 8 bits,
v never exists in memory: the pass costs less than the unfused norm alone.

Rounding is to nearest, ties to even. INT8 adds 1.5 * 2**23, which leaves the integer in the low bits of the sum:
no conversion. The quotient is that of IEEE division: q = v * (1/s), then one step q + (v - q s) * (1/s) in fused
multiply-adds (Markstein 1990), three instructions.

Of wide rows, and to E4M3 with nothing before, the kernel of cuda_tokens.py does the same faster on NVIDIA GPUs.

Outlier channels of LLM.int8() are taken out on the way: `outliers` [k] int32 names them, `mask` [K] has 1 there. They
are written in 16 bits, [M, R], twice: the weights beside them are a sum of two 16-bit numbers, hence exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from fewbits.kernels import cuda_tokens

BEFORE = ("none", "rms_norm", "silu")
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23


@triton.jit
def _quotient(v, scale):
    """v / scale rounded as IEEE says, for scales that are neither huge nor tiny."""
    inverse = tl.div_rn(1.0, scale)
    q = v * inverse
    return tl.fma(tl.fma(-q, scale, v), inverse, q)


@triton.jit
def _read(x, weight, row, offset, inside, K, x_stride, eps, BEFORE: tl.constexpr):
    """v of a row, float32, rounded to x's dtype; 0 outside."""
    at = x + row.to(tl.int64) * x_stride + offset
    dtype = x.dtype.element_ty
    v = tl.load(at, inside, 0.0).to(tl.float32)
    if BEFORE == "rms_norm":
        v = (v * tl.rsqrt(tl.sum(v * v) / K + eps)).to(dtype).to(tl.float32)
        v = (v * tl.load(weight + offset, inside, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
    elif BEFORE == "silu":
        v = (v / (1.0 + tl.exp(-v))).to(dtype).to(tl.float32)
        v = (v * tl.load(at + K, inside, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
    return v


@triton.jit
def _quantize(x, weight, mask, outliers, q, scales, apart, K, x_stride, q_stride, eps, top, count,
              BEFORE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, R: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    v = _read(x, weight, row, offset, offset < K, K, x_stride, eps, BEFORE)
    if R:  # `v` of a few channels again: gathering them from registers costs more than reading them twice
        v = tl.where(tl.load(mask + offset, offset < K, 0) != 0, 0.0, v)
        j = tl.arange(0, R)
        column = tl.load(outliers + j % count)
        taken = tl.load(x + row.to(tl.int64) * x_stride + column, j < 2 * count, 0.0)
        tl.store(apart + row.to(tl.int64) * R + j, taken.to(apart.dtype.element_ty))
    reach = tl.max(tl.abs(v))
    scale = tl.where(reach > 0, tl.div_rn(reach, top), 1.0)
    tl.store(scales + row, scale)
    v = tl.clamp(_quotient(v, scale), LOW, HIGH)
    if q.dtype.element_ty == tl.int8:
        v = (v + _MAGIC).to(tl.int32, bitcast=True)
    at = q + row.to(tl.int64) * q_stride + offset
    tl.store(at, v.to(q.dtype.element_ty), offset < q_stride)


def launch(
    x: Tensor, dtype: torch.dtype, top: float, low: float, high: float, before: str = "none",
    weight: Tensor | None = None, eps: float = 0.0,
    mask: Tensor | None = None, outliers: Tensor | None = None, r: int = 0, warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`quantize_tokens`, with a choice of warps a row."""
    q, scale, apart = _outputs(x, dtype, before, r)
    rows, k = x.shape[0], x.shape[1] // (2 if before == "silu" else 1)
    if rows:
        block = max(256, triton.next_power_of_2(q.shape[1]))
        _quantize[(rows,)](
            x, weight, mask, outliers, q, scale, apart, k, x.stride(0), q.shape[1], eps, top,
            0 if outliers is None else outliers.numel(), BEFORE=before, LOW=low, HIGH=high, R=r, BLOCK=block,
            num_warps=warps or min(4, max(1, block // 512)),
        )  # fmt: skip
    return q, scale, apart


def _outputs(x: Tensor, dtype: torch.dtype, before: str, r: int) -> tuple[Tensor, Tensor, Tensor]:
    k = x.shape[1] // (2 if before == "silu" else 1)
    whole = (k + 15) // 16 * 16
    sixteen = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    return (
        x.new_empty(x.shape[0], whole, dtype=dtype),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], r, dtype=sixteen),
    )


@library.custom_op("fewbits::quantize_tokens", mutates_args=())
def quantize_tokens(
    x: Tensor, dtype: torch.dtype, top: float, low: float, high: float, before: str = "none",
    weight: Tensor | None = None, eps: float = 0.0,
    mask: Tensor | None = None, outliers: Tensor | None = None, r: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [M, K] (silu: [M, 2 K]) -> (q [M, K to the next 16], scale float32 [M], columns apart [M, r]).

    dtype: int8 or float8_e4m3fn. top: what the largest magnitude is scaled to; low, high: what is clamped to.
    x may have any row stride. outliers, mask, r: see the module; r 0 without them; only where `before` is none.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    if not r and cuda_tokens.takes(x, dtype, before, weight):
        found = _outputs(x, dtype, before, r)
        k = x.shape[1] // (2 if before == "silu" else 1)
        cuda_tokens.run(x, k, dtype, *found[:2], (top, low, high), before, weight, eps)
        return found
    return launch(x, dtype, top, low, high, before, weight, eps, mask, outliers, r)


@quantize_tokens.register_fake
def _(
    x: Tensor, dtype: torch.dtype, top: float, low: float, high: float, before: str = "none",
    weight: Tensor | None = None, eps: float = 0.0,
    mask: Tensor | None = None, outliers: Tensor | None = None, r: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    torch._check(before in BEFORE, lambda: f"{before!r} before the rounding; one of {', '.join(BEFORE)}")
    return _outputs(x, dtype, before, r)
