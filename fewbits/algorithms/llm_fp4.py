"""LLM-FP4: exponent bits and clipping of a weight searched on the output of its layer.

    for every row:   factor = argmin over a grid of   tr(dW H dW^T),     dW = W - Q(W; factor * absmax)

An exponent bias that is a real number is a scale by another name (formats/minifloat.py), so the paper's search over
biases is one over how much of a row's range is covered, by the error of what the layer puts out. H is that of the
inputs as the layer receives them, rounded ones where activations are quantized. Where the format leaves the exponent
bits open (`fp4_fit-channel`), each is tried and the best for the whole layer taken. The other half of the method, the
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

from fewbits.algorithms.base import Solved, need_hessian, proxy_loss
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput
from fewbits.formats import Format, Quantized


@dataclass(frozen=True, kw_only=True)
class LLMFP4:
    """Searches the range of each row among `steps` multiples of its absmax from `low` to `high`, and 1."""

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
        hessian = need_hessian(inputs, "llm_fp4", name).float()
        format.check(weight, name)
        weight = weight.float()
        factors = self.factors()
        choices = list(format.choices(weight, hessian.diagonal()))
        coarse = factors[::3] if len(choices) > 1 else []
        chosen = min(choices, key=lambda made: float(self._search(weight, made, hessian, coarse)[1].sum()))
        quantized, loss = self._search(weight, chosen, hessian, factors)
        notes = [f"{chosen.grid.name} was best"] if len(choices) > 1 else []
        rounded = format.quantize(weight, name)
        nearest = proxy_loss(weight - rounded.dequantize(), hessian)
        if nearest.sum() < loss.sum():  # a format may choose its scales better than a multiple of the range does
            quantized, loss, notes = rounded, nearest, ["round-to-nearest was better and was kept"]
        return Solved(
            quantized=quantized, notes=notes, loss=loss, rtn_loss=nearest, zero_loss=proxy_loss(weight, hessian)
        )

    def factors(self) -> list[float]:
        """Multiples of the range to try besides 1."""
        return [factor for factor in torch.linspace(self.low, self.high, self.steps).tolist() if factor != 1]

    def _search(
        self, weight: Tensor, format: Format, hessian: Tensor, factors: list[float]
    ) -> tuple[Quantized, Tensor]:
        """The codes of the best of 1 and `factors` for each row of scales, and the loss of each row [out]."""
        low, high = format.ranges(weight)
        best = torch.ones_like(low[:, :1])
        least = self._per_scale(self._loss(weight, format, hessian, low, high), len(best))
        for factor in factors:
            loss = self._per_scale(self._loss(weight, format, hessian, low * factor, high * factor), len(best))
            better = loss < least
            least = torch.where(better, loss, least)
            best[better] = factor
        found = format.quantize_with(weight, *format.params_from_range(low * best, high * best))
        return found, proxy_loss(weight - found.dequantize(), hessian)

    @staticmethod
    def _loss(weight: Tensor, format: Format, hessian: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero = format.params_from_range(low, high)
        if format.nested:  # scales that share something are judged as they will be stored
            scale, zero, _ = format.settle(scale, zero)
        shape = weight.shape[0], weight.shape[1]
        error = torch.empty_like(weight)
        for rows, row_scale, row_zero in format.row_chunks(shape, scale, zero):
            error[rows] = weight[rows] - format.snap(weight[rows], row_scale, row_zero)
        return proxy_loss(error, hessian)

    @staticmethod
    def _per_scale(loss: Tensor, rows: int) -> Tensor:
        """Losses of output rows [out] as those of rows of scales: the same, or one for all where rows share scales."""
        return loss if rows == len(loss) else loss.sum().expand(rows)
