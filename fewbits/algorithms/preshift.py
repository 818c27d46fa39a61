"""Pre-shifted exponents: channels of the input brought to one size by powers of two, before they are rounded.

    k_j = clamp(round(log2(reference / max|x_j|)), 0, limit),     x'_j = 2^k_j x_j,     W'_j = 2^-k_j W_j

Activations are rounded with one scale a token (or a tensor), and the channels of a transformer differ by orders of
magnitude: a grid of 4 bits that reaches the largest has nothing left for the others. LLM-FP4 gives each channel an
exponent bias of its own. A bias that differs by an integer is a power of two, so it can be multiplied into the weights
once and divided out of whatever produces x (channels.py): no bits, no work, and not the least rounding, for powers of
two are exact. What is left for the grid is a float whose exponents begin 2^E - 1 octaves apart: `limit`.

The price is paid by the weights, whose rows become less even. So the reference is searched, half an octave at a time
from the largest channel down, on what is wanted: the squared error of the layer's output with inputs and weights both
rounded, over a sample of inputs,

    sum over the linears that read x of  ||X W^T - Q(X 2^k) Q(W 2^-k)^T||^2

and no shift at all is one of the candidates. Channels that were never active are not shifted.
Source: Liu et al. 2023, "LLM-FP4: 4-bit Floating-Point Quantized Transformers", arXiv 2310.16836.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Block, Transformed
from fewbits.algorithms.channels import RoundedLoss, Scalable, scalables
from fewbits.core.errors import BadInput
from fewbits.formats import Format


@dataclass(frozen=True, kw_only=True)
class PreShift:
    """Searches the shifts of every place. steps: references tried.  limit: of a shift; None for what the format of the
    activations says, 2^E - 1 (integers count as E2)."""

    role: ClassVar[str] = "transform"
    statistics: ClassVar[frozenset[str]] = frozenset({"rows"})

    steps: int = 8
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.limit is not None and self.limit < 1):
            raise BadInput(f"{self}: at least 1 reference is tried and a shift may reach at least 1")

    def apply(self, block: Block) -> Transformed:
        """Shifts the block's channels in place where it lowers the error."""
        first = block.stages[0].refs[0].name
        if block.activations is None:
            return Transformed(notes={first: ["preshift: inputs are not rounded; nothing was shifted"]})
        changed: set[str] = set()
        places = list(scalables(block))
        for place in places:
            k = self.best(place, block)
            if k is not None:
                changed |= place.scale(torch.exp2(-k))
        if not places:
            lines = ["preshift: no table says what feeds the linears of this family; nothing was shifted"]
            return Transformed(notes={first: lines})
        return Transformed(changed=frozenset(changed))

    def best(self, place: Scalable, block: Block) -> Tensor | None:
        """The shifts k [in] of the least error, whole numbers in float32; None where none is better than none."""
        assert block.activations is not None
        seen = [stage for stage in place.stages if stage.inputs.rows is not None and len(stage.inputs.rows)]
        if not seen:
            return None
        largest = torch.stack([stage.inputs.rows.abs().amax(0) for stage in seen if stage.inputs.rows is not None])
        reach = place.tie(largest.amax(0))
        limit = self.limit or shift_limit(block.activations)
        of = RoundedLoss(seen, block)
        best: tuple[float, Tensor | None] = (of(None), None)
        tried = [shifts(reach, step / 2, limit) for step in range(self.steps)]
        for k in tried:
            if bool(k.any()):
                loss = of(torch.exp2(-k))
                if loss < best[0]:
                    best = loss, k
        return best[1]


def shifts(reach: Tensor, octaves: float, limit: int) -> Tensor:
    """k [in] for channels that reach `reach` [in], with the reference that many octaves below the largest of them."""
    live = reach > 0
    if not bool(live.any()):
        return torch.zeros_like(reach)
    below = torch.log2(reach.max() / torch.where(live, reach, reach.max())) - octaves
    return torch.where(live, torch.round(below).clamp(0, limit), torch.zeros_like(reach))


def shift_limit(activations: Format) -> int:
    """2^E - 1 for a minifloat, 3 for others."""
    mantissa = getattr(activations.grid, "mantissa_bits", None)
    exponent = 2 if mantissa is None else activations.bits - 1 - int(mantissa)
    return (1 << exponent) - 1
