"""GGUF block types, decoded to float32 by vectorised torch.

A block holds 32 or 256 consecutive weights of a row: integers of a few bits, one or two fp16 scales, and in
the K types a second level of small integer scales per 16 or 32 weights:

    Q4_0, Q5_0, Q8_0     w = d * (q - offset)
    Q4_1, Q5_1           w = d * q + m
    Q4_K, Q5_K           w = (d * sc) * q - (dmin * mn)      sc, mn: 6 bits for each of 8 sub-blocks of 32
    Q6_K                 w = (d * sc) * (q - 32)             sc: int8 for each of 16 sub-blocks of 16

Byte layouts as in llama.cpp's ggml-common.h. The order of the floating-point operations is that of ggml's
reference decoder, so values agree bit for bit. Temporaries are a few times the size of the output, so a
large tensor is decoded in pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.core.errors import Unsupported

CHUNK_BLOCKS = 1 << 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockType:
    """A ggml tensor type: `values` weights in `nbytes` bytes; `decode` is None for types we cannot read."""

    name: str
    values: int
    nbytes: int
    dtype: torch.dtype = torch.float32  # of the decoded tensor
    decode: Callable[[Tensor], Tensor] | None = None


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The fp16 at byte `offset` of each block, as float32 [n, 1]."""
    return blocks[:, offset : offset + 2].view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[n, k] bytes -> [n, 2k]: all low nibbles first, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: Tensor) -> Tensor:
    """[n, k] bytes -> [n, 8k] bits, least significant first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:18]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:20]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:22]) | (_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:24]) | (_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:34].view(torch.int8).float()


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima, as float32 [n, 8] each.

    Sub-blocks 0-3 sit in the low six bits of bytes 0-3 (scales) and 4-7 (minima); sub-blocks 4-7 have their
    low four bits in the nibbles of bytes 8-11 and their high two in the tops of bytes 0-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=-1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=-1)
    return scales.float(), minima.float()


def _k_affine(blocks: Tensor, codes: Tensor) -> Tensor:
    """Q4_K and Q5_K share everything but the codes, uint8 [n, 8, 32]."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (scale[..., None] * codes.float() - minimum[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    # each 32 bytes hold sub-block 2i in their low and 2i+1 in their high nibbles
    return _k_affine(blocks, _nibbles(blocks[:, 16:144].unflatten(1, (4, 32))).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:176].unflatten(1, (4, 32))).reshape(-1, 8, 32)
    # bit s of high byte j is the fifth bit of weight j of sub-block s
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (blocks[:, None, 16:48] >> shifts) & 1
    return _k_affine(blocks, low | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    # halves of 128 weights: 64 bytes of nibbles (low: first 64 weights, high: last 64), 32 bytes of bit pairs
    low = _nibbles(blocks[:, 0:128].unflatten(1, (2, 64))).unflatten(2, (4, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3
    codes: Tensor = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scales[..., None] * codes).flatten(1)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.view(dtype)


TYPES: dict[int, BlockType] = {
    0: BlockType(name="F32", values=1, nbytes=4, decode=_plain(torch.float32)),
    1: BlockType(name="F16", values=1, nbytes=2, dtype=torch.float16, decode=_plain(torch.float16)),
    2: BlockType(name="Q4_0", values=32, nbytes=18, decode=_q4_0),
    3: BlockType(name="Q4_1", values=32, nbytes=20, decode=_q4_1),
    6: BlockType(name="Q5_0", values=32, nbytes=22, decode=_q5_0),
    7: BlockType(name="Q5_1", values=32, nbytes=24, decode=_q5_1),
    8: BlockType(name="Q8_0", values=32, nbytes=34, decode=_q8_0),
    10: BlockType(name="Q2_K", values=256, nbytes=84),
    11: BlockType(name="Q3_K", values=256, nbytes=110),
    12: BlockType(name="Q4_K", values=256, nbytes=144, decode=_q4_k),
    13: BlockType(name="Q5_K", values=256, nbytes=176, decode=_q5_k),
    14: BlockType(name="Q6_K", values=256, nbytes=210, decode=_q6_k),
    16: BlockType(name="IQ2_XXS", values=256, nbytes=66),
    17: BlockType(name="IQ2_XS", values=256, nbytes=74),
    18: BlockType(name="IQ3_XXS", values=256, nbytes=98),
    19: BlockType(name="IQ1_S", values=256, nbytes=50),
    20: BlockType(name="IQ4_NL", values=32, nbytes=18),
    21: BlockType(name="IQ3_S", values=256, nbytes=110),
    22: BlockType(name="IQ2_S", values=256, nbytes=82),
    23: BlockType(name="IQ4_XS", values=256, nbytes=136),
    29: BlockType(name="IQ1_M", values=256, nbytes=56),
    30: BlockType(name="BF16", values=1, nbytes=2, dtype=torch.bfloat16, decode=_plain(torch.bfloat16)),
    34: BlockType(name="TQ1_0", values=256, nbytes=54),
    35: BlockType(name="TQ2_0", values=256, nbytes=66),
    39: BlockType(name="MXFP4", values=32, nbytes=17),
}


def readable() -> list[str]:
    """Names of the types `decode` can read."""
    return [kind.name for kind in TYPES.values() if kind.decode]


def decode(raw: Tensor, kind: BlockType, shape: tuple[int, ...]) -> Tensor:
    """Bytes (uint8, flat, whole blocks) of type `kind` -> dense tensor of `shape` and `kind.dtype`.

    Raises Unsupported for a type without a decoder.
    """
    if kind.decode is None:
        raise Unsupported(f"GGUF type {kind.name} cannot be decoded; fewbits reads {', '.join(readable())}")
    if kind.values == 1:
        return kind.decode(raw).reshape(shape)
    blocks = raw.reshape(-1, kind.nbytes)
    out = torch.empty(len(blocks), kind.values, dtype=kind.dtype)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        piece = slice(start, start + CHUNK_BLOCKS)
        out[piece] = kind.decode(blocks[piece])
    return out.reshape(shape)
