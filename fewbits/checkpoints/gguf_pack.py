"""ggml's byte order: quantized matrices to GGUF blocks and back.

Within a block, codes lie in planes: the low 4 (or 2) bits of several runs of weights share bytes, the high bits
have bytes of their own. With q[i] the code of weight i (levels counted from the lowest):

| type | bytes in order |
|---|---|
| q4_0, q4_1 | d, (m), 16: nibbles of weights 0-15 low, 16-31 high |
| q5_0, q5_1 | d, (m), 4: bit i is the fifth bit of weight i, then 16 as q4_0 |
| q8_0 | d, 32 int8 |
| q2_k | 16: scale low and minimum high nibble, 64: bit pairs, d, dmin |
| q3_k | 32: third bits, 64: bit pairs, 12: scales of 6 bits, d |
| q4_k | d, dmin, 12: scales and minima of 6 bits, 128: nibbles |
| q5_k | d, dmin, 12, 32: fifth bits, 128: nibbles |
| q6_k | 128: low nibbles, 64: high bit pairs, 16: int8 scales, d |
| iq4_nl | d, 16: nibbles of weights 0-15 low, 16-31 high |
| tq1_0 | 32, 16, 4: five (in the last four bytes four) ternary digits a byte, d |
| tq2_0 | 64: bit pairs, d |
| mxfp4 | exponent, 16: nibbles of weights 0-15 low, 16-31 high, each a sign over an index into E2M1's magnitudes |

A ternary byte holds n = 81 a + 27 b + 9 c + 3 d + e as ceil(256 n / 243): a fraction, whose digits come out one by one
as the carry of a multiplication by 3.

A plane of width b is a matrix [chunks, runs, length]: run r of a chunk lies at bit b * r of its `length` bytes.
Source: ggml-common.h and the decoders of gguf-py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, Quantized
from fewbits.formats import bits as packing
from fewbits.formats.kquant import BlockFormat
from fewbits.formats.scales import State


@dataclass(frozen=True)
class Plane:
    """Bits `shift` ... `shift + width - 1` of every code, as runs of `length` weights side by side in a byte."""

    shift: int
    width: int
    length: int

    @property
    def runs(self) -> int:
        return 8 // self.width

    def pack(self, codes: Tensor) -> Tensor:
        """[n, weights] -> [n, weights * width / 8]."""
        part = (codes >> self.shift) & ((1 << self.width) - 1)
        chunks = part.view(len(codes), -1, self.runs, self.length)
        packed = torch.zeros_like(chunks[:, :, 0])
        for run in range(self.runs):
            packed |= chunks[:, :, run] << (run * self.width)
        return packed.flatten(1)

    def unpack(self, packed: Tensor) -> Tensor:
        shifts = torch.arange(self.runs, dtype=torch.uint8, device=packed.device)[:, None] * self.width
        chunks = packed.view(len(packed), -1, 1, self.length) >> shifts
        return (chunks & ((1 << self.width) - 1)).flatten(1) << self.shift


_NIBBLES, _PAIRS = Plane(0, 4, 32), Plane(0, 2, 32)
# Parts of a block in order: a plane, or the name of what `_part` writes; with its bytes.
_LAYOUTS: dict[str, list[tuple[str | Plane, int]]] = {
    "q4_0": [("d", 2), (Plane(0, 4, 16), 16)],
    "q4_1": [("d", 2), ("m", 2), (Plane(0, 4, 16), 16)],
    "q5_0": [("d", 2), ("fifth", 4), (Plane(0, 4, 16), 16)],
    "q5_1": [("d", 2), ("m", 2), ("fifth", 4), (Plane(0, 4, 16), 16)],
    "q8_0": [("d", 2), ("int8", 32)],
    "q2_k": [("scales4", 16), (_PAIRS, 64), ("d", 2), ("m", 2)],
    "q3_k": [(Plane(2, 1, 32), 32), (_PAIRS, 64), ("scales3", 12), ("d", 2)],
    "q4_k": [("d", 2), ("m", 2), ("scales6", 12), (_NIBBLES, 128)],
    "q5_k": [("d", 2), ("m", 2), ("scales6", 12), (Plane(4, 1, 32), 32), (_NIBBLES, 128)],
    "q6_k": [(Plane(0, 4, 64), 128), (Plane(4, 2, 32), 64), ("scales8", 16), ("d", 2)],
    "iq4_nl": [("d", 2), (Plane(0, 4, 16), 16)],
    "tq1_0": [("trits", 52), ("d", 2)],
    "tq2_0": [(_PAIRS, 64), ("d", 2)],
}
MXFP4_BYTES = 17
_TRITS = ((32, 5), (16, 5), (4, 4))  # bytes of a run, digits in each


def _layout(format: Format) -> tuple[BlockFormat, list[tuple[str | Plane, int]]]:
    if not isinstance(format, BlockFormat):
        raise Unsupported(f"{format.name} has no GGUF type; those that have: {', '.join(_LAYOUTS)}, mxfp4")
    return format, _LAYOUTS[format.name]


def block_bytes(format: Format) -> int:
    """Bytes of one block."""
    return sum(size for _, size in _layout(format)[1])


def to_blocks(weight: Quantized) -> Tensor:
    """uint8 [out, bytes]: each row as GGUF blocks, one after another."""
    if weight.format.name == "mxfp4":
        return _mxfp4_blocks(weight)
    format, layout = _layout(weight.format)
    state = weight.to_state()
    rows, columns = weight.shape
    codes = weight.codes.reshape(-1, format.block)
    scales, minima = _integers(format, state, columns)
    named = {"d": _unit(format, state, "scale"), "m": _unit(format, state, "minimum")}
    parts = []
    for part, _ in layout:
        if isinstance(part, Plane):
            parts.append(part.pack(codes))
        elif part in named:
            found = named[part]
            assert found is not None
            parts.append(found.view(torch.uint8))
        elif part == "fifth":
            parts.append(_pack_bits(codes >> 4))
        elif part == "int8":
            parts.append(codes ^ 128)
        elif part == "trits":
            parts.append(_pack_trits(codes))
        else:
            parts.append(_pack_scales(part, scales, minima))
    return torch.cat(parts, dim=1).view(rows, -1)


def from_blocks(format: Format, blocks: Tensor) -> Quantized:
    """The inverse of `to_blocks`, from uint8 [out, bytes]."""
    if format.name == "mxfp4":
        return _from_mxfp4(format, blocks)
    format, layout = _layout(format)
    size = block_bytes(format)
    if blocks.dim() != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % size:
        raise BadInput(f"blocks {blocks.dtype} {tuple(blocks.shape)}; {format.name} takes uint8 rows of {size} n bytes")
    rows, columns = blocks.shape[0], blocks.shape[1] // size * format.block
    pieces = blocks.reshape(-1, size).split([width for _, width in layout], dim=1)
    codes = blocks.new_zeros((pieces[0].shape[0], format.block))
    state: State = {}
    for (part, _), piece in zip(layout, pieces, strict=True):
        piece = piece.contiguous()
        if isinstance(part, Plane):
            codes |= part.unpack(piece)
        elif part in ("d", "m"):
            prefix = "scale" if part == "d" else "minimum"
            unit = piece.view(torch.float16).view(rows, -1)
            state[prefix if format.legacy else f"{prefix}_super"] = -unit if part == "m" and format.legacy else unit
        elif part == "fifth":
            codes |= _unpack_bits(piece) << 4
        elif part == "int8":
            codes = piece ^ 128
        elif part == "trits":
            codes = _unpack_trits(piece)
        else:
            scales, minima = _unpack_scales(part, piece)
            state["scale"] = packing.pack(scales.view(rows, -1), format.scales.bits)
            if minima is not None:
                state["minimum"] = packing.pack(minima.view(rows, -1), format.scales.bits)
    if format.name == "tq2_0" and bool((codes > 2).any()):
        raise BadInput("a TQ2_0 block has the code 3, which stands for no ternary digit: the file is damaged")
    scale, zero = format.unsettle((rows, columns), state)
    return Quantized(format=format, codes=codes.view(rows, columns), scale=scale, zero=zero, stored=state)


def _mxfp4_blocks(weight: Quantized) -> Tensor:
    """MXFP4 has no `BlockFormat`: its scales are exponents, and its code 8, minus zero, is no level of ours."""
    rows, columns = weight.shape
    if columns % 32:
        raise BadInput(f"input dimension {columns} is no multiple of MXFP4's 32: keep it in 16 bits")
    rank = weight.codes.short() - len(weight.format.grid.levels) // 2
    nibbles = (rank.abs() | ((rank < 0).short() << 3)).to(torch.uint8)
    exponent = weight.format.settle(weight.scale, None)[2]["scale"].reshape(-1, 1)
    return torch.cat([exponent, Plane(0, 4, 16).pack(nibbles.reshape(-1, 32))], dim=1).view(rows, -1)


def _from_mxfp4(format: Format, blocks: Tensor) -> Quantized:
    rows, columns = blocks.shape[0], blocks.shape[1] // MXFP4_BYTES * 32
    exponent, packed = blocks.reshape(-1, MXFP4_BYTES).split([1, 16], dim=1)
    if bool((exponent == 255).any()):
        raise BadInput("an MXFP4 scale has the exponent 255, which is NaN: the file is damaged")
    nibbles = Plane(0, 4, 16).unpack(packed.contiguous()).short()
    rank = torch.where(nibbles >= 8, -(nibbles & 7), nibbles)
    codes = (rank + len(format.grid.levels) // 2).to(torch.uint8).view(rows, columns)
    scale, zero = format.unsettle((rows, columns), {"scale": exponent.reshape(rows, -1)})
    return Quantized(format=format, codes=codes, scale=scale, zero=zero)


def _pack_trits(codes: Tensor) -> Tensor:
    parts, start = [], 0
    for length, digits in _TRITS:
        run = codes[:, start : start + length * digits].view(-1, digits, length).short()
        weights = torch.tensor([81, 27, 9, 3, 1][:digits], dtype=torch.int16)[:, None]
        number = (run * weights).sum(dim=1)
        parts.append(((number.int() * 256 + 242) // 243).to(torch.uint8))
        start += length * digits
    return torch.cat(parts, dim=1)


def _unpack_trits(packed: Tensor) -> Tensor:
    parts = []
    for piece, (_, digits) in zip(packed.split([length for length, _ in _TRITS], dim=1), _TRITS, strict=True):
        powers = torch.tensor([1, 3, 9, 27, 81][:digits], dtype=torch.int32)[:, None]
        left = (piece[:, None].int() * powers) & 255
        parts.append(((left * 3) >> 8).to(torch.uint8).flatten(1))
    return torch.cat(parts, dim=1)


def _unit(format: BlockFormat, state: State, prefix: str) -> Tensor | None:
    """The fp16 of each block, [n, 1]; ggml adds the legacy minimum, and subtracts the others."""
    if format.legacy:
        found = state.get(prefix)
        return None if found is None else (-found if prefix == "minimum" else found).reshape(-1, 1)
    found = state.get(f"{prefix}_super")
    return None if found is None else found.reshape(-1, 1)


def _integers(format: BlockFormat, state: State, columns: int) -> tuple[Tensor, Tensor]:
    """Codes of the sub-blocks' scales and minima, [n, G] each (empty where there are none)."""
    groups = format.scaling.groups(columns)
    empty = state["scale"].new_empty(0)
    if format.legacy:
        return empty, empty
    scales = format.scales.integers(state, groups).view(-1, format.scales.count)
    minima = format.minima.integers(state, groups).view(-1, format.scales.count) if format.affine else empty
    return scales, minima


