"""Canonical packing: dense little-endian codes of any width from 1 to 8 bits.

Element i of a row occupies bits [i*b, (i+1)*b) of that row's byte string, least significant bit first;
codes may cross byte boundaries; a row ends on a whole byte, padded with zero bits. So a row of n codes
takes ceil(n*b/8) bytes: the true density, for 3 and 5 bits as much as for 4.

This is the only bit order fewbits owns. A foreign order belongs to the checkpoint that needs it, a tile
order to the kernel that needs it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewbits.core.errors import BadInput


def packed_length(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def _period(bits: int) -> tuple[int, int]:
    """The smallest run (codes, bytes) after which codes and bytes line up again."""
    codes = 8 // math.gcd(bits, 8)
    return codes, codes * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 `codes` [..., n], each below 2**bits, into uint8 [..., ceil(n*bits/8)].

    Raises BadInput for a code that does not fit: truncating it would silently change a weight.
    """
    if not 1 <= bits <= 8:
        raise BadInput(f"packing width {bits} bits; allowed: 1 to 8")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise BadInput(f"code {int(codes.max())} does not fit in {bits} bits (0 to {(1 << bits) - 1})")
    count = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    run, width = _period(bits)
    padded = -(-count // run) * run
    grouped = _padded(codes.to(torch.uint8), padded)
    grouped = grouped.reshape(*codes.shape[:-1], padded // run, run)
    packed = codes.new_zeros((*grouped.shape[:-1], width), dtype=torch.uint8)
    for index in range(run):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= grouped[..., index] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= grouped[..., index] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_length(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., ceil(count*bits/8)] -> uint8 codes [..., count]."""
    if packed.shape[-1] != packed_length(count, bits):
        raise BadInput(
            f"packed row of {packed.shape[-1]} bytes; {count} codes of {bits} bits take {packed_length(count, bits)}"
        )
    if bits == 8:
        return packed.clone()
    run, width = _period(bits)
    runs = -(-count // run)
    grouped = _padded(packed, runs * width)
    grouped = grouped.reshape(*packed.shape[:-1], runs, width)
    codes = packed.new_empty((*grouped.shape[:-1], run))
    for index in range(run):
        byte, shift = divmod(index * bits, 8)
        code = grouped[..., byte] >> shift
        if shift + bits > 8:
            code = code | (grouped[..., byte + 1] << (8 - shift))
        codes[..., index] = code & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].contiguous()


def _padded(x: Tensor, length: int) -> Tensor:
    """`x` [..., n] with zeros up to `length`; `x` itself where n is that already, which `pad` would copy."""
    return x if x.shape[-1] == length else torch.nn.functional.pad(x, (0, length - x.shape[-1]))
