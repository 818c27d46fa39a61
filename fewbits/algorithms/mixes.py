"""A linear of several formats, by any method: its parts are solved one after the other, under one Hessian.

Let S be the columns of a part and R all that are solved after it. Whatever is done in S, the columns of R will make up
for as much as they can. An error E in S costs, with the best answer in R,

    min over D of  tr([E D] H [E D]^T)  =  tr(E (H_SS - H_SR H_RR^-1 H_RS) E^T),      D = -E H_SR H_RR^-1

so the part is an ordinary problem under the Schur complement, and what follows aims at W_R + E H_SR H_RR^-1. For GPTQ
this is no approximation: the Cholesky factor of the inverse Schur complement is the leading block of that of H^-1, and
the columns are visited as in one sweep, each rounded to the format of its part. Where nothing was calibrated, parts are
solved as if alone. H is damped as GPTQ's; the methods damp what they are given once more.

Refinement goes over the parts again, each with the others as they are: with error D in the others, part S aims at
W_S + D H_RS H_SS^-1 under H_SS, which completes the square.

Which channels are dear: diag(H)_j ||W_:j||^2, what the outputs would lose with channel j; without a Hessian what the
weight alone says. The part that is rounded most coarsely goes first, while all others can still make up for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.algorithms.base import (
    Refinement,
    Solved,
    WeightMethod,
    damped_hessian,
    drifted,
    need_hessian,
    proxy_loss,
    revived,
)
from fewbits.calibration.stats import Inputs
from fewbits.formats.mix import Mix, Mixed, Weights, columns_of

_DAMPING = 0.01
_ROUNDS = 2  # of refinement over all parts


def solve(
    method: WeightMethod, refinements: Sequence[Refinement], weight: Tensor, format: Weights, inputs: Inputs, name: str
) -> Solved:
    """Codes for `weight` [out, in] by `method`, refined by `refinements`; in one format or in a mix of them."""
    if isinstance(format, Mix):
        return _Parts(method, weight, format, inputs, name).solved(refinements)
    found = method.solve(weight, format, inputs, name)
    for refinement in refinements:
        found = refinement.refine(found, weight, inputs, name)
    return found


class _Parts:
    """The parts of one weight on their way to codes. aim: what the outputs ask for, [out, in]; hessian: damped."""

    def __init__(self, method: WeightMethod, weight: Tensor, mix: Mix, inputs: Inputs, name: str) -> None:
        mix.check(weight, name)
        self.weight = weight if weight.dtype == torch.float64 else weight.float()
        self.method, self.mix, self.inputs, self.name = method, mix, inputs, name
        self.importance = None if inputs.hessian is None else revived(need_hessian(inputs, "a mix", name)).diagonal()
        self.places = mix.places(self.weight, self.importance)
        self.columns = columns_of(self.places, len(mix.formats))
        self.aim, self.hessian = self.weight, None
        if inputs.hessian is not None and bool(inputs.hessian.any()):
            self.hessian = damped_hessian(inputs.hessian, _DAMPING)
            self.aim = drifted(self.weight, inputs, self.hessian, getattr(method, "strength", 0.0))

    def solved(self, refinements: Sequence[Refinement]) -> Solved:
        found = self._swept()
        for refinement in refinements:
            found = self._refined(refinement, found)
        return self._judged(found)

    def _swept(self) -> list[Solved]:
        """Each part by the method, the coarsest first; what is still to come makes up for it."""
        found: dict[int, Solved] = {}
        aim = self.aim.clone()
        order = sorted(range(len(self.columns)), key=lambda part: (self.mix.formats[part].bits, -part))
        for place, part in enumerate(order):
            own = self.columns[part]
            later = [self.columns[other] for other in order[place + 1 :]]
            inputs, pull = self._inputs(own, torch.cat(later) if later else None)
            found[part] = self.method.solve(aim[:, own], self.mix.formats[part], inputs, self.name)
            if pull is not None:
                error = aim[:, own] - found[part].quantized.dequantize(aim.dtype)
                aim[:, torch.cat(later)] += error @ pull.to(aim.dtype)
        return [found[part] for part in range(len(self.columns))]

    def _inputs(self, own: Tensor, later: Tensor | None) -> tuple[Inputs, Tensor | None]:
        """What a part's method is told of its inputs, and H_SR H_RR^-1."""
        if self.hessian is None:
            hessian = None if self.inputs.hessian is None else self.inputs.hessian[own][:, own]
            return Inputs(hessian=hessian, tokens=self.inputs.tokens), None
        hessian, pull = self.hessian[own][:, own], None
        if later is not None:
            across = self.hessian[own][:, later]
            lower = torch.linalg.cholesky(self.hessian[later][:, later])
            pull = torch.cholesky_solve(across.t(), lower).t()
            hessian = hessian - pull @ across.t()
        return Inputs(hessian=hessian, tokens=self.inputs.tokens), pull

    def _refined(self, refinement: Refinement, found: Sequence[Solved]) -> list[Solved]:
        """The parts once more, each with the others as they are."""
        now = list(found)
        if self.hessian is None:
            return now
        for _ in range(_ROUNDS):
            for part, own in enumerate(self.columns):
                delta = self.aim - self._mixed(now).dequantize(self.aim.dtype)
                delta[:, own] = 0
                inputs = Inputs(hessian=self.hessian[own][:, own], tokens=self.inputs.tokens)
                shift = torch.linalg.solve(inputs.hessian, delta.double() @ self.hessian[:, own], left=False)
                aim = self.aim[:, own] + shift.to(self.aim.dtype)
                now[part] = refinement.refine(now[part], aim, inputs, self.name)
        return now

    def _mixed(self, parts: Sequence[Solved]) -> Mixed:
        quantized = tuple(part.quantized for part in parts)
        return Mixed(format=self.mix.of(quantized), places=self.places, parts=quantized)

    def _judged(self, parts: Sequence[Solved]) -> Solved:
        """The parts together, or rounded to nearest where that is better by the same objective."""
        found, notes = self._mixed(parts), list(dict.fromkeys(note for part in parts for note in part.notes))
        hessian = self.inputs.hessian
        if hessian is None:
            return Solved(quantized=found, notes=notes)
        nearest = self.mix.quantize(self.weight, self.name, self.importance)
        if self._objective(nearest) < self._objective(found):
            found, notes = nearest, [*notes, "round-to-nearest was better and was kept"]
        losses = [proxy_loss(self.weight - each.dequantize(self.weight.dtype), hessian) for each in (found, nearest)]
        zero_loss = proxy_loss(self.weight, hessian)
        return Solved(quantized=found, notes=notes, loss=losses[0], rtn_loss=losses[1], zero_loss=zero_loss)

    def _objective(self, mixed: Mixed) -> float:
        assert self.inputs.hessian is not None
        return float(proxy_loss(self.aim - mixed.dequantize(self.aim.dtype), self.inputs.hessian).sum())
