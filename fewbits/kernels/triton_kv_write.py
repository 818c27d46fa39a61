"""New keys and values into the tiles of a cache (kv_tiles.py): rotary embedding, rounding and packing in one launch.

    k' = k cos + rotate_half(k) sin        s = (max - min) / (2**bits - 1)        code = round((k' - min) / s)

per group of a token, as the formats of formats/kv.py round, to the bit: scale and minimum in float16 first, then codes
by what was stored. Channels d and d + D/2 turn together, and of 4 bits they share a byte, so both halves of a head are
in the registers of one thread. Products and their sum are rounded to k's dtype, as transformers does it; the compiler
may not fuse them, for a fused multiply-add skips a rounding.

Where the tokens go is read on the device (`starts`), so a captured graph goes on as the text grows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from fewbits.kernels.triton_quantize import _quotient

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it is rounded to an integer


@triton.jit
def _params(low, high, LEVELS: tl.constexpr):
    """Ranges -> scale and minimum, float16."""
    raw = tl.div_rn(high - low, LEVELS * 1.0)
    scale = tl.where(raw == 0, 1.0, tl.clamp(raw, 6.103515625e-05, 65504.0)).to(tl.float16)
    return scale, tl.clamp(-low, -65504.0, 65504.0).to(tl.float16)


@triton.jit
def _codes(x, scale, minimum, LEVELS: tl.constexpr):
    v = _quotient(x + minimum.to(tl.float32)[:, :, None], scale.to(tl.float32)[:, :, None])
    return (tl.clamp(v, 0.0, LEVELS * 1.0) + _MAGIC).to(tl.int32, bitcast=True) & 255


@triton.jit
def _words(scale, minimum):
    low = scale.to(tl.int16, bitcast=True).to(tl.int32) & 65535
    return low | (minimum.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _put(x0, x1, codes, params, place, slot, here, GROUPS: tl.constexpr, BITS: tl.constexpr, ALONG: tl.constexpr,
         D: tl.constexpr, TILE: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Rounds the halves x0, x1 [T, D/2] of T tokens at tile `place` and `slot` [T]; ALONG: tokens are innermost."""
    OWN: tl.constexpr = max(1, GROUPS // 2)
    HALF: tl.constexpr = D // 2
    LEVELS: tl.constexpr = 2**BITS - 1
    x0, x1 = tl.reshape(x0, (T, OWN, HALF // OWN)), tl.reshape(x1, (T, OWN, HALF // OWN))
    low0, low1, high0, high1 = tl.min(x0, 2), tl.min(x1, 2), tl.max(x0, 2), tl.max(x1, 2)
    if GROUPS == 1:
        low0, high0 = tl.minimum(low0, low1), tl.maximum(high0, high1)
        low1, high1 = low0, high0
    scale0, minimum0 = _params(low0, high0, LEVELS)
    scale1, minimum1 = _params(low1, high1, LEVELS)
    g = tl.arange(0, OWN)[None, :]
    at = params + (place[:, None] * GROUPS + g) * TILE + slot[:, None]
    tl.store(at, _words(scale0, minimum0), here[:, None])
    if GROUPS > 1:
        tl.store(at + OWN * TILE, _words(scale1, minimum1), here[:, None])
    c0 = tl.reshape(_codes(x0, scale0, minimum0, LEVELS), (T, HALF))
    c1 = tl.reshape(_codes(x1, scale1, minimum1, LEVELS), (T, HALF))
    d = tl.arange(0, HALF)[None, :]
    ROWS: tl.constexpr = D * BITS // 8
    step: tl.constexpr = TILE if ALONG else 1
    if ALONG:
        at = codes + (place[:, None] * ROWS + d) * TILE + slot[:, None]
    else:
        at = codes + (place[:, None] * TILE + slot[:, None]) * ROWS + d
    if BITS == 8:
        tl.store(at, (c0 - 128).to(tl.int8), here[:, None])
        tl.store(at + HALF * step, (c1 - 128).to(tl.int8), here[:, None])
    else:
        tl.store(at, (c0 | (c1 << 4)).to(tl.int8), here[:, None])


@triton.jit(do_not_specialize=["heads", "tiles", "new"])
def _write(k, v, cos, sin, starts, keys, key_params, values, value_params, heads, tiles, new,
           k_batch, k_head, k_token, v_batch, v_head, v_token,
           D: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr,
           ROTARY: tl.constexpr):  # fmt: skip
    """T new tokens of one key-value head."""
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), pair % heads
    token = tl.program_id(0) * T + tl.arange(0, T)
    here, d = token < new, tl.arange(0, D // 2)[None, :]
    inside = here[:, None]
    at = k + batch * k_batch + head * k_head + token[:, None] * k_token + d
    dtype = k.dtype.element_ty
    k0, k1 = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + D // 2, inside, 0.0).to(tl.float32)
    if ROTARY:
        turn = (batch * new + token[:, None]) * D + d
        c0 = tl.load(cos + turn, inside, 0.0).to(tl.float32)
        c1 = tl.load(cos + turn + D // 2, inside, 0.0).to(tl.float32)
        s0 = tl.load(sin + turn, inside, 0.0).to(tl.float32)
        s1 = tl.load(sin + turn + D // 2, inside, 0.0).to(tl.float32)
        first = (k0 * c0).to(dtype).to(tl.float32) - (k1 * s0).to(dtype).to(tl.float32)
        second = (k1 * c1).to(dtype).to(tl.float32) + (k0 * s1).to(dtype).to(tl.float32)
        k0, k1 = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    at = v + batch * v_batch + head * v_head + token[:, None] * v_token + d
    v0, v1 = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + D // 2, inside, 0.0).to(tl.float32)
    position = tl.load(starts + batch) + token
    place, slot = pair.to(tl.int64) * tiles + position // TILE, position % TILE
    _put(k0, k1, keys, key_params, place, slot, here, GROUPS, BITS, False, D, TILE, T)
    _put(v0, v1, values, value_params, place, slot, here, GROUPS, BITS, True, D, TILE, T)


def write(
    k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor,
    keys: Tensor, key_params: Tensor, values: Tensor, value_params: Tensor,
) -> None:  # fmt: skip
    """`write_kv`."""
    batch, heads, new, d = k.shape
    torch._check(k.stride(3) == 1 and v.stride(3) == 1 and v.shape == k.shape, lambda: "k and v, width contiguous")
    torch._check(starts.dtype == torch.int32, lambda: f"starts are {starts.dtype}; int32 is needed")
    if not new:
        return
    block = 1 if new == 1 else 16
    cos, sin = (None if turn is None else turn.contiguous() for turn in (cos, sin))
    _write[(-(-new // block), batch * heads)](
        k, v, cos, sin, starts, keys, key_params, values, value_params, heads, keys.shape[2], new,
        *k.stride()[:3], *v.stride()[:3],
        D=d, TILE=keys.shape[3], GROUPS=key_params.shape[3], BITS=8 * keys.shape[4] // d, T=block,
        ROTARY=cos is not None, num_warps=1 if block == 1 else 4, enable_fp_fusion=False,
    )  # fmt: skip


@library.custom_op("fewbits::write_kv", mutates_args=("keys", "key_params", "values", "value_params"))
def write_kv(
    k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor,
    keys: Tensor, key_params: Tensor, values: Tensor, value_params: Tensor,
) -> None:  # fmt: skip
    """Writes k, v [batch, heads, new, width] behind starts[b] tokens of each sequence, int32 [batch].

    Width is contiguous in memory, other strides are free. cos, sin [batch, new, width] in k's dtype turn k first; None:
    it is turned already. There must be room: starts[b] + new at most tiles * TILE.
    """
    write(k, v, cos, sin, starts, keys, key_params, values, value_params)


@write_kv.register_fake
def _(
    k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor,
    keys: Tensor, key_params: Tensor, values: Tensor, value_params: Tensor,
) -> None:  # fmt: skip
    return None
