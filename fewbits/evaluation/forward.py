"""A causal language model as a function from token ids to logits, a bounded slab of rows at a time.

The logits of one 2048-token window over a vocabulary of 128k take 1 GiB in float32; the hidden states they
are computed from take a few MiB. In most families the logits are just `head(hidden)`, so the body runs over
the whole window and the head over slabs of rows. Some families scale or cap the logits after the head
(Gemma 2, Cohere, Granite), and then the model's own forward is used whole. Comparing the two on a probe would
not tell: a cap c tanh(x / c) is the identity for small logits. So the head's output is swapped for a ramp of
large values during one short forward; what comes out must be that ramp, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fewbits.core.errors import BadInput, FewbitsError
from fewbits.formats.kv import KVFormat

_SLAB_BYTES = 64 << 20
_PROBE_TOKENS = 8


class Forward:
    """Logits of `model` by slabs. The model must be in eval mode.

    vocabulary: width of the logits.
    separable: whether the logits are `head(hidden)`.
    kv: keys and values are stored so (formats/kv.py). A forward pass sees what it computes itself unrounded, so the
    text is then read a group of tokens at a time, each behind the stored ones: as decoding does, in fewer passes.
    """

    def __init__(self, model: nn.Module, name: str = "the model", kv: KVFormat | None = None) -> None:
        self.model, self.name, self.kv = model, name, kv
        self.device = next(model.parameters()).device
        self.head: nn.Module | None = _attribute(model, "get_output_embeddings")
        body = getattr(model, "base_model", None)
        self.body = body if isinstance(body, nn.Module) and body is not model else None
        self.vocabulary, self.separable = self._probe()

    def _whole(self, ids: torch.Tensor) -> torch.Tensor:
        return self._run(self.model, ids, "logits")

    def _run(self, module: nn.Module, ids: torch.Tensor, output: str) -> torch.Tensor:
        ids = ids.unsqueeze(0).to(self.device)
        if self.kv is None:
            return getattr(module(input_ids=ids, use_cache=False), output)[0]
        from fewbits.nn.kv_cache import QuantizedKVCache

        cache = QuantizedKVCache(self.model.config, self.kv)
        pieces = ids.split(self.kv.group, dim=1)
        found = [module(input_ids=piece, past_key_values=cache, use_cache=True) for piece in pieces]
        return torch.cat([getattr(piece, output)[0] for piece in found])

    def _probe(self) -> tuple[int, bool]:
        """(width of the logits, whether they are `head(hidden)`)."""
        ids = torch.zeros(_PROBE_TOKENS, dtype=torch.int64)
        if self.head is None or self.body is None:
            return int(self._whole(ids).shape[-1]), False
        given: list[torch.Tensor] = []
        ramps: list[torch.Tensor] = []

        def swap(head: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            ramp = torch.linspace(-200, 200, output.shape[-1]).to(output).expand_as(output)
            given.append(arguments[0])
            ramps.append(ramp)
            return ramp

        hook = self.head.register_forward_hook(swap)
        try:
            logits = self._whole(ids)
        finally:
            hook.remove()
        if len(given) != 1:
            return int(logits.shape[-1]), False
        untouched = logits.shape == ramps[0].shape[1:] and torch.equal(logits, ramps[0][0].to(logits))
        states = self.hidden(ids)
        fed = given[0].shape[1:] == states.shape and torch.allclose(given[0][0], states, rtol=1e-3, atol=1e-5)
        return int(logits.shape[-1]), untouched and fed

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head is given: ids [L] -> [L, hidden]. For separable models only."""
        assert self.body is not None
        return self._run(self.body, ids, "last_hidden_state")

    def slabs(self, ids: torch.Tensor, hidden: torch.Tensor | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, logits float32 [rows, vocabulary]) over the window `ids` [L], in order.

        hidden: the result of `hidden(ids)`, if the caller has it. Raises `FewbitsError` at NaN or infinity.
        """
        if self.separable:
            assert self.head is not None
            states = self.hidden(ids) if hidden is None else hidden
            pieces = ((rows, self.head(states[rows])) for rows in slab_rows(len(ids), self.vocabulary))
        else:
            whole = self._whole(ids)
            pieces = ((rows, whole[rows]) for rows in slab_rows(len(ids), self.vocabulary))
        for rows, logits in pieces:
            values = logits.float()
            if not bool(torch.isfinite(values).all()):
                bad = rows.start + int((~torch.isfinite(values).all(dim=-1)).nonzero()[0, 0])
                raise FewbitsError(f"{self.name} gives NaN or infinite logits at position {bad} of a window")
            yield rows, values


def _attribute(model: nn.Module, getter: str) -> nn.Module | None:
    found = getattr(model, getter, None)
    return found() if callable(found) else None


def slab_rows(length: int, vocabulary: int) -> Iterator[slice]:
    """Slices that cover `length` rows of float32 logits, each of at most 64 MiB (one row at least)."""
    rows = max(1, _SLAB_BYTES // (4 * vocabulary))
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


def check_ids(ids: torch.Tensor, vocabulary: int, name: str) -> None:
    """`BadInput` when the tokenizer made an id that the model has no embedding for."""
    if int(ids.max()) >= vocabulary:
        raise BadInput(
            f"the tokenizer makes token {int(ids.max())}, but {name} has a vocabulary of {vocabulary}: "
            "the tokenizer belongs to another model"
        )
