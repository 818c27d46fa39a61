"""Refinement: codes and scales that are there, improved in turn on the output error itself.

    loss = tr(dW H dW^T),   dW = W - Q,   Q = s_g (l - z)  in group g

*Scales.* Given the codes, the loss is quadratic in the scales of a row: with u_g the row's levels (l - z) inside
group g and zero elsewhere,

    (u_g H u_g'^T) s = (u_g H w^T)        a system as large as a row has groups

GPTQ chose its scales before it knew the codes; this is what they should have been.

*Codes.* Given the scales, one column at a time: the best real value of q_j with all others fixed is
q_j + (dW H)_j / H_jj, and its nearest level can only lower the loss. GPTQ visits each column once and never comes
back; coordinate descent does.

*Drift.* Where GPTAQ collected the drift C of the inputs, both steps aim at W (I + strength C H^-1) in place of W,
which completes the square of GPTAQ's objective.

Both steps lower the loss or leave it, and they alternate `rounds` times. A row whose loss would rise once its scale
is rounded to what is stored keeps what it had. The Hessian is damped as GPTQ's: directions that calibration hardly
saw must not decide codes.

Sources: QuantEase (Behdin et al. 2023, arXiv 2309.01885) for coordinate descent on layer outputs; the scales are
ordinary least squares.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Solved, damped_hessian, drifted, need_hessian, proxy_loss
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput
from fewbits.formats import Format, Quantized

_BLOCK = 64  # columns between two updates of what lies behind them
_ROWS = 1024  # whose systems are solved at once


@dataclass(frozen=True, kw_only=True)
class Refine:
    """Alternates scales and codes. rounds: how often; sweeps: passes over the columns in each; damping, strength: as
    GPTQ's and GPTAQ's."""

    role: ClassVar[str] = "refine"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    rounds: int = 3
    sweeps: int = 1
    scales: bool = True
    damping: float = 0.01
    strength: float = 0.25

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.sweeps < 0 or self.damping < 0:
            raise BadInput(f"{self}: needs rounds >= 1, sweeps >= 0 and damping >= 0")

    def refine(self, solved: Solved, weight: Tensor, inputs: Inputs, name: str) -> Solved:
        """`solved` with a loss that is lower or the same, row by row where rows are independent."""
        if not bool(need_hessian(inputs, "refine", name).any()):
            return solved  # no input came by: there is nothing to be closer to
        assert inputs.hessian is not None
        hessian = damped_hessian(inputs.hessian, self.damping)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        target = drifted(weight, inputs, hessian, self.strength)
        damped = hessian.to(weight.dtype)
        found = solved.quantized
        for _ in range(self.rounds):
            before = found
            if self.scales:
                found = better(found, refit_scales(found, target, damped), target, damped)
            for _ in range(self.sweeps):
                found = better(found, descend(found, target, damped), target, damped)
            if torch.equal(found.codes, before.codes) and torch.equal(found.scale, before.scale):
                break
        rtn = solved.rtn_loss
        if rtn is None:
            rtn = proxy_loss(weight - found.format.quantize(weight, name).dequantize(weight.dtype), inputs.hessian)
        return dataclasses.replace(
            solved,
            quantized=found,
            loss=proxy_loss(weight - found.dequantize(weight.dtype), inputs.hessian),
            rtn_loss=rtn,
            zero_loss=proxy_loss(weight, inputs.hessian),
        )


def better(old: Quantized, new: Quantized, weight: Tensor, hessian: Tensor) -> Quantized:
    """Row by row the one of lower loss; the whole of either where rows share a scale."""
    before, after = (proxy_loss(weight - found.dequantize(weight.dtype), hessian) for found in (old, new))
    if not old.format.rowwise:
        return new if float(after.sum()) < float(before.sum()) else old
    win = (after < before)[:, None]
    zero = None if old.zero is None or new.zero is None else torch.where(win, new.zero, old.zero)
    codes = torch.where(win, new.codes, old.codes)
    scale = torch.where(win, new.scale, old.scale)
    return old.format.quantized(codes, scale, zero, {})


def refit_scales(quantized: Quantized, weight: Tensor, hessian: Tensor) -> Quantized:
    """The same codes with the scales of the least loss, as far as they can be stored."""
    format, shape = quantized.format, quantized.shape
    if format.scaling.minimum or format.parameter_shape(shape)[0] != shape[0]:
        return quantized  # real minima move with the scale, and tiles share one among rows: left as they are
    one = torch.ones_like(quantized.scale, dtype=weight.dtype)
    levels = format.decode(quantized.codes, *format.expand(one, quantized.zero, shape), weight.dtype)
    found = torch.cat(
        [
            _least_squares(levels[rows], weight[rows], hessian, format)
            for rows in torch.arange(shape[0], device=levels.device).split(_ROWS)
        ]
    )
    # A group whose levels are all zero says nothing of its scale: it keeps the one it has.
    usable = torch.isfinite(found) & (found > 0)
    scale = torch.where(usable, found.float(), quantized.scale.float())
    scale = format.scaling.store.round(scale, format.grid.top)
    scale, zero, stored = format.settle(scale, quantized.zero)
    return format.quantized(quantized.codes, scale, zero, stored)


def _least_squares(levels: Tensor, weight: Tensor, hessian: Tensor, format: Format) -> Tensor:
    """The scales [rows, groups] of the least loss for `levels` [rows, in]; NaN or 0 where they do not matter."""
    rows, columns = levels.shape
    size, groups = format.scaling.width(columns), format.scaling.groups(columns)
    group = torch.arange(columns, device=levels.device) // size

    def by_group(product: Tensor) -> Tensor:
        return product.new_zeros(rows, groups).index_add_(1, group, product)

    system = levels.new_empty(rows, groups, groups)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        system[:, g] = by_group((levels[:, part] @ hessian[part]) * levels)
    target = by_group((weight @ hessian) * levels)
    system = system.double()
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += torch.where(diagonal <= 0, torch.ones_like(diagonal), 1e-7 * diagonal)
    return torch.linalg.solve(system, target.double())


def descend(quantized: Quantized, weight: Tensor, hessian: Tensor) -> Quantized:
    """One pass of coordinate descent over the columns, scales as they are."""
    format, shape = quantized.format, quantized.shape
    scale, zero = format.expand(quantized.scale, quantized.zero, shape)
    # Transposed: a column of W is a contiguous row.
    scale_t = scale.to(weight.dtype).expand(shape).t().contiguous()
    zero_t = None if zero is None else zero.to(weight.dtype).expand(shape).t().contiguous()
    codes = quantized.codes.t().contiguous()
    values = format.decode(codes, scale_t, zero_t, weight.dtype)
    error = weight.t() - values
    gradient = hessian @ error  # (dW H)^T
    diagonal = hessian.diagonal()
    columns = len(codes)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        moved = torch.zeros_like(values[start:stop])
        local = gradient[start:stop]
        for i in range(start, stop):
            zero_i = None if zero_t is None else zero_t[i]
            wanted = values[i] + local[i - start] / diagonal[i]
            codes[i] = format.encode(wanted, scale_t[i], zero_i)
            step = values[i] - format.decode(codes[i], scale_t[i], zero_i, weight.dtype)
            moved[i - start] = step
            local.addr_(hessian[start:stop, i], step)
        gradient[:start].addmm_(hessian[:start, start:stop], moved)
        gradient[stop:].addmm_(hessian[stop:, start:stop], moved)
    return format.quantized(codes.t().contiguous(), quantized.scale, quantized.zero, quantized.stored)
