"""Four over six: NVFP4 whose blocks choose between two scales.

    scale = absmax / 6  or  absmax / 4,  whichever has the smaller squared error

E2M1's upper levels are 3, 4, 6: near the top its relative step is a third. A block with values around 5/6 of its
largest rounds badly when that largest sits on 6; moved down to 4 they fall on 3 and 4 exactly, at a coarser step
below. Both scales are stored as E4M3 under one outer scale per tensor,

    outer = absmax(tensor) / (6 * 256)

so that the largest block's second candidate, 1.5 times its first, still fits (384 <= 448). Costs nothing when
decoding: the file is NVFP4. On Gaussian weights it takes 16 % off the squared error.
Source: Cook et al. 2025, "Four Over Six", arXiv 2512.02010.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.formats.base import Format
from fewbits.formats.scales import FloatScale

FOUR = 6 / 4  # the second candidate, as a multiple of absmax / 6
LIMIT = 256.0


@dataclass(frozen=True, kw_only=True)
class FourOverSix(Format):
    """E2M1 in blocks whose scale puts the largest element on 6 or on 4."""

    @property
    def wider(self) -> tuple[float, ...]:
        return (FOUR,)

    def fitted(self, w: Tensor, importance: Tensor | None = None) -> Format:
        """This format with the outer scale of `w`, which every block's choice depends on."""
        outer = FloatScale(LIMIT).outer(self.ranges(w.float())[1] / self.grid.top)
        store = FloatScale(LIMIT, float(outer))
        return dataclasses.replace(self, scaling=dataclasses.replace(self.scaling, store=store))

    def params(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = [self._row_params(w[rows].float()) for rows in self._slices((w.shape[0], w.shape[1]), w.device)]
        return torch.cat(parts), None

    def _row_params(self, w: Tensor) -> Tensor:
        low, high = self._row_ranges(w)
        six, _ = self.params_from_range(low, high)
        four, _ = self.params_from_range(low * FOUR, high * FOUR)
        blocks = self.blocks(w)
        return torch.where(self._error(blocks, four) < self._error(blocks, six), four, six)

    def _error(self, blocks: Tensor, scale: Tensor) -> Tensor:
        return self.snap(blocks, scale[..., None], None).sub_(blocks).square_().sum(-1)
