"""The error of rounding to levels, of values at hand: sorted once, then any scale for the price of a few look-ups.

With the values sorted and their running sums  S_k = sum of count * x**k,  k = 0, 1, 2,  kept, a level l with the cell
from value i to value j adds

    sum of (x - l)**2 = dS_2 - 2 l dS_1 + l**2 dS_0,     dS_k = S_k[j] - S_k[i]

so an error takes a binary search per level instead of a pass over the values. `distributions.squared_error` is the same
sum with moments that are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SWEEP, _REFINE, _ROUNDS = 120, 17, 2
_LOW, _HIGH = 0.5, 2.0  # the largest level lies between half an rms and twice the largest magnitude


class Sorted:
    """Values of any shape, of which each stands for `counts` (same shape; all alike by default)."""

    def __init__(self, values: Tensor, counts: Tensor | None = None) -> None:
        self.values, order = values.detach().flatten().double().sort()
        weights = torch.ones_like(self.values) if counts is None else counts.flatten().double()[order]
        powers = torch.stack([weights, weights * self.values, weights * self.values**2])
        self._sums = torch.nn.functional.pad(powers.cumsum(-1), (1, 0))
        self.total, _, self.energy = (float(sum[-1]) for sum in self._sums)
        self._fourth = float((weights * self.values**4).sum())

    @property
    def absmax(self) -> float:
        return max(-float(self.values[0]), float(self.values[-1]))

    @property
    def rms(self) -> float:
        return math.sqrt(self.energy / self.total)

    @property
    def kurtosis(self) -> float:
        """E[x**4] / E[x**2]**2, about zero: 1.8 of uniform values, 3 of Gaussian ones, 6 of Laplace's."""
        return self._fourth * self.total / self.energy**2

    def errors(self, levels: Sequence[float], scales: Tensor) -> Tensor:
        """sum of count * (x - nearest of scale * levels)**2 over `energy`, for each of `scales` [S] > 0."""
        scaled = scales.double()[:, None] * torch.tensor(levels, dtype=torch.float64)
        cuts = torch.searchsorted(self.values, ((scaled[:, 1:] + scaled[:, :-1]) / 2).contiguous())
        ends = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=len(self.values))
        zeroth, first, second = self._sums[:, ends].diff(dim=-1)
        total: Tensor = (second - 2 * scaled * first + scaled**2 * zeroth).sum(-1)
        return total.clamp_(min=0) / self.energy

    def best_scale(self, levels: Sequence[float]) -> tuple[float, float]:
        """The scale of least error and that error: a logarithmic sweep of the clip, refined around its best."""
        top = max(abs(level) for level in levels)
        ends = math.log10(_LOW * self.rms), math.log10(_HIGH * self.absmax)
        clips = torch.logspace(*ends, _SWEEP, dtype=torch.float64)
        errors = self.errors(levels, clips / top)
        for _ in range(_ROUNDS):
            at = int(errors.argmin())
            around = clips[max(at - 1, 0)], clips[min(at + 1, len(clips) - 1)]
            clips = torch.linspace(float(around[0]), float(around[1]), _REFINE, dtype=torch.float64)
            errors = self.errors(levels, clips / top)
        at = int(errors.argmin())
        return float(clips[at]) / top, float(errors[at])
