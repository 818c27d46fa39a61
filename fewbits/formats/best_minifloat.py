"""Minifloats whose exponent is chosen per tensor: `fp4_fit` and `fp8_fit`.

How many of the bits behind the sign should be exponent depends on the tails of a tensor: none for values spread
evenly, more the heavier they are. Of 4 bits there are E3M0, E2M1 and E1M2 (integers -7 to 7 in another coat), of 8
bits E5M2 to E1M6, each with every code finite and a real scale. The one with the least squared error at the ranges of
its blocks is taken, its levels are stored beside the codes, and whoever reads them needs to know no more.

Source: Liu et al. 2023, "LLM-FP4", arXiv 2310.16836. (E+M = 7 always: the published code lets an 8-bit activation
have E+M = 9.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fewbits.formats.base import Format
from fewbits.formats.minifloat import minifloat_grid


@dataclass(frozen=True, kw_only=True)
class BestMinifloat(Format):
    """A format whose grid becomes the best ExMy of its bits for one tensor."""

    fit: bool = True

    def choices(self, w: Tensor, importance: Tensor | None = None) -> Iterator[BestMinifloat]:
        """This format with each of the grids, its own one first."""
        exponents = range(1, 4 if self.bits == 4 else 6)
        grids = [minifloat_grid(f"fp{self.bits}_e{e}m{self.bits - 1 - e}", e, self.bits - 1 - e) for e in exponents]
        for grid in sorted(grids, key=lambda grid: grid.levels != self.grid.levels):
            yield dataclasses.replace(self, grid=grid)

    def fitted(self, w: Tensor, importance: Tensor | None = None) -> BestMinifloat:
        """This format with the grid of the least squared error on `w` [out, in], columns weighed by `importance`."""
        return min(self.choices(w), key=lambda format: format._loss(w, importance))

    def _loss(self, w: Tensor, importance: Tensor | None) -> float:
        scale, zero, _ = self.settle(*self.params(w))
        total = 0.0
        for rows, row_scale, row_zero in self.row_chunks((w.shape[0], w.shape[1]), scale, zero):
            error = (w[rows].float() - self.snap(w[rows].float(), row_scale, row_zero)).square_()
            total += float((error if importance is None else error * importance.float()).sum())
        return total
