"""How a weight lies in memory for the tensor cores: the order of a thread's registers, scales, tables.

A thread reads 16 bytes, all its own, and one mask leaves two codes in the last bits of two 16-bit floats (fragments.py
says what for). The order is that of Marlin, arXiv 2408.11743; the left operand's, CUDA PTX ISA, "Matrix fragments for
mma.m16n8k16".

    tile      16 rows x 16 columns; lane l = 4 g + c holds registers r = 0..3 of two values each:
              row g + 8 (r % 2), columns 2 c + 8 (r // 2) + {0, 1}
    word      4 bits: one tile. Value i of register r at bit 4 r + 16 i.
              2 bits: two words for four tiles, of rows g and g + 8. Value i of register r of tile t at bit
                      4 t + 2 (r // 2) + 16 i of word r % 2.
              3 bits: three words for four tiles. Of their 16 registers five to a word, in the order of `_PLACES`,
                      register n at bit 3 n + 16 i; the bits left over (15 and 31 of each word) are the last's.
              8 bits: half a tile. Registers r, r + 1: four bytes.
    tables    codes of a grid that is not consecutive integers lie in pairs (value 0, value 1) and index a table of
              pairs of levels in shared memory, one copy per lane, so that lanes never meet in a bank.

Scales of groups are stored as float16 after division by a power of two per row (`alpha`, float32), which is multiplied
into the result: bfloat16 and float16 scales keep all their digits, and float32 ones 11 bits. A single scale a row is
`alpha` itself, in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 64  # rows are padded to the most that a warp takes
_BLOCK_COLUMNS = 128  # whole blocks of words for every width; two turns of `many`
# Which of the 16 registers of four tiles, 4 tile + r, lies where: those of rows g and g + 8, 2 p and 2 p + 1, are to be
# moved up equally by the shifts that bring several into the last 8 bits of a bfloat16 (cuda/fragments.cu, `place`).
_PLACES = {
    2: [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15],
    3: [0, 2, 12, 14, 13, 1, 3, 5, 7, 9, 4, 6, 8, 10, 11, 15],
}


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
    def groups(self) -> int:
        """Of a unit; 0 where a row has one scale."""
        return self.unit // self.group if self.group else 0

    def units(self, columns: int) -> int:
        """That so many columns take."""
        return -(-columns // self.unit)

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

    @property
    def table_bytes(self) -> int:
        """Of shared memory: the table of pairs, a copy for every lane."""
        return 128 << (2 * self.bits) if self.table else 0


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
    if bits in _PLACES:
        values = values[..., _PLACES[bits], :]
    if bits == 8:
        words = _joined(values.reshape(tiles, blocks, 32, 8, 4), [0, 8, 16, 24])
        words = words.reshape(tiles, blocks, 32, 2, 4).transpose(2, 3)
    elif bits == 3:
        words = _pack_three(values, layout.table).reshape(tiles, -1, 2, 32, 3).transpose(2, 3)
        words = words.reshape(tiles, -1, 32, 6)  # of a lane in two blocks: four of all lanes, then the rest
        words = torch.cat((words[..., :4].flatten(2), words[..., 4:].flatten(2)), 2)
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
        words = words.reshape(tiles, -1, 192)
        by_lane = torch.cat((words[..., :128].reshape(tiles, -1, 32, 4), words[..., 128:].reshape(tiles, -1, 32, 2)), 3)
        by_lane = by_lane.reshape(tiles, -1, 32, 2, 3).transpose(2, 3).reshape(tiles, -1, 32, 3)
        values = _unpack_three(by_lane, layout.table)
    else:
        if bits == 2:
            words = words.reshape(tiles, -1, 32, 2, 2).transpose(2, 3)
        by_lane = words.reshape(tiles, -1, 32, bits)
        if layout.table:
            shifts = [2 * bits * r + bits * i for r in range(per_word) for i in range(2)]
        else:
            shifts = [bits * r + 16 * i for r in range(per_word) for i in range(2)]
        values = _split(by_lane, shifts, bits).reshape(tiles, -1, 32, 16, 2)
    if bits in _PLACES:
        values = values[..., torch.tensor(_PLACES[bits]).argsort(), :]
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
    groups = layout.units(columns) * layout.groups
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
