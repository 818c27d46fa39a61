"""Decode attention over a quantized cache on Hopper GPUs and later, in CUDA C++ (cuda/kv_attention.cu).

What is computed is told in triton_attention.py, which serves all other GPUs; how a block works, in the source. This is
about time. 32768 tokens of 8 heads in 4 bits are 36 MB, which an H200 reads in 8 us: a kernel that takes twice as long
spends half of it on starting, filling its pipeline, and joining what its blocks found.

- One launch. The blocks that share a head leave their sums in memory, and the last to be done (a counter says which)
  joins them, in the order of the tokens whoever was first: results are equal from run to run.
- One block a multiprocessor, with all its shared memory as a ring of tiles: the first copies start as soon as the
  lengths are known, and everything in flight is in flight at once. Queries are rounded meanwhile.
- Tiles of all heads of all sequences stand in one line, of which every block takes an equal run (as Stream-K shares out
  products, arXiv 2301.03598, and LeanAttention attention, arXiv 2405.10480): sequences of different lengths keep all
  multiprocessors busy, known to the device alone as these lengths are. A block that begins in one head and ends in
  another joins twice, so where heads divide the multiprocessors nearly evenly, a few stay idle instead (`blocks_for`).
- Scores, weights and weighted values of 32 tokens stay in the registers of one warp. Nothing is handed from warp to
  warp before a head is done, and groups of any size cost scales, not products.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.kernels import nvrtc
from fewbits.kernels.kv_tiles import TILE

WIDTHS = (64, 128, 256)
_SHARED = 227 << 10  # bytes a thread block can have
_LEAST_GROUP = 32  # channels that one matrix instruction sums
_LEAST_BUSY = 0.9  # of the multiprocessors, for blocks to keep to one head
_QUERIES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the kernel is compiled for.

    bits, width, groups: of the cache.  ratio: query heads that read one key-value head.  dtype: of q.  teams: of four
    warps, each at a tile of its own; 0: as many as have registers enough.
    """

    bits: int
    width: int
    groups: int
    ratio: int
    dtype: torch.dtype
    teams: int = 0

    @property
    def heads(self) -> int:
        """Query heads that a block takes: the columns of one matrix instruction are 4 of them, high and low part."""
        return 8 if self.ratio > 4 and self.width <= 128 else 4

    @property
    def parts(self) -> int:
        return -(-self.ratio // self.heads)

    @property
    def crew(self) -> int:
        """Teams of a block."""
        return self.teams or (2 if self.width > 128 or self.heads * self.groups > 16 else 4)

    @property
    def threads(self) -> int:
        return 32 * (4 * self.crew + 2)

    @property
    def _stage(self) -> int:
        barriers = 3 * 8
        return 2 * TILE * (self.width * self.bits // 8 + 4 * self.groups) + barriers

    @property
    def _beside(self) -> int:
        """Bytes of shared memory beside the ring: struct Shared of the source, and what alignment takes."""
        warps, heads = 4 * self.crew, self.heads
        floats = warps * heads * (self.width + 8) + 2 * heads * warps + heads * (1 + self.groups)
        return 4 * floats + 2 * heads * (self.width + 16) + 64

    @property
    def stages(self) -> int:
        """Tiles of the ring. A multiple of the teams: a team must see every turn of a place, for it tells one turn from
        the next by a single bit."""
        return (_SHARED - self._beside) // self._stage // self.crew * self.crew

    @property
    def shared(self) -> int:
        return self.stages * self._stage + self._beside

    @property
    def macros(self) -> dict[str, int]:
        return {
            "BITS": self.bits, "D": self.width, "GROUPS": self.groups, "HEADS": self.heads, "RATIO": self.ratio,
            "QUERY": _QUERIES[self.dtype], "TEAMS": self.crew, "STAGES": self.stages,
        }  # fmt: skip


@lru_cache(maxsize=256)
def source(config: Config) -> str:
    """kv_attention.cu for one configuration."""
    return nvrtc.program(config.macros, "kv_attention")


class _Cache(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p), ("key_params", ctypes.c_void_p), ("values", ctypes.c_void_p),
        ("value_params", ctypes.c_void_p), ("lengths", ctypes.c_void_p),
        ("batches", ctypes.c_int), ("heads", ctypes.c_int), ("tiles", ctypes.c_int),
    ]  # fmt: skip


class _Pieces(ctypes.Structure):
    _fields_ = [("sums", ctypes.c_void_p), ("stats", ctypes.c_void_p), ("counters", ctypes.c_void_p)]


def refusal(q: Tensor, keys: Tensor, key_params: Tensor, values: Tensor, value_params: Tensor) -> str | None:
    """Why the kernel does not take these, or None: q as `decode_attention` takes it, the rest as KVTiles has it."""
    if q.device.type != "cuda" or torch.version.hip is not None:
        return "it runs on NVIDIA GPUs"
    gpu = torch.cuda.get_device_properties(q.device)
    if gpu.major < 9 or gpu.shared_memory_per_block_optin < _SHARED:
        return f"it needs compute capability 9.0, and {_SHARED} bytes of shared memory"
    if q.shape[2] not in WIDTHS or q.dtype not in _QUERIES:
        return f"it is compiled for heads of {WIDTHS}, queries of 16 or 32 bits"
    if q.shape[2] // key_params.shape[3] < _LEAST_GROUP:
        return f"groups of less than {_LEAST_GROUP} channels"
    if any(not t.is_contiguous() or t.data_ptr() % 16 for t in (keys, key_params, values, value_params)):
        return "bulk copies take runs of memory that begin at a multiple of 16 bytes"
    return nvrtc.available()


def blocks_for(units: int, tiles: int, multiprocessors: int) -> int:
    """Blocks that share `units` heads of up to `tiles` tiles."""
    whole = multiprocessors // units * units
    blocks = whole if whole >= _LEAST_BUSY * multiprocessors else multiprocessors
    return min(blocks, units * tiles, nvrtc.COUNTERS)


def launch(
    q: Tensor, keys: Tensor, key_params: Tensor, values: Tensor, value_params: Tensor, lengths: Tensor, scale: float,
    blocks: int = 0, teams: int = 0,
) -> Tensor:  # fmt: skip
    """`decode_attention`, with a choice of how the work is divided; 0: what was fastest."""
    batch, heads, tiles, _, row = keys.shape
    d, ratio, groups = q.shape[2], q.shape[1] // heads, key_params.shape[3]
    config = Config(bits=8 * row // d, width=d, groups=groups, ratio=ratio, dtype=q.dtype, teams=teams)
    run = nvrtc.kernel(source(config), "decode", q.device.index)
    blocks = blocks or blocks_for(batch * heads * config.parts, tiles, run.multiprocessors)
    out = torch.empty_like(q)
    pieces = 2 * blocks * config.heads  # a block ends one head and begins another
    sums = torch.empty(pieces * (d + 2), dtype=torch.float32, device=q.device)
    held = (t.data_ptr() for t in (keys, key_params, values, value_params, lengths))
    arguments = (
        _Cache(*held, batch, heads, tiles), ctypes.c_void_p(q.data_ptr()), ctypes.c_void_p(out.data_ptr()),
        _Pieces(sums.data_ptr(), sums.data_ptr() + 4 * pieces * d, nvrtc.counters(q.device.index)),
        ctypes.c_float(scale * math.log2(math.e)),
    )  # fmt: skip
    run.launch((blocks, 1), config.threads, config.shared, arguments)
    return out
