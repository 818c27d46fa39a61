"""Attention of one new token over a long cache of keys and values in 4, 8 or 16 bits.

    out[h] = sum_n p[n] v[n]        p = softmax(scale q[h] . k[n])        value = code * s - m   per group of a token

Every query head of a key-value head reads the same keys, and everything is read once, so the time is that of reading.
What must not happen is that decoding takes longer. So nothing is decoded: codes go into the matrix instruction as the
integers they are, 8-bit times 8-bit, and the scales are applied to what comes out.

1. A query is rounded once to 16 bits of fixed point under its largest magnitude, q = sq (256 high + low), high and low
   int8. Two columns of the product instead of one, and the instruction has eight where four heads need four.

       scores[n, h] = sq sum_g (s[n, g] (256 K.high + K.low) - m[n, g] sum_{d in g} q[d])        (K [n, d]: codes)

   The groups of a head are further columns: the query with all but one group set to 0.
2. The weights of a tile of tokens, times the scales of the values, are rounded to 16 bits of fixed point under the
   largest of the tile, and multiply the codes of values in the same way. Minima are summed apart, in float32.
3. 4-bit codes are taken apart four at a time, by an AND and a shift of the word that holds them.

Keys and values are the left, tall operand (64 rows of wgmma), queries and weights the narrow right one. The tokens are
split over the multiprocessors; each piece leaves its sum, its largest score and its sum of weights, and a second
kernel joins the pieces (Flash-Decoding, Dao et al. 2023). Hopper GPUs have a kernel of their own that computes the same
in one launch (cuda_attention.py); decode_attention.py chooses.

Layout (`kv_tiles.py` converts from and to the codes of formats/kv.py): tiles of TILE tokens of a head. Keys are
[.., tile, token, d], values [.., tile, d, token], since an 8-bit operand is read along what is summed. Of 4 bits, a
byte holds channels d and d + D/2. Parameters are [.., tile, token, group] words: a scale and a minimum in float16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fewbits.kernels.triton_product import multiprocessors

_TOP = tl.constexpr(32639.0)  # 127 * 256 + 127
_LOG2_E = 1.4426950408889634
_BLOCKS_A_SM = {4: 4, 8: 2, 16: 1}  # by bits; what was fastest on an H200 (benchmarks/bench_gpu_w8a8_kv.py)


@triton.jit
def _fixed(x):
    """x in [-1, 1] as high, low int8 with 256 high + low = round(x * _TOP)."""
    whole = (x * _TOP + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    high = (whole + 128) >> 8
    return high.to(tl.int8), (whole - (high << 8)).to(tl.int8), whole


@triton.jit
def _multiply(codes, columns, sums):
    """sums + codes [M, N] times columns [N, 2 G] of fixed point, high and low taking turns: int32 [M, 2 G]."""
    return tl.dot(codes, columns, sums, out_dtype=tl.int32)


@triton.jit
def _columns(x, N: tl.constexpr, G: tl.constexpr):
    """x [N, G] in [0, 1] as columns of fixed point."""
    high, low, _ = _fixed(x)
    return tl.reshape(tl.join(high, low), (N, G * 2))


@triton.jit
def _even(x, G: tl.constexpr):
    """Every other one of x [2 G]."""
    found, _ = tl.split(tl.reshape(x, (G, 2)))
    return found


@triton.jit
def _merge(product, M: tl.constexpr, G: tl.constexpr):
    """256 high + low, float32 [M, G]."""
    high, low = tl.split(tl.reshape(product, (M, G, 2)))
    return ((high << 8) + low).to(tl.float32)


@triton.jit
def _of_group(x, group: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """x [D, ...], 0 but for the channels of `group`."""
    own = tl.arange(0, D)[:, None] // WIDTH == group
    return tl.where(own, x, 0).to(x.dtype)


@triton.jit
def _params(words, BITS: tl.constexpr):
    """Words -> scale and minimum, float32; of 8 bits the minimum of codes less 128, which is how they are kept."""
    scale = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, minimum - 128.0 * scale if BITS == 8 else minimum


@triton.jit
def _nibbles(packed, ASM: tl.constexpr):
    if ASM:
        low = tl.inline_asm_elementwise("and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [packed], tl.int8, True, 4)
        high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }", "=r,r", [packed], tl.int8, True, 4
        )
        return low, high
    return packed & 15, (packed >> 4) & 15


@triton.jit
def _log2_bound(x):
    """No less than log2(x), and no more than 0.1 above it: exponent and mantissa of x as one number."""
    return tl.maximum(x, 1e-9).to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07 - 126.9


@triton.jit
def _span(lengths, batch, split, splits, TILE: tl.constexpr):
    """Length, and first and last tile, of this piece."""
    length = tl.load(lengths + batch)
    tiles = tl.cdiv(length, TILE)
    each = tl.cdiv(tiles, splits)
    first = split * each
    return length, first, min(first + each, tiles)


@triton.jit
def _scores(codes, query, whole, params, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
            TILE: tl.constexpr, D: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """Scores [TILE, G], less the unit of the query, of COUNT groups of D channels, the first of which is FIRST."""
    n = tl.arange(0, TILE)
    score = tl.zeros((TILE, G), tl.float32)
    for g in tl.static_range(COUNT):
        product = _multiply(codes, _of_group(query, g, D // COUNT, D), tl.zeros((TILE, G * 2), tl.int32))
        s, m = _params(tl.load(params + (FIRST + g) * TILE + n), BITS)
        offset = _even(tl.sum(_of_group(whole, g, D // COUNT, D), 0), G).to(tl.float32)
        score += _merge(product, TILE, G) * s[:, None] - m[:, None] * offset[None, :]
    return score


@triton.jit
def _largest_scale(params, GROUPS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """The largest scale of each token of a tile [TILE]."""
    n = tl.arange(0, TILE)
    largest, _ = _params(tl.load(params + n), BITS)
    for g in tl.static_range(1, GROUPS):
        s, _ = _params(tl.load(params + g * TILE + n), BITS)
        largest = tl.maximum(largest, s)
    return largest


@triton.jit
def _values(codes, p, params, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
            TILE: tl.constexpr, D: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """Sums over the tokens of a tile [D, G] of weights p [TILE, G] times values, without the minima, times _TOP."""
    n = tl.arange(0, TILE)
    total = tl.zeros((D, G), tl.float32)
    for g in tl.static_range(COUNT):
        s, _ = _params(tl.load(params + (FIRST + g) * TILE + n), BITS)
        product = _multiply(codes, _columns(p * s[:, None], TILE, G), tl.zeros((D, G * 2), tl.int32))
        total += _of_group(_merge(product, D, G), g, D // COUNT, D)
    return total


@triton.jit
def _add_minima(sums, p, before, params, group: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """Minima of a group times weights, per token [TILE, G], joined to those of the tiles before."""
    _, m = _params(tl.load(params + group * TILE + tl.arange(0, TILE)), BITS)
    return sums * before[None, :] + p * m[:, None]


@triton.jit
def _less(total, minima, group: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """total [D, G] without the minima [TILE, G] of the channels of `group`."""
    own = tl.arange(0, D)[:, None] // WIDTH == group
    return total - tl.where(own, tl.sum(minima, 0)[None, :], 0.0)


@triton.jit(do_not_specialize=["heads", "tiles", "splits"])
def _decode(q, k, k_params, v, v_params, lengths, sums, stats, scale, heads, tiles, splits,
            RATIO: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
            STAGES: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """A piece of the tokens of one key-value head, for up to G of the RATIO query heads that read it."""
    G: tl.constexpr = 4
    PARTS: tl.constexpr = (RATIO + G - 1) // G
    split, part, head = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    length, first, last = _span(lengths, head // heads, split, splits, TILE)
    HALVES: tl.constexpr = 8 // BITS
    ROWS: tl.constexpr = D // HALVES  # bytes of a token
    OWN: tl.constexpr = max(1, GROUPS // HALVES)  # groups in a half
    NEXT: tl.constexpr = GROUPS - OWN  # the first group of the other half; the same one where there is but one

    # Columns 2 h and 2 h + 1 are both head h: one becomes the high part, the other the low one.
    c, d = tl.arange(0, 2 * G), tl.arange(0, ROWS)
    at = q + (head * RATIO + part * G + c // 2)[None, :] * D + d[:, None]
    real, even = (part * G + c // 2 < RATIO)[None, :], (c % 2 == 0)[None, :]
    query = tl.load(at, real, 0.0).to(tl.float32) * scale
    reach = tl.max(tl.abs(query), 0)
    if HALVES == 2:
        query_b = tl.load(at + ROWS, real, 0.0).to(tl.float32) * scale
        reach = tl.maximum(reach, tl.max(tl.abs(query_b), 0))
    reach = tl.maximum(reach, 1e-20)
    high, low, whole = _fixed(query / reach[None, :])
    q_low = tl.where(even, high, low)
    if HALVES == 2:
        high, low, whole_b = _fixed(query_b / reach[None, :])
        q_high = tl.where(even, high, low)
    unit = _even(reach, G) / _TOP

    n = tl.arange(0, TILE)
    highest = tl.full((G,), -1e30, tl.float32)
    weight = tl.zeros((TILE, G), tl.float32)  # summed over tokens after the loop, as are the minima
    minima0 = tl.zeros((TILE, G), tl.float32)
    if GROUPS > 1:
        minima1 = tl.zeros((TILE, G), tl.float32)
    if GROUPS > 2:
        minima2 = tl.zeros((TILE, G), tl.float32)
        minima3 = tl.zeros((TILE, G), tl.float32)
    total = tl.zeros((ROWS, G), tl.float32)
    if HALVES == 2:
        total_b = tl.zeros((ROWS, G), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        place = head * tiles + tile
        codes = k.load([place * TILE, 0])
        v_codes = v.load([place * ROWS, 0])
        kp = k_params + place.to(tl.int64) * (TILE * GROUPS)
        vp = v_params + place.to(tl.int64) * (TILE * GROUPS)
        if HALVES == 1:
            score = _scores(codes, q_low, whole, kp, 0, OWN, BITS, TILE, ROWS, G)
        else:
            k_low, k_high = _nibbles(codes, ASM)
            if GROUPS > 1:
                score = _scores(k_low, q_low, whole, kp, 0, OWN, BITS, TILE, ROWS, G)
                score += _scores(k_high, q_high, whole_b, kp, NEXT, OWN, BITS, TILE, ROWS, G)
            else:
                product = _multiply(k_high, q_high, _multiply(k_low, q_low, tl.zeros((TILE, G * 2), tl.int32)))
                s, m = _params(tl.load(kp + n), BITS)
                offset = _even(tl.sum(whole, 0) + tl.sum(whole_b, 0), G).to(tl.float32)
                score = _merge(product, TILE, G) * s[:, None] - m[:, None] * offset[None, :]
        score = score * unit[None, :]
        score = tl.where((tile * TILE + n < length)[:, None], score, -1e30)

        # Weights relative to the largest of the tile, so that a tile far from the highest score keeps its digits.
        largest = _largest_scale(vp, GROUPS, BITS, TILE)
        top = tl.max(score + _log2_bound(largest)[:, None], 0)
        now = tl.maximum(highest, top)
        before, fit = tl.exp2(highest - now), tl.exp2(top - now)
        highest = now
        p = tl.exp2(score - top[None, :])
        weight = weight * before[None, :] + p * fit[None, :]
        fitted = p * fit[None, :]
        minima0 = _add_minima(minima0, fitted, before, vp, 0, BITS, TILE)
        if GROUPS > 1:
            minima1 = _add_minima(minima1, fitted, before, vp, 1, BITS, TILE)
        if GROUPS > 2:
            minima2 = _add_minima(minima2, fitted, before, vp, 2, BITS, TILE)
            minima3 = _add_minima(minima3, fitted, before, vp, 3, BITS, TILE)
        fit = (fit / _TOP)[None, :]
        if HALVES == 1:
            found = _values(v_codes, p, vp, 0, OWN, BITS, TILE, ROWS, G)
        else:
            v_low, v_high = _nibbles(v_codes, ASM)
            if GROUPS == 1:
                columns = _columns(p * largest[:, None], TILE, G)
                nothing = tl.zeros((ROWS, G * 2), tl.int32)
                found = _merge(_multiply(v_low, columns, nothing), ROWS, G)
                found_b = _merge(_multiply(v_high, columns, nothing), ROWS, G)
            else:
                found = _values(v_low, p, vp, 0, OWN, BITS, TILE, ROWS, G)
                found_b = _values(v_high, p, vp, NEXT, OWN, BITS, TILE, ROWS, G)
            total_b = total_b * before[None, :] + found_b * fit
        total = total * before[None, :] + found * fit

    slot = ((head * PARTS + part) * splits + split) * G + tl.arange(0, G)
    tl.store(stats + slot * 2, highest)
    tl.store(stats + slot * 2 + 1, tl.sum(weight, 0))
    at = sums + slot[None, :] * D + d[:, None]
    WIDTH: tl.constexpr = ROWS // OWN
    total = _less(total, minima0, 0, WIDTH, ROWS)
    if HALVES == 1:
        if GROUPS > 1:
            total = _less(total, minima1, 1, WIDTH, ROWS)
        if GROUPS > 2:
            total = _less(total, minima2, 2, WIDTH, ROWS)
            total = _less(total, minima3, 3, WIDTH, ROWS)
    elif GROUPS == 1:
        total_b = _less(total_b, minima0, 0, WIDTH, ROWS)
    elif GROUPS == 2:
        total_b = _less(total_b, minima1, 0, WIDTH, ROWS)
    else:
        total = _less(total, minima1, 1, WIDTH, ROWS)
        total_b = _less(_less(total_b, minima2, 0, WIDTH, ROWS), minima3, 1, WIDTH, ROWS)
    tl.store(at, total)
    if HALVES == 2:
        tl.store(at + ROWS, total_b)


@triton.jit(do_not_specialize=["heads", "tiles", "splits"])
def _decode_sixteen(q, k, v, lengths, sums, stats, scale, heads, tiles, splits,
                    RATIO: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`_decode` for keys and values in 16 bits, both [.., token, d]."""
    G: tl.constexpr = 4
    PARTS: tl.constexpr = (RATIO + G - 1) // G
    split, part, head = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    length, first, last = _span(lengths, head // heads, split, splits, TILE)
    h, d, n = part * G + tl.arange(0, G), tl.arange(0, D), tl.arange(0, TILE)
    query = tl.load(q + (head * RATIO + h)[None, :] * D + d[:, None], (h < RATIO)[None, :], 0.0)
    highest = tl.full((G,), -1e30, tl.float32)
    weight = tl.zeros((TILE, G), tl.float32)
    total = tl.zeros((D, G), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        place = (head * tiles + tile) * TILE
        score = tl.dot(k.load([place, 0]), query) * scale
        score = tl.where((tile * TILE + n < length)[:, None], score, -1e30)
        now = tl.maximum(highest, tl.max(score, 0))
        before = tl.exp2(highest - now)
        highest = now
        p = tl.exp2(score - now[None, :])
        weight = weight * before[None, :] + p
        values = v.load([place, 0])
        total = tl.dot(values.T, p.to(values.dtype), total * before[None, :])
    slot = ((head * PARTS + part) * splits + split) * G + tl.arange(0, G)
    tl.store(stats + slot * 2, highest)
    tl.store(stats + slot * 2 + 1, tl.sum(weight, 0))
    tl.store(sums + slot[None, :] * D + d[:, None], total)


@triton.jit(do_not_specialize=["splits"])
def _join(sums, stats, out, splits, RATIO: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
          WIDTH: tl.constexpr):  # fmt: skip
    """Joins the pieces of one query head, WIDTH channels of it; BLOCK is splits up to a power of 2."""
    G: tl.constexpr = 4
    PARTS: tl.constexpr = (RATIO + G - 1) // G
    head, part = tl.program_id(0), tl.program_id(1)
    piece = (head // RATIO * PARTS + head % RATIO // G) * splits + tl.arange(0, BLOCK)
    here = tl.arange(0, BLOCK) < splits
    slot = piece * G + head % RATIO % G
    highest = tl.load(stats + slot * 2, here, -1e30)
    weight = tl.load(stats + slot * 2 + 1, here, 0.0)
    d = part * WIDTH + tl.arange(0, WIDTH)
    found = tl.load(sums + slot[:, None] * D + d[None, :], here[:, None], 0.0)
    share = tl.exp2(highest - tl.max(highest, 0))
    y = tl.sum(found * share[:, None], 0) / tl.sum(weight * share, 0)
    tl.store(out + head * D + d, y.to(out.dtype.element_ty))


def _asm(device: torch.device) -> bool:
    """Whether inline instructions are PTX: not in the interpreter, not on AMD."""
    return device.type == "cuda" and torch.version.hip is None


def splits_for(heads: int, tiles: int, bits: int, device: torch.device) -> int:
    """Pieces of each head's tokens: a few blocks for every multiprocessor, and tiles shared out evenly."""
    most = max(1, _BLOCKS_A_SM[bits] * multiprocessors(device) // heads)
    return -(-tiles // -(-tiles // most))


def _workspace(q: Tensor, heads: int, splits: int) -> tuple[Tensor, Tensor]:
    """Sums and statistics of the pieces, of 4 query heads each."""
    batch, queries, d = q.shape
    pieces = batch * heads * -(-(queries // heads) // 4) * splits
    return (
        torch.empty(pieces, 4, d, dtype=torch.float32, device=q.device),
        torch.empty(pieces, 4, 2, dtype=torch.float32, device=q.device),
    )


def _join_pieces(q: Tensor, sums: Tensor, stats: Tensor, ratio: int, splits: int) -> Tensor:
    out = torch.empty_like(q)
    batch, heads, d = q.shape
    width = min(d, 32)
    _join[(batch * heads, d // width)](
        sums, stats, out, splits, RATIO=ratio, D=d, BLOCK=max(2, triton.next_power_of_2(splits)), WIDTH=width,
        num_warps=4,
    )  # fmt: skip
    return out


def launch(
    q: Tensor, keys: Tensor, key_params: Tensor, values: Tensor, value_params: Tensor, lengths: Tensor, scale: float,
    splits: int = 0, stages: int = 3, warps: int = 4,
) -> Tensor:  # fmt: skip
    """`decode_attention` (decode_attention.py), with a choice of how the work is divided."""
    batch, heads, tiles, tile, row = keys.shape
    d, ratio = q.shape[2], q.shape[1] // heads
    bits = 8 * row // d
    splits = splits or splits_for(batch * heads, tiles, bits, q.device)
    sums, stats = _workspace(q, heads, splits)
    _decode[(splits * -(-ratio // 4), batch * heads)](
        q, TensorDescriptor.from_tensor(keys.view(-1, row), [tile, row]), key_params,
        TensorDescriptor.from_tensor(values.view(-1, tile), [row, tile]), value_params,
        lengths, sums, stats, scale * _LOG2_E, heads, tiles, splits,
        RATIO=ratio, D=d, TILE=tile, GROUPS=key_params.shape[3], BITS=bits, STAGES=stages,
        ASM=_asm(q.device), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return _join_pieces(q, sums, stats, ratio, splits)


def launch_sixteen(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float,
    splits: int = 0, stages: int = 3, warps: int = 4, tile: int = 128,
) -> Tensor:  # fmt: skip
    """The same over keys and values [batch, heads, capacity, d] in q's dtype; capacity a multiple of `tile`."""
    batch, heads, capacity, d = keys.shape
    ratio, tiles = q.shape[1] // heads, capacity // tile
    splits = splits or splits_for(batch * heads, tiles, 16, q.device)
    sums, stats = _workspace(q, heads, splits)
    _decode_sixteen[(splits * -(-ratio // 4), batch * heads)](
        q, TensorDescriptor.from_tensor(keys.view(-1, d), [tile, d]),
        TensorDescriptor.from_tensor(values.view(-1, d), [tile, d]),
        lengths, sums, stats, scale * _LOG2_E, heads, tiles, splits,
        RATIO=ratio, D=d, TILE=tile, STAGES=stages,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return _join_pieces(q, sums, stats, ratio, splits)
