"""Between the ways others lay out codes and the canonical one (formats/bits.py), without a byte per code.

Three things cover most files. Rows of 32-bit words whose fields begin at the least significant bit *are* canonical
rows, padded to whole words: a view. Where only the numbering of the codes differs (an E2M1 nibble has its sign first,
an FP8 byte is the float itself, bitsandbytes puts the first of two nibbles high) a table of 256 bytes translates, one
byte for one byte. And a matrix stored the other way round is transposed by words. So a checkpoint is converted at
the speed of memory, and nothing is decoded that need not be.

Minus zero. The grids of E2M1 and E4M3 have one zero; the files have two. A minus zero comes back as plus zero, an
equal number of other bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbits.core.errors import BadInput
from fewbits.formats import bits as packing
from fewbits.formats.elements import ELEMENTS

_NAN = 255  # no code of E4M3, which has 253 levels
_ZERO = 7  # the code of 0 among E2M1's 15 levels


def to_words(packed: Tensor) -> Tensor:
    """Canonical rows [rows, bytes] as int32 [rows, words], the last word filled up with zeros."""
    more = -packed.shape[-1] % 4
    padded = pad(packed, (0, more)) if more or packed.storage_offset() % 4 else packed  # to pad by nothing copies
    # Through one dimension: a matrix of one row may keep a stride that no view as words accepts.
    return padded.reshape(-1).view(torch.int32).reshape(len(packed), -1)


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Canonical rows of `count` codes from rows of 32-bit words; BadInput where the number of words is not theirs."""
    if words.dim() != 2 or words.dtype not in (torch.int32, torch.uint32):
        raise BadInput(
            f"packed codes are {words.dtype} of {words.dim()} dimensions; a matrix of 32-bit words is expected"
        )
    packed = words.reshape(-1).view(torch.uint8).reshape(len(words), -1)
    length = packing.packed_length(count, bits)
    if packed.shape[-1] != -(-length // 4) * 4:
        raise BadInput(f"packed rows of {packed.shape[-1]} bytes; {count} codes of {bits} bits take {length}")
    return packed[:, :length].contiguous()


def translate(packed: Tensor, table: bytes) -> Tensor:
    """Every byte of the uint8 tensor replaced by what `table` [256] has in its place."""
    raw = bytearray(packed.cpu().contiguous().reshape(-1).numpy().data).translate(table)
    return torch.frombuffer(raw, dtype=torch.uint8).view(packed.shape).to(packed.device) if raw else packed.clone()


@cache
def nibbles(codes: tuple[int, ...], *, swap: bool = False) -> bytes:
    """The table that maps both nibbles of a byte by `codes` [16], and exchanges them where `swap`."""
    both = ((byte & 15, byte >> 4) for byte in range(256))
    return bytes(codes[high] | codes[low] << 4 if swap else codes[low] | codes[high] << 4 for low, high in both)


def inverse(codes: Sequence[int]) -> tuple[int, ...]:
    """The map back: 16 entries, of codes that several map to the first; 0 for what nothing maps to."""
    return tuple(codes.index(code) if code in codes else 0 for code in range(16))


# A nibble of sign, two bits of exponent, one of mantissa -> its place among the sorted levels.
E2M1 = tuple(_ZERO - code % 8 if code >= 8 else _ZERO + code for code in range(16))


@cache
def _e4m3() -> tuple[bytes, bytes]:
    grid = ELEMENTS["fp8_e4m3"]
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    codes = torch.where(values.isnan(), torch.tensor(_NAN), grid.nearest(values.nan_to_num()).int())
    back = grid.value(torch.arange(len(grid.levels))).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    return bytes(codes.tolist()), bytes(back + [0] * (256 - len(back)))


def from_e4m3(stored: Tensor) -> Tensor:
    """Canonical codes of a float8_e4m3fn tensor; BadInput for NaN."""
    codes = translate(stored.view(torch.uint8), _e4m3()[0])
    bad = int((codes == _NAN).sum())
    if bad:
        raise BadInput(f"{bad} of {codes.numel()} weights are NaN: the checkpoint is damaged")
    return codes


def to_e4m3(codes: Tensor) -> Tensor:
    return translate(codes, _e4m3()[1]).view(torch.float8_e4m3fn)


def from_e2m1(stored: Tensor) -> Tensor:
    """Canonical rows from uint8 [rows, in/2] whose low nibbles are the even columns."""
    return translate(stored.view(torch.uint8), nibbles(E2M1))


def to_e2m1(packed: Tensor) -> Tensor:
    return translate(packed, nibbles(inverse(E2M1)))
