"""W8A8: both sides in 8 bits, their scales and a few columns in 16 bits in one launch.

    y[m, n] = (sum_k x[m, k] w[n, k]) * scale_x[m] * scale_w[n] + sum_j apart_x[m, j] apart_w[n, j]

x [M, K] and w [N, K] are INT8 (int32 sums, exact below 2**31) or E4M3 (float32 sums), both with K innermost, as the
tensor cores of Hopper (wgmma) read 8-bit operands. Blocks of x and w come by the tensor memory accelerator, which
fills with zeros what lies outside; a block of the grid stays on its multiprocessor and takes tile after tile, so that
the loads of the next tile run under the scaling and storing of the last one. Tiles are taken in an order in which
those that run together share rows and columns in the L2.

`apart` holds the outlier channels of LLM.int8() (formats/outliers.py): the product of a few 16-bit columns, added to
the scaled sums while they are in registers. A multiple of 16 columns, since that is what a matrix instruction takes.

GPUs before Hopper run the same code with ordinary loads, written for by the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows of x and of w that a block multiplies, columns that it takes at once, and how the compiler schedules it.

    parts: in how many pieces a tile is stored: less shared memory for more instructions. per_sm: blocks of the grid
    on a multiprocessor. flat: whether tiles and columns are one loop to the compiler.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    per_sm: int = 1
    flat: bool = True
    group: int = 8


@triton.jit
def _place(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of the grid of tiles; GROUP rows of tiles are walked column by column."""
    whole = GROUP * columns
    first = tile // whole * GROUP
    height = min(rows - first, GROUP)
    return first + tile % whole % height, tile % whole // height


