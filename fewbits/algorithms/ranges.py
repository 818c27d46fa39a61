"""Range estimators: what [low, high] a block's levels should cover, seen from its values or from a histogram.

| name | the range | source |
|---|---|---|
| absmax | minimum and maximum: nothing is clipped | |
| percentile | without the largest magnitudes, 0.01 % of the values | Wu et al. 2020, arXiv 2004.09602 |
| mse | least squared error among shrunk ranges | |
| kl | least information lost, TensorRT's entropy calibration (entropy.py) | Migacz 2017 |
| tf_enhanced | least squared error, where clipped values count threefold | AIMET |
| exponent_bias | least squared error, 0.1 to 1.2 times absmax: an FP8's real exponent bias | arXiv 2208.09225 |

Clipping trades a few large errors for a finer step for everything else. Which is right depends on the values: the
squared error of a Gaussian in INT8 is least at 3.92 standard deviations, kl clips ten million values at 4.59 and their
absmax lies near 5.3. For integers of few bits it matters; a minifloat hardly cares.

An estimator answers `of_blocks(blocks [..., n], format)`, a range per block, for weights; and
`of_histogram(histogram, format)`, one range, for activations that were seen as a stream. Both give low and high as
`Format.params_from_range` takes them. All values equal, or all zero, is a range like any other.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewbits.algorithms.clipping import best_factor, range_error
from fewbits.calibration.histogram import Histogram
from fewbits.core.errors import BadInput
from fewbits.core.registry import Registry
from fewbits.formats import Format

Range = tuple[Tensor, Tensor]

RANGES = Registry(
    "range estimator",
    {
        "absmax": "fewbits.algorithms.ranges:AbsMax",
        "percentile": "fewbits.algorithms.ranges:Percentile",
        "mse": "fewbits.algorithms.ranges:MSE",
        "kl": "fewbits.algorithms.entropy:KL",
        "tf_enhanced": "fewbits.algorithms.ranges:TFEnhanced",
        "exponent_bias": "fewbits.algorithms.ranges:ExponentBias",
    },
)


def range_params(estimator: str, weight: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each block of `weight` [out, in] by the estimator of that name.

    Raises BadInput for a name that is not in RANGES.
    """
    low, high = RANGES.get(estimator)().of_blocks(format.blocks(weight), format)
    return format.params_from_range(low, high)


class RangeEstimator(Protocol):
    """What the classes in RANGES offer."""

    def of_blocks(self, blocks: Tensor, format: Format) -> Range:
        """low and high [...] of blocks [..., n]."""
        ...

    def of_histogram(self, histogram: Histogram, format: Format) -> Range:
        """low and high, scalars, of a stream."""
        ...


class _OfValues(abc.ABC):
    """An estimator that takes a histogram for values with counts."""

    def of_blocks(self, blocks: Tensor, format: Format) -> Range:
        return self._of(blocks.float(), None, format)

    def of_histogram(self, histogram: Histogram, format: Format) -> Range:
        values, counts = histogram.samples()
        if not len(values):
            raise BadInput("the histogram is empty: no values came by, so there is no range to estimate")
        return self._of(values, counts, format)

    @abc.abstractmethod
    def _of(self, values: Tensor, counts: Tensor | None, format: Format) -> Range:
        """low and high [...] of values [..., n], of which each stands for `counts`."""


def within(low: Tensor, high: Tensor, magnitude: Tensor) -> Range:
    """The observed range without what is larger than `magnitude`."""
    return torch.maximum(low, -magnitude), torch.minimum(high, magnitude)


