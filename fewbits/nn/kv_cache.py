"""A cache of keys and values in few bits, as a transformers `Cache`.

    cache = QuantizedKVCache(model.config, "int4")
    model.generate(**inputs, past_key_values=cache)

A layer holds three stretches of tokens:

    [ first ........ | stored ............................. | recent ............ ]
      as they came     packed codes, scales, minima           as they came

New tokens are appended to the recent ones. When there are a whole group more than `KVFormat.recent` says, the oldest
groups of them are quantized once and for all, so each token is rounded once. `update` returns the whole: stored tokens
decoded, the new ones as they came. What a forward pass computes itself it therefore sees unrounded; a prompt read at
once is rounded for the tokens behind it.

Layout, batch first so that beams can be picked: keys per channel are [batch, heads, width, tokens], rows of tokens
packed a group at a time, so that groups are appended without touching a byte that is there; values, and keys per token,
are [batch, heads, tokens, width]. Formats and packing are those of weights (fewbits.formats).

Trade-off. This saves memory, not time: every step decodes what is stored, one layer at a time. Recent and first
tokens take the dtype of the hidden states. Layers of sliding attention hold a small window and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from fewbits.core.errors import Unsupported
from fewbits.formats import Quantized, hadamard
from fewbits.formats.kv import KVFormat, parse_kv


class QuantizedKVCache(Cache):
    """The cache of a model of `config`, stored as `kv` (or its name, see formats/kv.py); empty when made."""

    def __init__(self, config: Any, kv: KVFormat | str) -> None:
        self.kv = parse_kv(kv) if isinstance(kv, str) else kv
        layers = DynamicCache(config=config).layers
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise Unsupported(
                f"{getattr(config, 'model_type', 'this model')} has no layer of full attention to quantize the cache of"
            )
        for index in full:
            layers[index] = QuantizedKVLayer(self.kv)
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held now, by layers of full attention."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedKVLayer))


class QuantizedKVLayer(DynamicLayer):
    """The cache of one layer. `keys` and `values` are the recent tokens [batch, heads, tokens, width]."""

    is_croppable = False  # tokens cropped out of a stored group come back rounded

    def __init__(self, kv: KVFormat) -> None:
        super().__init__()
        self.kv = kv
        self._sides: tuple[_Side, _Side] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        keys = _Side(self.kv, key_states[:, :, :0], along_tokens=not self.kv.by_token)
        self._sides = keys, _Side(self.kv, value_states[:, :, :0], along_tokens=False)
        self.is_initialized = True
        self._show()

    def _show(self) -> None:
        assert self._sides is not None
        self.keys, self.values = (side.recent for side in self._sides)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends states [batch, heads, new tokens, width]; all keys and values, decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._sides is not None
        keys, values = self._sides[0].append(key_states), self._sides[1].append(value_states)
        self._show()
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self._sides is None else self._sides[0].tokens

    @property
    def stored_tokens(self) -> int:
        """Tokens that are held quantized."""
        return 0 if self._sides is None else self._sides[0].stored

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held now."""
        return 0 if self._sides is None else sum(side.nbytes for side in self._sides)

    def reset(self) -> None:
        self._sides = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, given as a negative number. Of a group that is cut, the rest comes back rounded."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove and self._sides is not None:
            for side in self._sides:
                side.crop(max(0, side.tokens + tokens_to_remove))
            self._show()

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change` to every tensor held; all have the batch first."""
        if self._sides is not None:
            for side in self._sides:
                side.each(change)
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda held: held[indices.to(held.device), ...])

    def offload(self) -> None:
        self._each(lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized and self.keys.device != self.device:
            self._each(lambda held: held.to(self.device, non_blocking=True))


class _Side:
    """Keys or values of one layer: `first` and `recent` [batch, heads, tokens, width], and `stored` tokens between."""

    def __init__(self, kv: KVFormat, empty: Tensor, *, along_tokens: bool) -> None:
        self.kv, self.along_tokens = kv, along_tokens
        self.first = self.recent = empty
        self.stored = 0
        self._width = empty.shape[3]
        self._orders = kv.orders(self._width)
        self._format = kv.format(kv.group if along_tokens else self._width)
        self._held: dict[str, Tensor] = {}  # [batch, heads, width or tokens, of such a row]

    @property
    def tokens(self) -> int:
        return self.first.shape[2] + self.stored + self.recent.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(held.numel() * held.element_size() for held in (self.first, self.recent, *self._held.values()))

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.first, self.recent = change(self.first), change(self.recent)
        self._held = {name: change(held) for name, held in self._held.items()}

    def append(self, states: Tensor) -> Tensor:
        """All states, the stored ones decoded, `states` behind them as they are."""
        recent = torch.cat([self.recent, states], 2)
        lacking = self.kv.first - self.first.shape[2]
        if lacking > 0:  # then nothing is stored yet
            self.first = torch.cat([self.first, recent[:, :, :lacking]], 2)
            recent = recent[:, :, lacking:]
        whole = torch.cat([self.first, *self._decoded(), recent], 2)
        ripe = max(0, recent.shape[2] - self.kv.recent) // self.kv.group * self.kv.group
        if ripe:
            self._store(recent[:, :, :ripe])
            recent = recent[:, :, ripe:].clone()  # a view would keep what was stored
        self.recent = recent
        return whole

    def _store(self, states: Tensor) -> None:
        """Quantizes states [batch, heads, tokens, width] of whole groups of tokens behind what is stored."""
        if self._orders:
            states = hadamard.transform(states, self._orders)
        rows = states.transpose(2, 3) if self.along_tokens else states
        quantized = self._format.quantize(rows.reshape(-1, rows.shape[3]).float(), "states of the key-value cache")
        for name, part in quantized.to_state().items():
            part = part.view(*rows.shape[:3], -1)
            held = self._held.get(name)
            self._held[name] = part if held is None else torch.cat([held, part], 3 if self.along_tokens else 2)
        self.stored += states.shape[2]

    def _decoded(self) -> list[Tensor]:
        """[states [batch, heads, tokens, width]], or nothing where nothing is stored."""
        if not self.stored:
            return []
        outer = self._held["codes"].shape[:3]
        shape = outer.numel(), self.stored if self.along_tokens else self._width
        state = {name: held.reshape(shape[0], -1) for name, held in self._held.items()}
        found = Quantized.from_state(self._format, shape, state).dequantize().view(*outer, shape[1])
        if self.along_tokens:
            found = found.transpose(2, 3)
        if self._orders:
            found = hadamard.transform(found, self._orders, inverse=True)
        return [found.to(self.recent.dtype)]

    def crop(self, tokens: int) -> None:
        """Keeps the first `tokens`."""
        before = self.first.shape[2] + self.stored
        if tokens >= before:
            self.recent = self.recent[:, :, : tokens - before]
            return
        kept = max(0, tokens - self.first.shape[2])
        whole = kept // self.kv.group * self.kv.group
        decoded = self._decoded()
        self.recent = decoded[0][:, :, whole:kept].clone() if decoded else self.recent[:, :, :0]
        self.first = self.first[:, :, :tokens]
        share = {name: held.shape[3] * whole // self.stored for name, held in self._held.items() if self.along_tokens}
        self._held = {
            name: held[..., : share[name]].clone() if self.along_tokens else held[:, :, :whole].clone()
            for name, held in self._held.items()
        }
        self.stored = whole
