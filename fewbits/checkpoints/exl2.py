"""EXL2 checkpoints of exllamav2 (quant_method "exl2"): read, decoded to float16.

    q_weight     int32 [words, out]      rows of codes, least significant first, along the input; bits by group
    q_groups     int16 [2 * G]           per group: bits, first row of words
    q_scale      int32 [G, out/8]        4-bit codes of the scales, least significant first
    q_scale_max  float16 [G]
    q_invperm    int16 or int32 [in]     where input channel i lies among the rows

    scale = (q_scale + 1)**2 * (q_scale_max / 256)
    value = (code - 2**(bits-1)) * scale, rows in the order of q_invperm

One matrix mixes 2 to 8 bits, which no format here does. Arithmetic is that of the CUDA kernels: the square, the scale
and the value are each rounded to float16. There is nothing to run those kernels on where the tests run: the layout is
checked against their source (cuda/q_matrix.cu, cuda/quant/qdq_util.cuh, cuda/pack_tensor.cu) and not against them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Codec, Dense, Entry, entries_with, tensor_named
from fewbits.checkpoints.words import from_words
from fewbits.core.errors import BadInput
from fewbits.formats import bits as packing

_PARTS = ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm", "q_perm", "q_group_map")
_WIDTHS = (2, 3, 4, 5, 6, 8)


class EXL2(Codec):
    holds = "2 to 8 bits mixed in one matrix, decoded to float16; loads in exllamav2, TabbyAPI"

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == "exl2")

    def entries(self, source: Source) -> dict[str, Entry]:
        return entries_with(source, "q_weight", _PARTS)

    def read(self, source: Source, module: str, entry: Entry) -> Dense:
        words = tensor_named(source, f"{module}.q_weight", 2, torch.int32)
        packed = tensor_named(source, f"{module}.q_scale", 2, torch.int32)
        most = tensor_named(source, f"{module}.q_scale_max", 1, torch.float16)
        order = tensor_named(source, f"{module}.q_invperm", 1, torch.int16, torch.int32).long()
        order = order & 0xFFFF if source.tensor(f"{module}.q_invperm").dtype == torch.int16 else order
        groups = _groups(tensor_named(source, f"{module}.q_groups", 1, torch.int16), words.shape[0])
        columns, rows = len(order), words.shape[1]
        if len(groups) != len(most) or packed.shape[0] != len(most):
            raise BadInput(f"{len(groups)} groups, {packed.shape[0]} rows of scales, {len(most)} largest ones")
        if not torch.equal(order.sort().values, torch.arange(columns)):
            raise BadInput(f"q_invperm is no permutation of {columns}")
        square = (packing.unpack(from_words(packed, 4, rows), 4, rows).int() + 1).square().half()
        scale = square * (most / 256)[:, None]
        value = torch.cat(
            [_group(words[first:last], bits, scale[index]) for index, (bits, first, last) in enumerate(groups)]
        )
        if len(value) < columns:
            raise BadInput(f"q_weight holds {len(value)} input channels, q_invperm {columns}")
        return Dense(value=value[order].t().contiguous(), note="EXL2: decoded in float16, as its kernels do")


def _groups(pairs: Tensor, rows: int) -> list[tuple[int, int, int]]:
    """(bits, first row, row after the last) of every group."""
    listed = (pairs.int() & 0xFFFF).tolist()
    bits, starts = listed[0::2], [*listed[1::2], rows]
    if len(listed) % 2 or not bits or any(width not in _WIDTHS for width in bits) or starts[0] != 0:
        raise BadInput(f"q_groups: {listed[:8]} are no pairs of bits and first row")
    if any(
        a >= b or (b - a) % (width if width in (3, 5) else 1)
        for (a, b), width in zip(itertools.pairwise(starts), bits, strict=True)
    ):
        raise BadInput(f"q_groups: rows {starts[:8]} do not follow one another")
    return [(width, a, b) for width, (a, b) in zip(bits, itertools.pairwise(starts), strict=True)]


def _group(words: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Values [input channels, out] of one group, float16."""
    count = words.shape[0] * 32 // bits
    codes = packing.unpack(from_words(words.t().contiguous(), bits, count), bits, count)
    return (codes.t().half() - (1 << (bits - 1))) * scale


CODEC = EXL2()
