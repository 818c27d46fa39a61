"""Keys and values of one layer in the layout that decode attention reads (decode_attention.py).

TILE tokens of a head lie together, so a tile is one stretch of memory and tokens are appended in place:

| tensor | shape | dtype |
|---|---|---|
| keys | [batch, heads, tiles, TILE, bytes of a token] | int8 |
| values | [batch, heads, tiles, bytes of a token, TILE] | int8 |
| key_params, value_params | [batch, heads, tiles, groups, TILE] | int32: a scale and, above it, a minimum, float16 |

A byte of 8 bits is the code less 128, since the matrix instruction multiplies signed numbers. A byte of 4 bits holds
the codes of channels d (low) and d + D/2 (high): two bytes that are taken apart belong to the same token, so a token
is written without reading its neighbours. Nothing is rounded here: `tokens` gives codes, scales and minima back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import BadInput

TILE = 128


@dataclass(frozen=True, kw_only=True)
class KVTiles:
    """Keys and values of one layer; capacity: tokens there is room for, a multiple of TILE."""

    keys: Tensor
    key_params: Tensor
    values: Tensor
    value_params: Tensor
    bits: int

    @staticmethod
    def empty(
        batch: int, heads: int, capacity: int, width: int, bits: int, group: int, device: torch.device | str
    ) -> KVTiles:
        if bits not in (4, 8) or width % group or width // group not in (1, 2, 4):
            raise BadInput(
                f"{bits} bits in groups of {group} for heads of {width}; 4 or 8 bits and 1, 2 or 4 groups are allowed"
            )
        tiles, row = -(-capacity // TILE), width * bits // 8
        params = batch, heads, tiles, width // group, TILE
        return KVTiles(
            keys=torch.zeros(batch, heads, tiles, TILE, row, dtype=torch.int8, device=device),
            values=torch.zeros(batch, heads, tiles, row, TILE, dtype=torch.int8, device=device),
            key_params=torch.zeros(params, dtype=torch.int32, device=device),
            value_params=torch.zeros(params, dtype=torch.int32, device=device),
            bits=bits,
        )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values, self.key_params, self.value_params))

    def put(self, side: str, codes: Tensor, scale: Tensor, minimum: Tensor) -> None:
        """All tokens, from the first. codes uint8 [batch, heads, tokens, width]; scale, minimum float16."""
        held, params = (getattr(self, name) for name in _names(side))
        tiles = -(-codes.shape[2] // TILE)
        rows = _bytes(_whole_tiles(codes, tiles), self.bits)  # [batch, heads, tiles, TILE, bytes]
        held[:, :, :tiles] = rows.transpose(3, 4) if side == "values" else rows
        words = torch.stack((scale, minimum), -1).to(torch.float16).view(torch.int32).squeeze(-1)
        params[:, :, :tiles] = _whole_tiles(words, tiles).transpose(3, 4)

    def tokens(self, side: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `count` tokens, as `put` takes them."""
        held, params = (getattr(self, name) for name in _names(side))
        rows = (held.transpose(3, 4) if side == "values" else held).flatten(2, 3)[:, :, :count]
        words = params.transpose(3, 4).flatten(2, 3)[:, :, :count].contiguous()
        scale, minimum = words.unsqueeze(-1).view(torch.float16).unbind(-1)
        return _codes(rows, self.bits), scale, minimum

    def dequantize(self, side: str, count: int) -> Tensor:
        """float32 [batch, heads, count, width]."""
        codes, scale, minimum = self.tokens(side, count)
        grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
        return (grouped * scale.float()[..., None] - minimum.float()[..., None]).flatten(-2)


def _names(side: str) -> tuple[str, str]:
    return ("keys", "key_params") if side == "keys" else ("values", "value_params")


def _whole_tiles(x: Tensor, tiles: int) -> Tensor:
    """[batch, heads, tokens, c] -> [batch, heads, tiles, TILE, c], zeros behind."""
    more = tiles * TILE - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, more)).unflatten(2, (tiles, TILE))


def _bytes(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return (codes ^ 0x80).view(torch.int8)
    low, high = codes.chunk(2, -1)
    return (low | high << 4).view(torch.int8)


def _codes(rows: Tensor, bits: int) -> Tensor:
    rows = rows.contiguous().view(torch.uint8)
    return rows ^ 0x80 if bits == 8 else torch.cat((rows & 15, rows >> 4), -1)
