"""Inputs and plain references of the Triton kernels, for the interpreter (unit) and for a GPU (gpu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.formats.kv import parse_kv
from fewbits.kernels.kv_tiles import KVTiles


def filled(k: Tensor, v: Tensor, bits: int, group: int) -> KVTiles:
    """Keys and values [batch, heads, tokens, width], rounded as `int<bits>-g<group>` caches do."""
    batch, heads, length, width = k.shape
    format = parse_kv(f"int{bits}-g{group}").format(width)
    kv = KVTiles.empty(batch, heads, length, width, bits, group, k.device)
    for side, x in (("keys", k), ("values", v)):
        found = format.quantize(x.reshape(-1, width))
        kv.put(side, *(part.reshape(batch, heads, length, -1) for part in (found.codes, found.scale, found.zero)))
    return kv


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """float64 [batch, query heads, width]; each batch over its own length."""
    ratio, out = q.shape[1] // k.shape[1], []
    for b, length in enumerate(lengths.tolist()):
        keys, values = (side[b, :, :length].double().repeat_interleave(ratio, 0) for side in (k, v))
        weights = torch.softmax(torch.einsum("hd,hnd->hn", q[b].double(), keys) * scale, -1)
        out.append(torch.einsum("hn,hnd->hd", weights, values))
    return torch.stack(out)


def error(y: Tensor, expected: Tensor) -> float:
    """||y - expected|| / ||expected||."""
    return float((y.double() - expected.double()).norm() / expected.double().norm())
