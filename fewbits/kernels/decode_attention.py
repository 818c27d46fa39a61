"""Attention of one new token over a quantized cache in tiles (kv_tiles.py): the operator, and which kernel runs it.

cuda_attention.py where it can, on Hopper GPUs and later; triton_attention.py everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from fewbits.kernels import cuda_attention


@library.custom_op("fewbits::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor, keys: Tensor, key_params: Tensor, values: Tensor, value_params: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """q [batch, query heads, width] over the first lengths[b] tokens of a cache in tiles (kv_tiles.py) -> as q.

    lengths: int32 [batch], each from 1 to what the tiles hold; read on the device. Query heads are a multiple of the
    cache's heads, head h reading keys of head h // ratio.
    """
    _check(q, keys, lengths)
    q, lengths, held = q.contiguous(), lengths.contiguous(), (keys, key_params, values, value_params)
    if cuda_attention.refusal(q, *held) is None:
        return cuda_attention.launch(q, *held, lengths, scale)
    from fewbits.kernels import triton_attention  # Triton is not everywhere

    return triton_attention.launch(q, *held, lengths, scale)


@decode_attention.register_fake
def _(
    q: Tensor, keys: Tensor, key_params: Tensor, values: Tensor, value_params: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    _check(q, keys, lengths)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _check(q: Tensor, keys: Tensor, lengths: Tensor) -> None:
    torch._check(q.dim() == 3 and keys.dim() == 5, lambda: "q [batch, heads, width], keys in tiles")
    torch._check(q.shape[0] == keys.shape[0] == lengths.shape[0], lambda: "one batch")
    torch._check(q.shape[1] % keys.shape[1] == 0, lambda: f"{q.shape[1]} query heads on {keys.shape[1]} heads")
    torch._check(lengths.dtype == torch.int32, lambda: f"lengths are {lengths.dtype}; int32 is needed")
