"""GGUF's i-quants, decoded: vectors of weights named by an index into a list (gguf_grids.py).

| type | bytes in order, per 256 weights |
|---|---|
| iq2_xxs | d, 8 x (4 indices of 8 bits, then 4 x 7 signs and a scale of 4 bits in 32) |
| iq2_xs | d, 32 x (index of 9 bits, signs of 7), 8 bytes: 16 scales of 4 bits |
| iq2_s | d, 32 low bytes of indices, 32 sign bytes, 8: high bit pairs, 8: 16 scales of 4 bits |
| iq3_xxs | d, 64 indices of 8 bits, 8 x (4 x 7 signs and a scale of 4 bits in 32) |
| iq3_s | d, 64 low bytes of indices, 8: ninth bits, 32 sign bytes, 4: 8 scales of 4 bits |
| iq1_s | d, 32 low bytes of indices, 8 x (4 x 3 high bits, a scale of 3 bits, the sign of the shift in 16) |
| iq1_m | 32 low bytes, 16: per index 3 high bits and the sign of its shift, 4 x (4 scales of 3 bits, a quarter of d) |
| iq4_xs | d, 2: high bit pairs of 8 scales, 4: their low nibbles, 128: nibbles, indices into IQ4_NL's table |

Scales: d (1/2 + s) / 4 for iq2, d (1/2 + s) / 2 for iq3_xxs, d (1 + 2 s) for iq3_s and iq1, d (s - 32) for iq4_xs.
The order of the floating-point operations is that of ggml's reference decoder. Source: ggml-common.h, ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.checkpoints.gguf_grids import even_signs, grid
from fewbits.formats.ggml_tables import IQ4_LEVELS

_SHIFT = 0.125  # what iq1 moves every weight of a vector by


def decode(name: str, blocks: Tensor) -> Tensor:
    """uint8 [n, bytes of a block] -> float32 [n, 256]."""
    return DECODERS[name](blocks).reshape(len(blocks), 256)


def _half(piece: Tensor) -> Tensor:
    """fp16 at the start of each block, [n, 1] float32."""
    return piece.contiguous().view(torch.float16).float()


def _words(piece: Tensor, width: int) -> Tensor:
    """Little-endian unsigned integers of `width` bytes as int64."""
    parts = piece.reshape(len(piece), -1, width).long()
    return (parts << (8 * torch.arange(width))).sum(dim=-1)


def _fields(words: Tensor, width: int, count: int, start: int = 0) -> Tensor:
    """`count` fields of `width` bits of each word, side by side: [n, k] -> [n, k * count]."""
    shifts = start + width * torch.arange(count)
    return ((words[..., None] >> shifts) & ((1 << width) - 1)).flatten(1)


def _signs(piece: Tensor) -> Tensor:
    """Sign bytes, one bit a weight: [n, k] -> [n, 8 k] of 1 and -1."""
    return 1.0 - 2.0 * _fields(piece.long(), 1, 8).float()


def _scaled(scale: Tensor, values: Tensor, signs: Tensor) -> Tensor:
    """scale [n, G] times values and signs [n, 256]."""
    groups = scale.shape[1]
    found = scale[..., None] * values.reshape(len(values), groups, -1)
    return found * signs.reshape(len(values), groups, -1)


def _iq2_xxs(blocks: Tensor) -> Tensor:
    d, rest = _half(blocks[:, :2]), blocks[:, 2:].reshape(len(blocks), 8, 8)
    indices, word = rest[..., :4].reshape(len(blocks), -1).long(), _words(rest[..., 4:].reshape(len(blocks), -1), 4)
    scale = d * (0.5 + (word >> 28).float()) * 0.25
    return _scaled(scale, grid("IQ2_XXS")[indices], even_signs()[_fields(word, 7, 4)])


def _iq2_xs(blocks: Tensor) -> Tensor:
    d, word, scales = _half(blocks[:, :2]), _words(blocks[:, 2:66], 2), _fields(blocks[:, 66:].long(), 4, 2)
    scale = d * (0.5 + scales.float()) * 0.25
    return _scaled(scale, grid("IQ2_XS")[word & 511], even_signs()[word >> 9])


def _iq2_s(blocks: Tensor) -> Tensor:
    d, low, signs, high, scales = blocks.split([2, 32, 32, 8, 8], dim=1)
    indices = low.long() | (_fields(high.long(), 2, 4) << 8)
    scale = _half(d) * (0.5 + _fields(scales.long(), 4, 2).float()) * 0.25
    return _scaled(scale, grid("IQ2_S")[indices], _signs(signs))


def _iq3_xxs(blocks: Tensor) -> Tensor:
    d, indices, words = blocks.split([2, 64, 32], dim=1)
    word = _words(words, 4)
    scale = _half(d) * (0.5 + (word >> 28).float()) * 0.5
    return _scaled(scale, grid("IQ3_XXS")[indices.long()], even_signs()[_fields(word, 7, 4)])


def _iq3_s(blocks: Tensor) -> Tensor:
    d, low, ninth, signs, scales = blocks.split([2, 64, 8, 32, 4], dim=1)
    indices = low.long() | (_fields(ninth.long(), 1, 8) << 8)
    scale = _half(d) * (1 + 2 * _fields(scales.long(), 4, 2)).float()
    return _scaled(scale, grid("IQ3_S")[indices], _signs(signs))


def _iq1_s(blocks: Tensor) -> Tensor:
    d, low, high = blocks.split([2, 32, 16], dim=1)
    word = _words(high, 2)
    scale = _half(d) * (2 * ((word >> 12) & 7) + 1).float()
    shift = torch.where((word & 0x8000) == 0, _SHIFT, -_SHIFT)
    indices = low.long() | (_fields(word, 3, 4) << 8)
    values = grid("IQ1")[indices].reshape(len(blocks), 8, 32)
    return scale[..., None] * (values + shift[..., None])


def _iq1_m(blocks: Tensor) -> Tensor:
    low, high, scales = blocks.split([32, 16, 8], dim=1)
    word = _words(scales, 2)
    quarters = (word >> 12) << torch.tensor([0, 4, 8, 12])
    d = quarters.sum(dim=1, keepdim=True).to(torch.int32).to(torch.int16).view(torch.float16).float()
    scale = d * (2 * _fields(word, 3, 4) + 1).float()
    nibbles = _fields(high.long(), 4, 2)
    shift = torch.where((nibbles & 8) == 0, _SHIFT, -_SHIFT)
    values = grid("IQ1")[low.long() | ((nibbles & 7) << 8)] + shift[..., None]
    return scale[..., None] * values.reshape(len(blocks), 16, 16)


def _iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, nibbles = blocks.split([2, 2, 4, 128], dim=1)
    scales = _fields(low.long(), 4, 2) | (_fields(_words(high, 2), 2, 8) << 4)
    scale = _half(d) * (scales - 32).float()
    chunks = nibbles.reshape(len(blocks), 8, 16)
    codes = torch.cat([chunks & 15, chunks >> 4], dim=-1).long()
    return scale[..., None] * torch.tensor(IQ4_LEVELS)[codes]


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ4_XS": _iq4_xs,
}
