"""Between zero points and minima: code * scale - minimum is (code - zero) * scale where minimum = zero * scale.

Some files hold minima, or zero points that are real numbers (MLX, HQQ); others take whole zero points alone (GPTQ, AWQ,
compressed-tensors). With scales of 16 bits the products with codes and with whole zero points are exact in float32, so
one form can stand for the other and no value moves.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fewbits.checkpoints.codecs import Stored
from fewbits.formats import bits as packing
from fewbits.formats import parse_format


def minimum_of(stored: Stored) -> Tensor:
    """What is subtracted from code * scale, float32: exact, being a few bits times at most 16."""
    scale, state, bits = stored.state["scale"].float(), stored.state, stored.format.bits
    if "minimum" in state:
        return state["minimum"].float()
    if "zero" in state:
        return packing.unpack(state["zero"], bits, scale.shape[1]).float() * scale
    return (1 << (bits - 1)) * scale


def with_zeros(stored: Stored) -> Stored:
    """`stored` with zero points, or symmetric, where its minima are whole multiples of the scales."""
    scale, minimum, bits = stored.state["scale"].float(), stored.state["minimum"].float(), stored.format.bits
    zero = torch.round(minimum / scale).clamp(0, (1 << bits) - 1).nan_to_num(0)
    # A scale of 16 bits makes all products with codes exact, so that both forms give the same float32.
    short = next(
        (dtype for dtype in (torch.float16, torch.bfloat16) if torch.equal(scale.to(dtype).float(), scale)), None
    )
    if short is None or not torch.equal(zero * scale, minimum):
        return stored
    short = stored.state["scale"].dtype if stored.state["scale"].dtype.itemsize == 2 else short
    state = {"codes": stored.state["codes"], "scale": scale.to(short)}
    symmetric = bool((zero == 1 << (bits - 1)).all())
    if not symmetric:
        state["zero"] = packing.pack(zero.to(torch.uint8), bits)
    name = stored.format.name.replace("-min", "" if symmetric else "-asym")
    format = parse_format(name).with_scale_dtype(short)
    return dataclasses.replace(stored, format=format, state=state)
