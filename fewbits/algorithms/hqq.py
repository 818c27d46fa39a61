"""HQQ: half-quadratic quantization. No data, a few passes over the weight, an error that forgives outliers.

    minimise  sum |W - Q|^p,  p = 0.7,     Q = level * s - m  in each block

An error in a large weight costs little more than one in a small weight, so the grid serves the many. Splitting the
error off as a variable of its own makes two steps of it, each in closed form, taken in turn with a growing beta:

    E = shrink(W - Q) = sign(r) * relu(|r| - |r|^(p-1) / beta),   r = W - Q        (what is left to outliers)
    s, m = least squares of  level * s - m  against  W - E                         (the grid that fits the rest)

The authors fit m alone and keep s at its min-max value; fitting both costs no more and gains more (at 2 bits and
heavy tails 0.71 of the error of min-max in place of 0.89). A format with a zero point or without any offset has its
scale fitted: moving an integer zero point by a whole step never helped. Each block keeps the best it has seen by the
error above, which includes where it began.

Errors are measured in units of the mean |W|, so that beta has no unit. Source: Badri and Shaji 2023, "Half-Quadratic
Quantization of Large Machine Learning Models", Mobius Labs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Solved
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput
from fewbits.formats import Format

_SMALLEST = 1e-12  # of an error: 0 to a negative power is infinite


@dataclass(frozen=True, kw_only=True)
class HQQ:
    """Half-quadratic search. norm: p above.  beta, growth: of the splitting, per iteration.  iterations: at most."""

    role: ClassVar[str] = "weights"
    statistics: ClassVar[frozenset[str]] = frozenset()

    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1 or self.beta <= 0 or self.growth < 1 or self.iterations < 1:
            raise BadInput(f"{self}: needs 0 < norm <= 1, beta > 0, growth >= 1 and iterations >= 1")

    def solve(self, weight: Tensor, format: Format, inputs: Inputs, name: str) -> Solved:
        """Codes of `weight` [out, in]; `inputs` are not looked at."""
        format.check(weight, name)
        format = format.fitted(weight)
        scale, zero = format.params(weight)
        if format.nested:
            return Solved(
                quantized=format.quantize_with(weight, scale, zero),
                notes=[f"hqq: the scales of {format.name} depend on each other: rounded to nearest"],
            )
        return Solved(quantized=format.quantize_with(weight, *self._search(weight.float(), format, scale, zero)))

    def _search(
        self, weight: Tensor, format: Format, scale: Tensor, zero: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        blocks, real = format.blocks(weight), _real(weight, format)
        unit = weight.abs().mean().clamp(min=_SMALLEST)
        best_scale, best_zero, beta = scale, zero, self.beta
        least = torch.full(scale.shape, torch.inf, device=weight.device)
        for _ in range(self.iterations + 1):
            rest = (blocks - self._value(blocks, format, scale, zero)) * real
            cost = (rest.abs() / unit).pow(self.norm).sum(-1)
            better = cost < least
            if not bool(better.any()):
                break
            least = torch.where(better, cost, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = None if zero is None or best_zero is None else torch.where(better, zero, best_zero)
            excess = self._shrink(rest / unit, beta) * unit
            scale, zero = self._fit(blocks - excess, blocks, real, format, scale, zero)
            beta *= self.growth
        return best_scale, best_zero

    @staticmethod
    def _value(blocks: Tensor, format: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
        return format.snap(blocks, scale[..., None], None if zero is None else zero[..., None])

    def _shrink(self, rest: Tensor, beta: float) -> Tensor:
        size = rest.abs()
        return rest.sign() * torch.relu(size - size.clamp(min=_SMALLEST).pow(self.norm - 1) / beta)

    @staticmethod
    def _fit(
        wanted: Tensor, blocks: Tensor, real: Tensor, format: Format, scale: Tensor, zero: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum that bring the levels chosen for `blocks` closest to `wanted`."""
        codes = format.encode(blocks, scale[..., None], None if zero is None else zero[..., None])
        level, count = format.grid.value(codes), real.expand(blocks.shape).sum(-1)
        if format.scaling.minimum:
            means = ((level * real).sum(-1) / count, (wanted * real).sum(-1) / count)
            level, wanted = level - means[0][..., None], wanted - means[1][..., None]
        elif zero is not None:
            level = level - zero[..., None].float()
        square = (level * level * real).sum(-1)
        fitted = (level * wanted * real).sum(-1) / square.clamp(min=_SMALLEST)
        usable = (square > 0) & (fitted > 0)
        rounded = format.scaling.store.round(torch.where(usable, fitted, scale.float()), format.grid.top)
        scale = torch.where(usable, rounded, scale)
        if zero is None or not format.scaling.minimum:
            return scale, zero
        return scale, (scale.float() * means[0] - means[1]).to(zero.dtype)


def _real(weight: Tensor, format: Format) -> Tensor:
    """1 for the values of a block, 0 for what pads a short last group; broadcasts against the blocks."""
    size, columns = format.scaling.group_size, weight.shape[1]
    if format.scaling.block != "group" or size is None or columns % size == 0:
        return weight.new_ones(1)
    groups = format.scaling.groups(columns)
    index = torch.arange(groups * size, device=weight.device).view(1, groups, size)
    return (index < columns).to(weight.dtype)