@triton.jit
def _finish(sums, x_scale, w_scale, apart_x, apart_w, m, n, M, N, y, y_tiles, DTYPE: tl.constexpr,
            APART: tl.constexpr, DESCRIBED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Scales a tile of sums that begins at row m and column n, adds the columns apart, stores it."""
    row, column = m + tl.arange(0, BM), n + tl.arange(0, BN)
    in_rows, in_columns = row < M, column < N
    scaled = sums.to(tl.float32) * tl.load(x_scale + row, in_rows, 0.0)[:, None]
    scaled = scaled * tl.load(w_scale + column, in_columns, 0.0)[None, :]
    if APART:
        j = tl.arange(0, APART)
        left = tl.load(apart_x + row[:, None] * APART + j[None, :], in_rows[:, None], 0.0)
        right = tl.load(apart_w + column[None, :] * APART + j[:, None], in_columns[None, :], 0.0)
        scaled = tl.dot(left, right, scaled)
    if DESCRIBED:
        y_tiles.store([m, n], scaled.to(DTYPE))
    else:
        at = y + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(at, scaled.to(DTYPE), in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["M", "N", "K", "BLOCKS"])
def _product(x, w, x_scale, w_scale, apart_x, apart_w, y, y_tiles, M, N, K, BLOCKS,
             SUM: tl.constexpr, DTYPE: tl.constexpr, APART: tl.constexpr, DESCRIBED: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
             GROUP: tl.constexpr, FLAT: tl.constexpr):  # fmt: skip
    rows, columns, steps = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, BK)
    count = rows * columns
    behind = tl.program_id(0) - BLOCKS  # the tile being stored, counted apart so that loads can run ahead of it
    for tile in tl.range(tl.program_id(0), count, BLOCKS, flatten=FLAT):
        row, column = _place(tile, rows, columns, GROUP)
        sums = tl.zeros((BM, BN), SUM)
        for step in range(steps):
            left = x.load([row * BM, step * BK])
            right = w.load([column * BN, step * BK])
            sums = tl.dot(left, right.T, sums, out_dtype=SUM)
        behind += BLOCKS
        row, column = _place(behind, rows, columns, GROUP)
        m, n = row * BM, column * BN
        if PARTS == 2:
            low, high = tl.split(tl.permute(tl.reshape(sums, (BM, 2, BN // 2)), (0, 2, 1)))
            _finish(low, x_scale, w_scale, apart_x, apart_w, m, n, M, N, y, y_tiles,
                    DTYPE, APART, DESCRIBED, BM, BN // 2)  # fmt: skip
            _finish(high, x_scale, w_scale, apart_x, apart_w, m, n + BN // 2, M, N, y, y_tiles,
                    DTYPE, APART, DESCRIBED, BM, BN // 2)  # fmt: skip
        else:
            _finish(sums, x_scale, w_scale, apart_x, apart_w, m, n, M, N, y, y_tiles, DTYPE, APART, DESCRIBED, BM, BN)


_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def tiles_for(m: int, n: int, k: int) -> Tiles:
    """What was fastest on an H200 (benchmarks/bench_gpu_w8a8_kv.py)."""
    if m <= 64:
        return Tiles(m=64, n=32 if n <= 8192 else 64, k=256, warps=4, stages=5, flat=False)
    if m <= 128:
        return Tiles(m=64, n=128, k=128, warps=4, stages=4, flat=False)
    if m <= 512:
        return Tiles(m=128, n=128, k=128, warps=8, stages=4, flat=False)
    return Tiles(m=256, n=128, k=128, warps=8, stages=3, parts=2)


def launch(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype,
    apart_x: Tensor | None = None, apart_w: Tensor | None = None, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] in `dtype`; see the module. `tiles`: other than those of `tiles_for`."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if not m:
        return y
    t = tiles or tiles_for(m, n, k)
    blocks = min(-(-m // t.m) * -(-n // t.n), multiprocessors(x.device) * t.per_sm)
    described = n * dtype.itemsize % 16 == 0
    apart = 0 if apart_x is None else apart_x.shape[1]
    _product[(blocks,)](
        TensorDescriptor.from_tensor(x, [t.m, t.k]),
        TensorDescriptor.from_tensor(w, [t.n, t.k]),
        x_scale, w_scale, apart_x, apart_w, y,
        TensorDescriptor.from_tensor(y, [t.m, t.n // t.parts]) if described else None,
        m, n, k, blocks,
        SUM=tl.int32 if x.dtype == torch.int8 else tl.float32, DTYPE=_TYPES[dtype], APART=apart, DESCRIBED=described,
        BM=t.m, BN=t.n, BK=t.k, PARTS=t.parts, GROUP=t.group, FLAT=t.flat,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return y


@library.custom_op("fewbits::scaled_product", mutates_args=())
def scaled_product(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype,
    apart_x: Tensor | None = None, apart_w: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] in `dtype` (float16, bfloat16, float32).

    x [M, K], w [N, K]: both int8 or both float8_e4m3fn, contiguous, K a multiple of 16 (fill with zeros).
    x_scale [M], w_scale [N]: float32. apart_x [M, R], apart_w [N, R]: both float16 or both bfloat16, R 16 or 32 or 64.
    """
    _check(x, w, x_scale, w_scale, apart_x, apart_w)
    return launch(x, w, x_scale, w_scale, dtype, apart_x, apart_w)


@scaled_product.register_fake
def _(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype,
    apart_x: Tensor | None = None, apart_w: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(x, w, x_scale, w_scale, apart_x, apart_w)
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


def _check(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, apart_x: Tensor | None, apart_w: Tensor | None
) -> None:
    torch._check(x.dim() == 2 and w.dim() == 2 and x.shape[1] == w.shape[1], lambda: "x [M, K] and w [N, K]")
    torch._check(x.dtype == w.dtype and x.dtype in (torch.int8, torch.float8_e4m3fn), lambda: f"{x.dtype}, {w.dtype}")
    torch._check(x.shape[1] % 16 == 0 and x.is_contiguous() and w.is_contiguous(), lambda: "K in whole 16s, contiguous")
    torch._check(x_scale.numel() == x.shape[0] and w_scale.numel() == w.shape[0], lambda: "a scale a row")
    torch._check(x_scale.is_contiguous() and w_scale.is_contiguous(), lambda: "contiguous scales")
    torch._check((apart_x is None) == (apart_w is None), lambda: "both sides of the columns apart")
    if apart_x is not None and apart_w is not None:
        r = apart_x.shape[1]
        torch._check(apart_w.shape[1] == r and r in (16, 32, 64), lambda: f"{r} columns apart; 16, 32 or 64")
        torch._check(apart_x.is_contiguous() and apart_w.is_contiguous(), lambda: "contiguous columns apart")
        torch._check(apart_x.dtype == apart_w.dtype and apart_x.dtype.itemsize == 2, lambda: "16 bits apart")
