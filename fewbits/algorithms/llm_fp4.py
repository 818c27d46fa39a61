"""LLM-FP4: exponent bits and clipping of a weight searched on the output of its layer.

    for every row:   factor = argmin over a grid of   dW H dW^T,     dW = w - Q(w; factor * absmax)

An exponent bias that is a real number is a scale by another name (formats/minifloat.py), so the paper's search over
biases is one over how much of a row's range is covered, by the error of what the layer puts out. H is that of the
inputs as the layer receives them, rounded ones where activations are quantized. A scale per group is judged by its own
columns. Where the format leaves the exponent bits open (`fp4_fit-channel`), each is tried and the best for the whole
layer taken. The other half of the method, the
pre-shifted exponents of the activations, is a step of its own, `preshift`, which comes along.

Compared with the paper. Its candidates are multiples of the *bias*, which are all the same where that is 0 (E2M1: a
row whose absmax is 12) and run the other way where it is negative; here they are multiples of the range, so that a
row searched in other units gives the same codes. 1 is always among them: never worse than absmax. The grid goes up to
1.2, for a largest value may be rounded down to spare the others. One round instead of three, since the activations'
half is settled before.
Source: Liu et al. 2023, "LLM-FP4: 4-bit Floating-Point Quantized Transformers", arXiv 2310.16836.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Solved, need_hessian, proxy_loss, revived
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput
from fewbits.formats import Format, Quantized


@dataclass(frozen=True, kw_only=True)
class LLMFP4:
    """Searches the range of each scale among `steps` multiples of its absmax from `low` to `high`, and 1."""

    role: ClassVar[str] = "weights"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})
    brings: ClassVar[tuple[str, ...]] = ("preshift",)

    steps: int = 16
    low: float = 0.4
    high: float = 1.2

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.low < self.high < float("inf"):
            raise BadInput(f"{self}: needs steps >= 1 and 0 < low < high")

    def solve(self, weight: Tensor, format: Format, inputs: Inputs, name: str) -> Solved:
        """Codes for `weight` [out, in] given the Hessian of `inputs`."""
        seen = need_hessian(inputs, "llm_fp4", name).float()
        hessian = revived(seen)
        format.check(weight, name)
        weight = weight.float()
        factors = [*self.factors(), *format.wider]
        choices = list(format.choices(weight, hessian.diagonal()))
        coarse = factors[::3] if len(choices) > 1 else []
        chosen = min(choices, key=lambda made: float(self._search(weight, made, hessian, coarse)[1].sum()))
        quantized, loss = self._search(weight, chosen, hessian, factors)
        notes = [f"{chosen.grid.name} was best"] if len(choices) > 1 else []
        rounded = format.quantize(weight, name)
        nearest = proxy_loss(weight - rounded.dequantize(), hessian)
        if nearest.sum() < loss.sum():  # a format may choose its scales better than a multiple of the range does
            quantized, notes = rounded, ["round-to-nearest was better and was kept"]
        loss, rtn_loss = (proxy_loss(weight - found.dequantize(), seen) for found in (quantized, rounded))
        return Solved(
            quantized=quantized, notes=notes, loss=loss, rtn_loss=rtn_loss, zero_loss=proxy_loss(weight, seen)
        )

    def factors(self) -> list[float]:
        """Multiples of the range to try besides 1."""
        return [factor for factor in torch.linspace(self.low, self.high, self.steps).tolist() if factor != 1]

    def _search(
        self, weight: Tensor, format: Format, hessian: Tensor, factors: list[float]
    ) -> tuple[Quantized, Tensor]:
        """The codes of the best of 1 and `factors` for each scale, and the loss of each row [out]."""
        low, high = format.ranges(weight)
        ones = best = torch.ones_like(low)
        error = self._error(weight, format, low, high)
        plain = proxy_loss(error, hessian)
        least = _by_scale(error, hessian, format, low)
        for factor in factors:
            error = self._error(weight, format, low * factor, high * factor)
            loss = _by_scale(error, hessian, format, low)
            best = torch.where(loss < least, factor, best)
            least = torch.minimum(loss, least)
        loss = proxy_loss(self._error(weight, format, low * best, high * best), hessian)
        # Groups were judged each alone; together a row of them may still have lost.
        best = torch.where(_pooled(loss, low) > _pooled(plain, low), ones, best)
        found = format.quantize_with(weight, *format.params_from_range(low * best, high * best))
        return found, proxy_loss(weight - found.dequantize(), hessian)

    @staticmethod
    def _error(weight: Tensor, format: Format, low: Tensor, high: Tensor) -> Tensor:
        scale, zero = format.params_from_range(low, high)
        if format.nested:  # scales that share something are judged as they will be stored
            scale, zero, _ = format.settle(scale, zero)
        error = torch.empty_like(weight)
        for rows, row_scale, row_zero in format.row_chunks((weight.shape[0], weight.shape[1]), scale, zero):
            error[rows] = weight[rows] - format.snap(weight[rows], row_scale, row_zero)
        return error


def _by_scale(error: Tensor, hessian: Tensor, format: Format, like: Tensor) -> Tensor:
    """What each scale is judged by, in the shape of the scales `like`: the loss of its group of columns, of its row, or
    of all rows where they share scales."""
    if format.scaling.block != "group":
        return _pooled(proxy_loss(error, hessian), like).expand_as(like)
    width, parts = format.scaling.width(error.shape[1]), []
    for start in range(0, error.shape[1], width):
        columns = slice(start, start + width)
        parts.append(proxy_loss(error[:, columns], hessian[columns, columns]))
    return torch.stack(parts, dim=1)


def _pooled(loss: Tensor, like: Tensor) -> Tensor:
    """Losses of rows [out] for rows of scales, [rows, 1]."""
    return loss[:, None] if len(like) == len(loss) else loss.sum().expand(len(like), 1)
