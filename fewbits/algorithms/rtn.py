"""Round to nearest: each block's range from its minimum and maximum, each weight to its nearest level.

Needs no data, keeps no promise beyond half a step per weight; the baseline every method must beat. With
`search` the range is shrunk where that lowers the squared error of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.algorithms.base import Solved
from fewbits.algorithms.clipping import RangeSearch
from fewbits.formats import Format


@dataclass(frozen=True, kw_only=True)
class RTN:
    """Round to nearest with min-max (absmax) ranges, or searched ones."""

    statistics: ClassVar[frozenset[str]] = frozenset()

    search: RangeSearch | None = None

    def solve(self, weight: Tensor, format: Format, hessian: Tensor | None, name: str) -> Solved:
        if self.search is None:
            return Solved(quantized=format.quantize(weight, name))
        format.check(weight, name)
        format = format.fitted(weight)
        return Solved(quantized=format.quantize_with(weight, *self.search.params(weight, format)))
