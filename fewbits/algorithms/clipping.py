"""Range search: shrink each block's range where clipping a few large weights pays for a finer step.

For every block, candidates p in linspace(1, 1 - max_shrink, steps) scale its [min, max]; the one with the
smallest  sum_j importance_j * |w_j - snap(w_j)|^norm  is kept. With norm 2.4 and no importance this is
GPTQ's `mse` option; with importance = diag(H) the error counts where inputs are large.
"""

from __future__ import annotations

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
        best_scale, best_zero = format.params_from_range(low, high)
        best_loss = self._loss(blocks, format, best_scale, best_zero, weights)
        for factor in torch.linspace(1, 1 - self.max_shrink, self.steps + 1).tolist()[1:]:
            scale, zero = format.params_from_range(low * factor, high * factor)
            loss = self._loss(blocks, format, scale, zero, weights)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
            if zero is not None and best_zero is not None:
                best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def _loss(
        self, blocks: Tensor, format: Format, scale: Tensor, zero: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        snapped = format.snap(blocks, scale[..., None], None if zero is None else zero[..., None])
        error = (blocks - snapped).abs_()
        error = error.square_() if self.norm == 2 else error.pow_(self.norm)
        return error.sum(-1) if weights is None else (error * weights).sum(-1)
