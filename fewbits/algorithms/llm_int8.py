"""LLM.int8(): rounded to nearest on both sides, but for the outlier channels of the inputs, which stay in 16 bits.

    y = Q(x_R) Q(W_R)^T + x_O W_O^T       one scale per token and per output: --scheme W8A8

formats/outliers.py has the decomposition and its variants. Which channels are outliers is decided as the model runs
(`fixed=False`), by the magnitudes a product meets, or once and for all by those of calibration, at the same
`threshold`, 6.0: below it, the paper found, 8 bits cost nothing. The weights of outlier channels are the `original`
ones, as in the paper, or what their INT8 codes say, as in bitsandbytes, which has no others left when the model runs.

Memory: original weights of columns that nobody knows beforehand are all the weights, 16 bits beside the 8. That is what
the paper describes, not what one runs. Fixed columns with their original weights take 16 bits times their share: of the
embedded model 0.6 bits a weight at 6.0 and 2.9 at 2 (docs/w8a8.md).

Compared with bitsandbytes: an outlier channel is taken out whole, before the scales of the tokens; there, the scales
still see its small values. Of an all-zero row the scale is 1.
Source: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339.
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
from fewbits.formats.outliers import Outliers, in_sixteen, without

WEIGHTS = ("original", "dequantized")


@dataclass(frozen=True, kw_only=True)
class LLMInt8:
    """threshold: of a magnitude.  fixed: outlier columns are chosen by calibration.  weights: of those columns,
    original or dequantized."""

    role: ClassVar[str] = "weights"
    statistics: ClassVar[frozenset[str]] = frozenset({"max_abs"})
    keeps_outliers: ClassVar[bool] = True

    threshold: float = 6.0
    fixed: bool = False
    weights: str = "original"

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise BadInput(f"threshold {self.threshold}; needs a magnitude above 0, e.g. 6.0")
        if self.weights not in WEIGHTS:
            raise BadInput(f"weights {self.weights!r} of outlier columns; allowed: {', '.join(WEIGHTS)}")

    def solve(self, weight: Tensor, format: Format, inputs: Inputs, name: str) -> Solved:
        format.check(weight, name)
        original = self.weights == "original"
        if not self.fixed:
            outliers = Outliers(threshold=self.threshold, weight=in_sixteen(weight) if original else None)
            return Solved(quantized=format.quantize(weight, name), outliers=outliers)
        if inputs.max_abs is None or not inputs.tokens:
            raise BadInput(f"{name}: fixed outlier columns need calibration text; pass some, or use fixed=false")
        columns = (inputs.max_abs >= self.threshold).nonzero().flatten()
        if not len(columns):
            return Solved(quantized=format.quantize(weight, name))
        kept = in_sixteen(weight[:, columns]) if original else None
        rest = weight if kept is None else without(weight, columns)
        outliers = Outliers(threshold=self.threshold, columns=columns.to(torch.int32), weight=kept)
        return Solved(quantized=format.quantize(rest, name), outliers=outliers)