def _pack_bits(bit: Tensor) -> Tensor:
    """[n, 8k] of 0 and 1 -> [n, k], least significant first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bit.device)
    return (bit.view(len(bit), -1, 8) << shifts).sum(-1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(1)


def _pack_scales(kind: str, scales: Tensor, minima: Tensor) -> Tensor:
    if kind == "scales8":
        return scales ^ 128
    if kind == "scales4":
        return scales | (minima << 4)
    if kind == "scales3":
        # 16 of 6 bits: low nibbles of 0-7 and 8-15 share 8 bytes, high pairs of j, j+4, j+8, j+12 one of 4.
        return torch.cat([Plane(0, 4, 8).pack(scales), Plane(4, 2, 4).pack(scales)], dim=1)
    # 8 + 8 of 6 bits: 0-3 whole in 8 bytes, whose tops take the high pairs of 4-7; their nibbles share 4 bytes.
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], dim=1)


def _unpack_scales(kind: str, packed: Tensor) -> tuple[Tensor, Tensor | None]:
    if kind == "scales8":
        return packed ^ 128, None
    if kind == "scales4":
        return packed & 15, packed >> 4
    if kind == "scales3":
        low, high = (part.contiguous() for part in packed.split(8, dim=1))
        return Plane(0, 4, 8).unpack(low) | Plane(4, 2, 4).unpack(high), None
    first, second, third = packed.split(4, dim=1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scales, minima
