"""Range search: shrink each block's range where clipping a few large weights pays for a finer step.

For every block, candidates p in linspace(1, 1 - max_shrink, steps), and what the format names besides (four-over-six:
1.5, its largest weight on 4), scale its [min, max]; the one with the smallest
sum_j importance_j * |w_j - snap(w_j)|^norm  is kept. With norm 2.4 and no importance this is GPTQ's `mse` option; with
importance = diag(H) the error counts where inputs are large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats import Format


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """Options of the search; `params` runs it."""

    steps: int = 20
    max_shrink: float = 0.4
    norm: float = 2.4

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.max_shrink < 1 or self.norm <= 0:
            raise BadInput(f"{self}: needs steps >= 1, 0 <= max_shrink < 1 and norm > 0")

    def params(self, weight: Tensor, format: Format, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero per block of `weight` [out, in]; `importance` [in], non-negative, weighs columns."""
        blocks = format.blocks(weight)
        weights = None
        if importance is not None:
            weights = format.blocks(importance[None].to(blocks.dtype).expand_as(weight))
        low, high = torch.aminmax(blocks, dim=-1)
        factors = [*torch.linspace(1, 1 - self.max_shrink, self.steps + 1).tolist(), *format.wider]
        low, high, _ = best_factor(blocks, (low, high), factors, format, weights, self.norm)
        return format.params_from_range(low, high)


def best_factor(
    blocks: Tensor,
    range: tuple[Tensor, Tensor],
    factors: Sequence[float],
    format: Format,
    weights: Tensor | None = None,
    norm: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `range` (low, high) times each of `factors` the one of least error per block, the first on a tie.

    blocks: [..., n]; weights: how much each value counts, broadcasting.  Returns low, high and the error.
    """
    low, high = range
    best_low, best_high = low * factors[0], high * factors[0]
    best_loss = _loss(blocks, format, best_low, best_high, weights, norm)
    for factor in factors[1:]:
        tried_low, tried_high = low * factor, high * factor
        loss = _loss(blocks, format, tried_low, tried_high, weights, norm)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_low, best_high = torch.where(better, tried_low, best_low), torch.where(better, tried_high, best_high)
    return best_low, best_high, best_loss


def _loss(blocks: Tensor, format: Format, low: Tensor, high: Tensor, weights: Tensor | None, norm: float) -> Tensor:
    error = range_error(blocks, format, low, high)
    error = error.square_() if norm == 2 else error.pow_(norm)
    return error.sum(-1) if weights is None else (error * weights).sum(-1)


def range_error(blocks: Tensor, format: Format, low: Tensor, high: Tensor) -> Tensor:
    """|x - q(x)| of every value when each block covers [low, high]."""
    scale, zero = format.params_from_range(low, high)
    return (blocks - format.snap(blocks, scale[..., None], None if zero is None else zero[..., None])).abs_()
