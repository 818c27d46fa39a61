"""Weights in the order of the tensor cores' registers: the layout, and the three kernels that read it.

A product with few tokens reads every weight once and multiplies it a few times, so its time is that of reading. What
keeps a kernel from it is work per weight: finding its place, turning an integer into a float, a way through shared
memory. Here none is left. The weight is stored in the order in which the threads of a warp hold the left operand of
`mma.m16n8k16` (CUDA PTX ISA, "Matrix fragments for mma.m16n8k16"), so that a thread reads 16 bytes, all its own;
and codes are packed so that one mask leaves two of them in the last bits of two 16-bit floats whose value is then
128 + code (bfloat16) or 1024 + code (float16); a subtraction makes that code - zero, exactly. `few` saves even that: it
multiplies 128 + code and takes (128 + zero) times the sum of the group's tokens off the sum. (The order is that of
Marlin, arXiv 2408.11743, the trick of FasterTransformer.)

    tile      16 rows x 16 columns; lane l = 4 g + c holds registers r = 0..3 of two values each:
              row g + 8 (r % 2), columns 2 c + 8 (r // 2) + {0, 1}
    word      4 bits: one tile. Value i of register r at bit 4 r + 16 i.
              2 bits: two tiles. Value i of register r of 8 at bit 2 r + 16 i.
              3 bits: three words for four tiles. Of their 16 registers five to a word, at bit 3 r + 16 i; the bits left
                      over (15 and 31 of each word) are the last register's.
              8 bits: half a tile. Registers r, r + 1: four bytes.
    tables    codes of a grid that is not consecutive integers lie in pairs (value 0, value 1) and index a table of
              pairs of levels in shared memory, one copy per lane, so that lanes never meet in a bank.

Scales of groups are stored as float16 after division by a power of two per row (`alpha`, float32), which is multiplied
into the result: bfloat16 and float16 scales keep all their digits, and float32 ones 11 bits. A single scale a row is
`alpha` itself, in float32.

Sums within a group and over groups are float32 in `few`, and in `many` where `apart` is chosen; else it multiplies a
weight by its scale in 16 bits beforehand. Levels of tables are rounded to 16 bits in both.

Tokens that are rounded to E4M3 meet 4-bit integers in the FP8 tensor cores, which are twice as fast: 0000xxxx is the
E4M3 number x * 2**-9, for all x, so the same words take three instructions for eight weights. Sums of at most 128
columns are float32 from there on, for those tensor cores add with some 14 bits. Zero points are taken off at the end,
by a product of 16 bits with the sums of the tokens (e4m3_tokens.py).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.kernels import nvrtc
from fewbits.kernels.e4m3_tokens import Rounded

ROWS = 64  # rows are padded to the most that a warp takes
_BLOCK_COLUMNS = 128  # whole blocks of words for every width; two turns of `many`
_LEAST_UNITS = 4  # of a block of `many`: with fewer, adding up takes longer than it saves
SHARED_LIMIT = 227 << 10  # bytes a thread block can have on Hopper


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What of a format the kernels are compiled for.

    bits: of a code.  table: whether codes index a table.  group: columns that share a scale, 0 where a row has one.
    zero: whether groups have zero points; else `offset` is the code of level 0.  half: float16 in and out, else
    bfloat16.  e4m3: tokens are rounded to E4M3 (e4m3_tokens.py), for codes of 4 bits and groups of a multiple of 32.
    """

    bits: int
    table: bool
    group: int
    zero: bool
    offset: int
    half: bool
    e4m3: bool = False

    @property
    def unit(self) -> int:
        """Columns that hold whole blocks of words and whole groups: what a row is padded to."""
        return math.lcm(_BLOCK_COLUMNS, self.group or 1)

    @property
    def grain(self) -> int:
        """Columns whose tokens are added up for what `few` takes off its sums; 0: nothing is."""
        return 0 if self.table or self.bits == 8 else math.gcd(_BLOCK_COLUMNS, self.group)

    @property
    def part(self) -> int:
        """Columns whose sums are kept apart with E4M3 tokens: the most up to 128 that make up a group."""
        return next(columns for columns in (128, 96, 64, 32) if (self.group or self.unit) % columns == 0)

    @property
    def macros(self) -> dict[str, int]:
        part = {"PART": self.part} if self.e4m3 else {}
        return part | {
            "BITS": self.bits, "TABLE": int(self.table), "GROUP": self.group, "UNIT": self.unit, "ZERO": int(self.zero),
            "OFFSET": self.offset, "HALF": int(self.half), "E4M3": int(self.e4m3),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Few:
    """`few`: rt tiles of 16 rows a strip, warps of a block, mt tiles of 8 tokens, split blocks of a cluster along the
    columns, ring units of weights on their way to each warp (staged in shared memory, else in registers), per_sm blocks
    a multiprocessor, registers for `resident`.

    With more resident than per_sm the blocks of the next product stand ready, with their first weights, while this one
    runs.
    """

    rt: int = 1
    warps: int = 16
    mt: int = 1
    split: int = 1
    ring: int = 2
    per_sm: int = 1
    resident: int = 1
    staged: bool = False

    name = "few"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def tokens(self) -> int:
        return 8 * self.mt

    def places(self, n: int, sms: int) -> int:
        """Clusters that share out the strips."""
        return min(-(-n // (16 * self.rt)), max(1, sms * self.per_sm // self.split))

    def shared(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        rows, units = 16 * self.rt, -(-k // layout.unit)
        strips = -(-n // rows)
        most = -(-strips // self.places(n, sms))
        parts = most + self.warps
        width = -(-units // self.split) * layout.unit
        tokens = (m if self.mt == 1 else self.tokens) * (2 * width + 16)
        sums = 4 * width // layout.grain * self.tokens if layout.grain else 0
        groups = layout.unit // layout.group if layout.group else 0
        slot = self.rt * (2 * layout.unit * layout.bits + groups * (48 if layout.zero else 32))
        ring = self.warps * self.ring * slot if self.staged else 0
        return (
            _table_bytes(layout)
            + ring
            + 4 * most * rows
            + 4 * (-(-most // 4) * 4)
            + 4 * parts * self.tokens * (rows + 4)
            + sums
            + tokens
        )

    def grid(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        return self.places(n, sms) * self.split

    @property
    def macros(self) -> dict[str, int]:
        return {
            "RT": self.rt, "WARPS": self.warps, "MT": self.mt, "SPLIT": self.split, "RING": self.ring,
            "RESIDENT": self.resident, "STAGED": int(self.staged), "FEW": 1,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Many:
    """`many`: wg warpgroups of 64 rows, nt tokens, stages of a unit on their way, per_sm blocks a multiprocessor.

    share: tiles that are left over are not shared (0), each by the same number of blocks (1), all by all (2).
    split: or the columns of every tile are, by so many blocks of a cluster, if all tiles can be worked on at once.
    apart: the sums of a group are kept apart.
    """

    wg: int = 2
    nt: int = 64
    stages: int = 4
    per_sm: int = 1
    share: int = 2
    apart: bool = False
    split: int = 1

    name = "many"

    @property
    def rows(self) -> int:
        return 64 * self.wg

    @property
    def threads(self) -> int:
        return 128 * self.wg + 128

    @property
    def registers(self) -> int:
        """Of a thread that multiplies, where those of the warps that only wait are handed over; else 0."""
        each = 65536 // self.per_sm // (128 * (self.wg + 1))
        if self.nt * self.wg < 256 and not (self.apart and self.nt + 68 > each):
            return 0
        each = each // 8 * 8
        return min(240, (each * (self.wg + 1) - 40) // self.wg // 8 * 8)

    @property
    def tokens(self) -> int:
        return self.nt

    def shared(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        groups = layout.unit // layout.group if layout.group else 0
        weights = self.rows * layout.unit * layout.bits // 8 + self.rows * groups * (
            3 if layout.zero and not layout.e4m3 else 2
        )
        stage = self.nt * (1 if layout.e4m3 else 2) * layout.unit + weights
        turned = 32 * self.rows * (1 if self.nt // 16 % 2 else 2)
        exchanged = 4 * self.rows * self.nt if self.split > 1 else 0
        return 1024 + _table_bytes(layout) + max(self.stages * stage, exchanged) + turned

    def grid(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        tiles = self.tiles(n, m)
        if self.split > 1:
            return tiles * self.split
        runs = -(-tiles * -(-k // layout.unit) // _LEAST_UNITS) if self.share else tiles
        return min(self.per_sm * sms, runs, nvrtc.COUNTERS)

    def tiles(self, n: int, m: int) -> int:
        return -(-n // self.rows) * -(-m // self.nt)

    def workspace(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        """Sums that blocks leave for one another: two tiles each, where tiles are shared."""
        blocks = self.grid(layout, n, k, m, sms)
        shared = self.split == 1 and self.share and self.tiles(n, m) % blocks
        return 2 * blocks * self.rows * self.nt if shared else 0

    @property
    def macros(self) -> dict[str, int]:
        return {
            "WG": self.wg, "NT": self.nt, "STAGES": self.stages, "RT": 1, "REGISTERS": self.registers,
            "RESIDENT": self.per_sm, "SHARE": self.share, "LEAST_UNITS": _LEAST_UNITS, "APART": int(self.apart),
            "SPLIT": self.split, "MANY": 1,
        }  # fmt: skip


Config = Few | Many


def _table_bytes(layout: Layout) -> int:
    return 128 << (2 * layout.bits) if layout.table else 0


# ---------------------------------------------------------------- layout


def pack(codes: Tensor, layout: Layout) -> Tensor:
    """codes uint8 [N, K] -> words int32 [N / 16, units, words], N padded to `ROWS` and K to whole units."""
    rows, columns = codes.shape
    codes = functional.pad(codes, (0, -columns % layout.unit, 0, -rows % ROWS))
    # row = 16 tile + 8 low + g;  column = 64 block + 16 step + 8 high + 2 c + i
    split = codes.reshape(-1, 2, 8, codes.shape[1] // 64, 4, 2, 4, 2)
    tile, low, g, block, step, high, c, i = range(8)
    by_lane = split.permute(tile, block, g, c, step, high, low, i)
    values = by_lane.reshape(split.shape[0], split.shape[3], 32, 16, 2).int()  # registers of 4 steps, 2 values each
    tiles, blocks = values.shape[:2]
    bits, per_word = layout.bits, 16 // layout.bits
    if bits == 8:
        words = _joined(values.reshape(tiles, blocks, 32, 8, 4), [0, 8, 16, 24])
        words = words.reshape(tiles, blocks, 32, 2, 4).transpose(2, 3)
    elif bits == 3:
        words = _pack_three(values, layout.table).transpose(2, 3)
    else:
        if layout.table:
            pairs = values[..., 0] | values[..., 1] << bits
            words = _joined(pairs.reshape(tiles, blocks, 32, -1, per_word), [2 * bits * r for r in range(per_word)])
        else:
            flat = values.reshape(tiles, blocks, 32, -1, 2 * per_word)
            words = _joined(flat, [bits * r + 16 * i for r in range(per_word) for i in range(2)])
        if bits == 2:  # two blocks of 64 columns to 16 bytes
            words = words.reshape(tiles, blocks // 2, 2, 32, 2).transpose(2, 3)
    return words.reshape(tiles, codes.shape[1] // layout.unit, -1).contiguous()


def _joined(values: Tensor, shifts: list[int]) -> Tensor:
    """int32 [..., n] -> [...]: value j at bit shifts[j]."""
    out = torch.zeros(values.shape[:-1], dtype=torch.int32, device=values.device)
    for value, shift in zip(values.unbind(-1), shifts, strict=True):
        out |= value << shift
    return out


def _pack_three(values: Tensor, table: bool) -> Tensor:
    """[..., 16, 2] -> [..., 3]: five registers to a word, the sixteenth in the bits that are left."""
    five, last = values[..., :15, :].reshape(*values.shape[:-2], 3, 5, 2), values[..., 15, :]
    if table:
        words = _joined(five[..., 0] | five[..., 1] << 3, [6 * r for r in range(5)])
        pair = last[..., 0] | last[..., 1] << 3
        rest = [(pair >> 2 * word & 3) << 30 for word in range(3)]
    else:
        words = _joined(five.flatten(-2), [3 * r + 16 * i for r in range(5) for i in range(2)])
        rest = [(last[..., 0] >> word & 1) << 15 | (last[..., 1] >> word & 1) << 31 for word in range(3)]
    return words | torch.stack(rest, -1)


def unpack(words: Tensor, n: int, k: int, layout: Layout) -> Tensor:
    """`pack` undone: uint8 [n, k]."""
    tiles, bits, per_word = words.shape[0], layout.bits, 16 // layout.bits
    if bits == 8:
        by_lane = words.reshape(tiles, -1, 2, 32, 4).transpose(2, 3).reshape(tiles, -1, 32, 8)
        values = _split(by_lane, [0, 8, 16, 24], 8).reshape(tiles, -1, 32, 16, 2)
    elif bits == 3:
        values = _unpack_three(words.reshape(tiles, -1, 3, 32).transpose(2, 3), layout.table)
    else:
        if bits == 2:
            words = words.reshape(tiles, -1, 32, 2, 2).transpose(2, 3)
        by_lane = words.reshape(tiles, -1, 32, bits)
        if layout.table:
            shifts = [2 * bits * r + bits * i for r in range(per_word) for i in range(2)]
        else:
            shifts = [bits * r + 16 * i for r in range(per_word) for i in range(2)]
        values = _split(by_lane, shifts, bits).reshape(tiles, -1, 32, 16, 2)
    split = values.reshape(tiles, -1, 8, 4, 4, 2, 2, 2)
    tile, block, g, c, step, high, low, i = range(8)
    codes = split.permute(tile, low, g, block, step, high, c, i).reshape(16 * tiles, -1)
    return codes[:n, :k].to(torch.uint8).contiguous()


def _split(words: Tensor, shifts: list[int], bits: int) -> Tensor:
    return torch.stack([words >> shift & ((1 << bits) - 1) for shift in shifts], -1)


def _unpack_three(words: Tensor, table: bool) -> Tensor:
    """[..., 3] -> [..., 16, 2]."""
    if table:
        five = _split(words, [3 * r for r in range(10)], 3).reshape(*words.shape, 5, 2)
        pair = sum((words[..., word] >> 30 & 3) << 2 * word for word in range(3))
        last = torch.stack((pair & 7, pair >> 3), -1)
    else:
        five = _split(words, [3 * r + 16 * i for r in range(5) for i in range(2)], 3).reshape(*words.shape, 5, 2)
        last = torch.stack([sum((words[..., w] >> 15 + 16 * i & 1) << w for w in range(3)) for i in range(2)], -1)
    return torch.cat((five.reshape(*words.shape[:-1], 15, 2), last[..., None, :]), -2)


def pack_groups(values: Tensor, columns: int, layout: Layout) -> Tensor:
    """[N, G] of one value per row and group -> [tiles, groups, 8, 2]: rows g and g + 8 together, padding zeros."""
    groups = -(-columns // layout.unit) * layout.unit // layout.group
    values = functional.pad(values, (0, groups - values.shape[1], 0, -values.shape[0] % ROWS))
    return values.reshape(-1, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def pack_scales(scale: Tensor, columns: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """scale [N, G] -> (float16 [tiles, groups, 8, 2], alpha float32 [N]); with group 0: (empty, scale itself)."""
    scale = scale.float()
    if layout.group == 0:
        return torch.empty(0, dtype=torch.float16, device=scale.device), scale.reshape(-1).contiguous()
    largest = scale.abs().amax(1)
    alpha = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest.clamp(min=1e-38)))), 1.0)
    return pack_groups((scale / alpha[:, None]).half(), columns, layout), alpha


def pack_table(levels: Tensor, half: bool, bits: int) -> Tensor:
    """Levels (at most 2 ** bits) -> int32 [2 ** (2 bits)]: two 16-bit floats an entry."""
    dtype = torch.float16 if half else torch.bfloat16
    count = 1 << bits
    levels = functional.pad(levels.float(), (0, count - levels.numel())).to(dtype)
    both = torch.stack((levels.repeat(count), levels.repeat_interleave(count)), -1)
    return both.contiguous().view(torch.int32).reshape(-1)


# ---------------------------------------------------------------- launching


class _Weight(ctypes.Structure):
    _fields_ = [
        ("words", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p), ("units", ctypes.c_int),
        ("tiles", ctypes.c_int),
    ]  # fmt: skip


@lru_cache(maxsize=1)
def _text() -> str:
    return (files("fewbits.kernels") / "cuda" / "fragments.cu").read_text(encoding="utf-8")


def _wgmma(name: str, nt: int, kinds: str, sign: str = "1, 1, 0") -> str:
    """A function of wgmma for nt tokens: an asm statement needs its operands spelled out."""
    count = nt // 2
    acc = ",".join(f"%{i}" for i in range(count))
    a = ",".join(f"%{count + i}" for i in range(4))
    operands = ",".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""DEVICE void {name}(float* d, const u32* a, u32 tokens, u32 add) {{
  asm volatile("{{.reg .pred p; .reg .b64 t; mov.b64 t, {{%{count + 4}, %{count + 6}}}; setp.ne.b32 p, %{count + 5}, 0;"
    "wgmma.mma_async.sync.aligned.m64n{nt}{kinds} {{{acc}}}, {{{a}}}, t, p, {sign};}}"
    : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(tokens), "r"(add), "n"(0x40000040));
}}
"""


def _products(nt: int, layout: Layout) -> str:
    """What `many` multiplies with: tokens in 16 bits, or E4M3 ones and the sums of their parts."""
    if layout.e4m3:
        minus = _wgmma("wgmma_minus", nt, "k16.f32.f16.f16", "-1, 1, 0")
        return _wgmma("wgmma", nt, "k32.f32.e4m3.e4m3", "1, 1") + minus
    dtype = "f16" if layout.half else "bf16"
    return _wgmma("wgmma", nt, f"k16.f32.{dtype}.{dtype}")


_DEFAULTS = {
    "RT": 1, "WARPS": 1, "RESIDENT": 1, "MT": 1, "SPLIT": 1, "RING": 1, "WG": 1, "NT": 8, "SHARE": 0, "APART": 0,
    "STAGES": 3, "REGISTERS": 0,
}  # fmt: skip


@lru_cache(maxsize=512)
def source(layout: Layout, macros: tuple[tuple[str, int], ...]) -> str:
    """fragments.cu for one layout and one choice of the rest."""
    defined = {**_DEFAULTS, **layout.macros, **dict(macros)}
    lines = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    return lines + _text().replace("@WGMMA@", _products(defined["NT"], layout) if "MANY" in defined else "")


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None or not tensor.numel() else tensor.data_ptr())


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight [n, k] as the kernels read it; k is a multiple of 8, x is padded to it."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    alpha: Tensor
    table: Tensor | None
    n: int
    k: int

    def argument(self, layout: Layout) -> _Weight:
        words, scale, zero = (_pointer(tensor).value for tensor in (self.words, self.scale, self.zero))
        return _Weight(words, scale, zero, self.words.shape[1], self.words.shape[0])


def _e4m3_arguments(x: Rounded, weight: Packed, layout: Layout, config: Many) -> tuple[nvrtc.Argument, ...]:
    """What `many` takes besides with E4M3 tokens: their sums, a block's words of 128 columns and its scales of a unit,
    each at once, and the tokens' scales."""
    tiles, rows = weight.words.shape[0], config.rows // 16
    words = weight.words.view(tiles, -1).view(torch.int64)
    groups = layout.unit // layout.group if layout.group else 1
    scales = (weight.scale if layout.group else weight.words).view(tiles, -1).view(torch.int32)
    return (
        nvrtc.tensor_map(x.sums, (config.nt, 64)),
        nvrtc.tensor_map(words, (rows, 32 * layout.bits), swizzled=False),
        nvrtc.tensor_map(scales, (rows, 8 * groups), swizzled=False),
        _pointer(x.scale),
    )


def multiply(x: Tensor | Rounded, weight: Packed, layout: Layout, config: Config) -> Tensor:
    """x [M, k] of the layout's dtype, contiguous, or rounded to E4M3 -> [M, n] of that dtype, by `few` or `many`."""
    rounded = x if isinstance(x, Rounded) else None
    if isinstance(x, Rounded):
        x = x.levels
    m, n, k = x.shape[0], weight.n, weight.k
    y = torch.empty(m, n, dtype=torch.float16 if layout.half else torch.bfloat16, device=x.device)
    run = nvrtc.kernel(source(layout, tuple(config.macros.items())), config.name, x.device.index)
    sms = run.multiprocessors
    sizes = ctypes.c_int(m), ctypes.c_int(n)
    held = weight.argument(layout), _pointer(weight.alpha), _pointer(weight.table)
    if isinstance(config, Few):
        arguments: tuple[nvrtc.Argument, ...] = (*held, _pointer(x), _pointer(y), *sizes, ctypes.c_int(k))
    else:
        sums = config.workspace(layout, n, k, m, sms)
        shared = torch.empty(sums, dtype=torch.float32, device=x.device) if sums else None
        counts = ctypes.c_void_p(nvrtc.counters(x.device.index) if sums else 0)
        tokens: tuple[nvrtc.Argument, ...] = (nvrtc.tensor_map(x, (config.nt, 128 // x.element_size())),)
        if rounded is not None:
            tokens += _e4m3_arguments(rounded, weight, layout, config)
        arguments = (*held, *tokens, _pointer(y), _pointer(shared), counts, *sizes)
    run.launch((config.grid(layout, n, k, m, sms), 1), config.threads, config.shared(layout, n, k, m, sms), arguments)
    return y


def dense(weight: Packed, layout: Layout) -> Tensor:
    """The weight in 16 bits, [n, k]."""
    dtype = torch.float16 if layout.half else torch.bfloat16
    out = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.words.device)
    run = nvrtc.kernel(source(layout, (("DENSE", 1),)), "dense", out.device.index)
    arguments = (
        weight.argument(layout), _pointer(weight.alpha), _pointer(weight.table), _pointer(out),
        ctypes.c_int(weight.n), ctypes.c_int(weight.k),
    )  # fmt: skip
    warps = weight.words.shape[0] * weight.words.shape[1]
    run.launch((min(-(-warps // 8), 16 * run.multiprocessors), 1), 256, _table_bytes(layout), arguments)
    return out


def product(x: Tensor, weight: Packed, layout: Layout, config: Config | None) -> Tensor:
    """x [M, k] -> [M, n] by `config`'s kernel; None: the weight decoded once, and a dense product."""
    return functional.linear(x, dense(weight, layout)) if config is None else multiply(x, weight, layout, config)


def fits(config: Config, layout: Layout, n: int, k: int, m: int, sms: int, limit: int = SHARED_LIMIT) -> bool:
    """Whether the configuration takes m tokens, and its blocks no more than `limit` bytes of shared memory."""
    if config.split > -(-k // layout.unit) or (isinstance(config, Few) and (layout.e4m3 or m > config.tokens)):
        return False
    if isinstance(config, Many):
        if layout.e4m3 and not config.apart:
            return False
        if config.apart and not layout.e4m3 and (not layout.group or layout.group % 64):
            return False
        blocks = config.grid(layout, n, k, m, sms)
        if config.split > 1 and blocks > config.per_sm * sms:
            return False
        if -(-k // layout.unit) * blocks**2 >= 1 << 31:
            return False
    return config.shared(layout, n, k, m, sms) <= limit
