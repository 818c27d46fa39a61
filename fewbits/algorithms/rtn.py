"""Round to nearest: each block's range from its minimum and maximum, each weight to its nearest level.

Needs no data, keeps no promise beyond half a step per weight; the baseline every method must beat. With
`search` the range is shrunk where that lowers the squared error of the weights; with `range` an estimator of
ranges.py decides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.algorithms.base import Solved
from fewbits.algorithms.clipping import RangeSearch
from fewbits.algorithms.ranges import RANGES, range_params
from fewbits.calibration.stats import Inputs
from fewbits.formats import Format


@dataclass(frozen=True, kw_only=True)
class RTN:
    """Round to nearest with min-max (absmax) ranges, searched ones, or those of the estimator called `range`."""

    role: ClassVar[str] = "weights"
    statistics: ClassVar[frozenset[str]] = frozenset()

    search: RangeSearch | None = None
    range: str | None = None

    def __post_init__(self) -> None:
        if self.range is not None:
            RANGES.get(self.range)

    def solve(self, weight: Tensor, format: Format, inputs: Inputs, name: str) -> Solved:
        if self.search is None and self.range is None:
            return Solved(quantized=format.quantize(weight, name))
        format.check(weight, name)
        format = format.fitted(weight)
        if self.range is not None:
            return Solved(quantized=format.quantize_with(weight, *range_params(self.range, weight, format)))
        assert self.search is not None
        return Solved(quantized=format.quantize_with(weight, *self.search.params(weight, format)))
