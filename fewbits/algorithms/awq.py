"""AWQ: activation-aware scales. Weights that meet large inputs are made larger before they are rounded.

    s_j = mean|x_j|^ratio,  normalised to sqrt(max s * min s) = 1;      W' = W diag(s),  x' = x / s

A weight multiplied by s > 1 keeps its rounding step (the group's largest weight mostly stays what it was), so its
error relative to the product shrinks by s; the price is paid by the other weights once the group's range grows.
The ratio is searched on a grid from 0 (nothing) to 1, on the layer's output error of rounding to nearest,

    sum over the linears that read x of  tr(dW H dW^T),     dW = Q(W s)/s - W

so the result is never worse than rounding there, by that measure. The scales cost no bits: they go into the norm, v
or up before the linear (channels.py).

Compared with the paper: the loss is that of the linears themselves, exactly, from the Hessian, where the authors run
the sub-block for each ratio; o_proj is scaled under grouped-query attention too; clipping is left to the method that
makes the codes.
Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Block, Transformed, need_hessian, proxy_loss
from fewbits.algorithms.channels import Scalable, row_parameters, scalables
from fewbits.core.errors import BadInput
from fewbits.formats import Format

_SMALLEST = 1e-4  # of a scale before it is normalised


@dataclass(frozen=True, kw_only=True)
class AWQ:
    """Searches the ratio for every group of linears. steps: ratios tried, 0 included."""

    role: ClassVar[str] = "transform"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian", "mean_abs"})

    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"steps {self.steps}; at least 1 ratio must be tried")

    def apply(self, block: Block) -> Transformed:
        """Scales the block's channels in place where it lowers the loss."""
        changed: set[str] = set()
        places = list(scalables(block))
        for place in places:
            s = self.best(place, block.format_of(place.stages[0].refs[0]), block.name)
            if s is not None:
                changed |= place.scale(s)
        notes = {}
        if not places:
            first = block.stages[0].refs[0].name
            notes[first] = ["awq: no table says what feeds the linears of this family; nothing was scaled"]
        return Transformed(changed=frozenset(changed), notes=notes)

    def best(self, place: Scalable, format: Format, name: str) -> Tensor | None:
        """The scales s [in] of the least loss; None where none is better than no scales."""
        seen = [stage for stage in place.stages if stage.inputs.tokens]
        if not seen:
            return None
        active = sum((stage.inputs.mean_abs * stage.inputs.tokens for stage in seen), torch.zeros(()))
        active = place.tie(active / sum(stage.inputs.tokens for stage in seen)).float()
        if not bool((active > 0).any()):
            return None
        weights = [row_parameters([ref.weight for ref in stage.refs]) for stage in seen]
        hessians = [need_hessian(stage.inputs, "awq", name).float() for stage in seen]
        best: tuple[float, Tensor | None] = (self._loss(weights, hessians, None, format), None)
        for step in range(1, self.steps):
            s = scales(active, step / self.steps)
            try:
                loss = self._loss(weights, hessians, s, format)
            except BadInput:  # scaled so, the weights have scales that the format cannot store
                continue
            if loss < best[0]:
                best = loss, s
        return best[1]

    @staticmethod
    def _loss(weights: list[Tensor], hessians: list[Tensor], s: Tensor | None, format: Format) -> float:
        total = 0.0
        for weight, hessian in zip(weights, hessians, strict=True):
            scaled = weight if s is None else weight * s
            delta = scaled - format.quantize(scaled).dequantize()
            total += float(proxy_loss(delta if s is None else delta / s, hessian).sum())
        return total


def scales(active: Tensor, ratio: float) -> Tensor:
    """s [in] for mean magnitudes `active` [in], not all 0: positive, the geometric middle of its ends at 1.

    A channel that was always zero counts as an average one: other text may reach it, and with the least scale of all
    its weights would be rounded away.
    """
    active = torch.where(active > 0, active, active.mean())
    s = active.pow(ratio).clamp(min=_SMALLEST)
    return s / (s.max() * s.min()).sqrt()
