"""One token through the blocks on a CPU: the part of the decode engine where every call counts.

A call into torch costs 2 to 5 microseconds whatever it computes, and the products of a small model take
tens. So nothing here is allocated or sliced that could have been before: buffers, and all views of them,
are made once; a layer is 20 calls.

    buffer   [q heads | k heads | v heads] x head size, float32: the joined projection is copied in, and the
             rotated q and k are written back over themselves as (real, imaginary) pairs
    cache    [layers, 2, kv heads, capacity, head size]: k and v of a token lie side by side in the buffer, and
             go into the cache in one copy
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class OneRow:
    """`__call__` takes the hidden state [1, H] of one token through `layers`, in place.

    layers: the engine's (attributes norm, qkv, o, mlp_norm, gate_up, down, q_norm, k_norm, eps).
    """

    def __init__(
        self, layers: Sequence[Any], *, heads: int, kv_heads: int, width: int, hidden: int, scale: float
    ) -> None:
        self._layers, self._scale, self._hidden, self._width = layers, scale, hidden, width
        buffer = torch.empty((heads + 2 * kv_heads) * width)
        turned = buffer[: (heads + kv_heads) * width]
        self._buffer = buffer[None]
        halves = turned.view(heads + kv_heads, 2, width // 2)
        self._real, self._imaginary = halves[:, 0], halves[:, 1]
        self._turned = torch.view_as_complex(turned.view(heads + kv_heads, width // 2, 2))
        self._queries = buffer[: heads * width].view(1, heads, 1, width)
        self._grouped = heads != kv_heads
        self._by_head = turned.view(heads + kv_heads, width)
        self._heads = heads
        self._keys_values = buffer[heads * width :].view(2, kv_heads, width)
        self._zero = torch.zeros(())
        self._inputs: dict[torch.dtype, Tensor] = {}
        self._contexts: dict[torch.dtype, Tensor] = {}
        for layer in layers:
            for product in (layer.qkv, layer.gate_up):
                self._inputs.setdefault(product.dtype, torch.empty(1, hidden, dtype=product.dtype))
            self._contexts.setdefault(layer.o.dtype, torch.empty(1, heads * width, dtype=layer.o.dtype))

    def __call__(self, h: Tensor, turn: Tensor, cache: Tensor, position: int) -> Tensor:
        """h float32 [1, H]; turn complex [1, width / 2]; the token goes to `position` of the cache."""
        row = h.view(-1)
        slots = cache.select(3, position).unbind(0)
        seen = cache.narrow(3, 0, position + 1)
        keys, values = seen.select(1, 0).unsqueeze(1).unbind(0), seen.select(1, 1).unsqueeze(1).unbind(0)
        attend, queries, scale, grouped = (
            functional.scaled_dot_product_attention,
            self._queries,
            self._scale,
            self._grouped,
        )
        for index, layer in enumerate(self._layers):
            x = self._normed(h, row, layer.norm, layer.eps, layer.qkv.dtype)
            self._buffer.copy_(layer.qkv.apply(x))
            if layer.q_norm is not None:
                self._norm_heads(layer)
            torch.mul(torch.complex(self._real, self._imaginary), turn, out=self._turned)
            slots[index].copy_(self._keys_values)
            context = attend(queries, keys[index], values[index], scale=scale, enable_gqa=grouped)
            context = context.view(1, -1)
            if layer.o.dtype != torch.float32:
                context = self._contexts[layer.o.dtype].copy_(context)
            h.add_(layer.o.apply(context))
            x = self._normed(h, row, layer.mlp_norm, layer.eps, layer.gate_up.dtype)
            gate, up = layer.gate_up.apply(x).chunk(2, 1)
            inner = functional.silu(gate, inplace=True).mul_(up)
            if inner.dtype != layer.down.dtype:
                inner = inner.to(layer.down.dtype)
            h.add_(layer.down.apply(inner))
        return h

    def _normed(self, h: Tensor, row: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """h * rsqrt(mean(h²) + eps) * weight: two calls, where rms_norm makes seven on a CPU."""
        factor = (float(torch.dot(row, row)) / self._hidden + eps) ** -0.5
        return torch.addcmul(self._zero, h, weight, value=factor, out=self._inputs[dtype])

    def _norm_heads(self, layer: Any) -> None:
        queries, keys = self._by_head[: self._heads], self._by_head[self._heads :]
        queries.copy_(functional.rms_norm(queries, (self._width,), layer.q_norm, layer.eps))
        keys.copy_(functional.rms_norm(keys, (self._width,), layer.k_norm, layer.eps))
