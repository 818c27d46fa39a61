"""GGUF's formats with a table of levels and one fp16 scale per block: IQ4_NL, TQ1_0, TQ2_0.

    iq4_nl          w = d * level     16 levels, denser near zero and not symmetric; d: fp16 per 32, either sign
    tq1_0 tq2_0     w = d * {-1, 0, 1}    d: fp16 per 256; the same values, stored in 1.6875 and in 2.0625 bits

IQ4_NL's levels have no zero and reach further down than up, so the sign of d is a choice, too: a search over both signs
and a few sizes, each refitted to the levels it leads to (Lloyd's step), picks the one of least squared error.

For three levels the best scale is exact. With the k largest magnitudes of a block kept, the error is least for d =
(their mean), and falls by (their sum)^2 / k: sort once, take the best k. Weights that are ternary already, as
BitNet's, come back as they were.

Sources: llama.cpp pull requests 5590 (IQ4_NL) and 8151 (TQ1_0, TQ2_0); ggml-common.h for the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fewbits.formats.base import Format, Quantized
from fewbits.formats.blocks import Scaling
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.grid import Grid
from fewbits.formats.kquant import BlockFormat, BlockScale

IQ4_LEVELS = (-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# The level on which the largest weight is put, as a multiple of the lowest.
_SIZES = (1.0, 0.925, 1.075, 0.85, 1.15, 0.78)
_REFITS = 2
_HALF = 16


class TableFormat(BlockFormat):
    """A `BlockFormat` whose levels are a table and whose scales are searched."""

    def params(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._scales(w, None), None

    def quantize(self, w: Tensor, name: str = "weight", importance: Tensor | None = None) -> Quantized:
        self.check(w, name)
        if importance is not None:
            importance = self._checked(importance, w, name)
        return self.quantize_with(w, self._scales(w, importance), None)

    def _scales(self, w: Tensor, importance: Tensor | None) -> Tensor:
        blocks = w.float().reshape(-1, self.block)
        weights = torch.ones_like(blocks) if importance is None else importance.expand(w.shape).reshape(blocks.shape)
        step = max(1, (1 << 20) // self.block)
        search = self._ternary if len(self.grid.levels) == 3 else self._tabled
        found = [search(blocks[i : i + step], weights[i : i + step]) for i in range(0, len(blocks), step)]
        return self.scales.round(torch.cat(found), self.grid.top).view(w.shape[0], -1)

    def _tabled(self, x: Tensor, v: Tensor) -> Tensor:
        """The scale of each block [n] of least squared error among the candidates."""
        levels = self.grid.levels
        largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
        best, gain = torch.zeros_like(largest), torch.full_like(largest, -1.0)
        for end in (levels[0], levels[-1]):
            for size in _SIZES:
                scale = largest / (end * size)
                for _ in range(_REFITS):
                    inverse = torch.where(scale == 0, scale, 1 / scale)
                    level = self.grid.snap(x * inverse)
                    cross, square = (v * level * x).sum(1, keepdim=True), (v * level * level).sum(1, keepdim=True)
                    scale = torch.where(square > 0, cross / square, torch.zeros_like(cross))
                reached = scale * cross
                best, gain = torch.where(reached > gain, scale, best), torch.maximum(gain, reached)
        return best

    def _ternary(self, x: Tensor, v: Tensor) -> Tensor:
        sizes, order = x.abs().sort(dim=1, descending=True)
        weights = v.gather(1, order)
        total, count = (weights * sizes).cumsum(1), weights.cumsum(1)
        best = (total * total / count).argmax(dim=1, keepdim=True)
        return total.gather(1, best) / count.gather(1, best)


def _format(name: str, grid: Grid, block: int, fallback: str) -> TableFormat:
    store = BlockScale(_HALF, 1, signed=False)
    scaling = Scaling(block="group", group_size=block, store=store)
    return TableFormat(name=name, grid=grid, scaling=scaling, block=block, fallback=fallback)


_IQ4 = Grid("iq4_nl", 4, IQ4_LEVELS)
FORMATS: dict[str, Callable[[], Format]] = {
    "iq4_nl": partial(_format, "iq4_nl", _IQ4, 32, ""),
    "tq1_0": partial(_format, "tq1_0", ELEMENTS["ternary"], 256, "q4_0"),
    "tq2_0": partial(_format, "tq2_0", ELEMENTS["ternary"], 256, "q4_0"),
}