@dataclass(frozen=True, kw_only=True)
class AbsMax(_OfValues):
    """Minimum and maximum, so that nothing is clipped."""

    def _of(self, values: Tensor, counts: Tensor | None, format: Format) -> Range:
        return torch.aminmax(values, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Percentile(_OfValues):
    """The smallest range that holds `percent` of the values by magnitude."""

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise BadInput(f"percentile {self.percent}: needs 0 < percent <= 100")

    def _of(self, values: Tensor, counts: Tensor | None, format: Format) -> Range:
        low, high = torch.aminmax(values, dim=-1)
        magnitude = values.abs()
        if counts is None:
            rank = max(1, math.ceil(self._share(values.shape[-1])))
            return within(low, high, magnitude.kthvalue(rank, dim=-1).values)
        order = magnitude.argsort()
        seen = counts[order].cumsum(0)
        at = torch.searchsorted(seen, self._share(float(seen[-1]))).clamp(max=len(seen) - 1)
        return within(low, high, magnitude[order][at])

    def _share(self, total: float) -> float:
        return round(self.percent * total / 100, 6)  # 99.9 % of 1000 is 999, also in binary


@dataclass(frozen=True, kw_only=True)
class MSE(_OfValues):
    """Least squared error among the range and its shrunk copies, `steps` down to 1 - `max_shrink`."""

    steps: int = 80
    max_shrink: float = 0.8

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.max_shrink < 1:
            raise BadInput(f"{self}: needs steps >= 1 and 0 <= max_shrink < 1")

    def _of(self, values: Tensor, counts: Tensor | None, format: Format) -> Range:
        factors = torch.linspace(1, 1 - self.max_shrink, self.steps + 1).tolist()
        return best_factor(values, torch.aminmax(values, dim=-1), factors, format, counts)[:2]


@dataclass(frozen=True, kw_only=True)
class TFEnhanced(_OfValues):
    """AIMET's "TF-enhanced": squared error, where what lies outside the range counts `gamma` times.

    Symmetric: hundredths of absmax. With a zero point: sixteenths of the observed span, each at 21 offsets and as
    observed. AIMET also widens ranges below 0.01, which would flush small weights; that is left out.
    """

    gamma: float = 3.0

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise BadInput(f"gamma {self.gamma}: must not be negative")

    def _of(self, values: Tensor, counts: Tensor | None, format: Format) -> Range:
        low, high = torch.aminmax(values, dim=-1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        best, least = (low, high), self._cost(values, counts, format, low, high)
        for tried in self._candidates(low, high, format):
            cost = self._cost(values, counts, format, *tried)
            better = cost < least
            least = torch.where(better, cost, least)
            best = torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1])
        return best

    def _candidates(self, low: Tensor, high: Tensor, format: Format) -> list[Range]:
        if not format.scaling.zero_point:
            return [(low * (f / 100), high * (f / 100)) for f in range(99, 0, -1)]
        steps = len(format.grid.levels) - 1
        offsets = sorted({round(-steps + k * steps / 20) for k in range(21)})
        spans = [(high - low) * (f / 16) for f in range(16, 0, -1)]
        placed = [(span * (o / steps), span * (1 + o / steps)) for span in spans for o in offsets]
        return [*((low * (f / 16), high * (f / 16)) for f in range(15, 0, -1)), *placed]

    def _cost(self, values: Tensor, counts: Tensor | None, format: Format, low: Tensor, high: Tensor) -> Tensor:
        error = range_error(values, format, low, high).square_()
        outside = (values < low[..., None]) | (values > high[..., None])
        cost = torch.where(outside, self.gamma * error, error)
        return cost.sum(-1) if counts is None else (cost * counts).sum(-1)


@dataclass(frozen=True, kw_only=True)
class ExponentBias(_OfValues):
    """Least squared error among 111 largest values from 0.1 to 1.2 times absmax.

    For a minifloat whose every code is finite the largest value and a real exponent bias say the same
    (`fewbits.formats.minifloat.bias_of`), so this is the search for the bias. `elect` also chooses the split of the
    bits.
    """

    def _of(self, values: Tensor, counts: Tensor | None, format: Format) -> Range:
        return self._search(values, counts, format)[:2]

    def _search(self, values: Tensor, counts: Tensor | None, format: Format) -> tuple[Tensor, Tensor, Tensor]:
        magnitude = values.abs().amax(dim=-1)
        # Nearest to absmax first: a tie (all values equal, or too small to square) clips nothing.
        factors = sorted((k / 100 for k in range(10, 121)), key=lambda factor: abs(factor - 1))
        return best_factor(values, (-magnitude, magnitude), factors, format, counts)

    def elect(self, blocks: Tensor, formats: Sequence[Format]) -> tuple[Format, Range]:
        """The format that most blocks (channels) [..., n] prefer, the first on a tie, and each block's range in it."""
        if not formats:
            raise BadInput("no formats to choose among; pass at least one")
        searched = [self._search(blocks.float(), None, format) for format in formats]
        wins = torch.stack([loss for _, _, loss in searched]).argmin(dim=0).flatten()
        winner = int(torch.bincount(wins, minlength=len(formats)).argmax())
        return formats[winner], searched[winner][:2]
