"""Lloyd-Max: the N levels of least mean squared error for a distribution, or for a tensor.

Two conditions hold at the optimum, each easy given the other:

    boundaries are the midpoints of levels:          b_i = (l_i + l_i+1) / 2
    levels are the means of their cells:             l_i = E[x | b_i-1 < x < b_i]

For a density that is log-concave (Gaussian, Laplace, uniform) the solution is unique. It is found here by
Newton's method on the second condition, whose Jacobian is tridiagonal; alternating the two (Lloyd's own
iteration) creeps for many levels, but is safe where Newton's step is not: other densities with known tail
moments (`of`) mix both. For a tensor the alternation runs on a fine histogram: 4096 bins hold all that the
levels of an 8-bit codebook can resolve, and a step costs nothing then.

A codebook fitted to weights scaled by their blocks' absmax sees what that scaling leaves: a bounded density
with more mass near the ends the smaller the blocks are.
Sources: Lloyd 1957/1982, "Least squares quantization in PCM"; Max 1960, "Quantizing for minimum distortion".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.metrics.distributions import Distribution

_BINS = 4096
_Mean = Callable[[float, float], tuple[float, float, float]]
_SQRT2 = math.sqrt(2.0)


@cache
def gaussian(count: int) -> tuple[float, ...]:
    """The `count` optimal levels (even) of the standard normal distribution, ascending, to 1e-12."""
    return _symmetric(count, _gaussian_mean, start=math.sqrt(3.0))


@cache
def of(distribution: Distribution, count: int) -> tuple[float, ...]:
    """`count` levels (even) of least squared error for a symmetric distribution, ascending.

    Newton steps while they bring the levels nearer to the means of their cells, Lloyd's own step where one would
    not. Optimal among its neighbours; the one optimum where the density is log-concave.
    """
    if count < 2 or count % 2:
        raise BadInput(f"{count} levels: an even number of at least 2 is needed")
    levels = _companded(distribution, count)
    residual, jacobian = _cells(distribution, levels)
    for _ in range(2000):
        if float(residual.abs().max()) <= 1e-13 * float(levels[-1]):
            break
        newton = levels - torch.linalg.solve(jacobian, residual)
        if bool((newton.diff(prepend=newton.new_zeros(1)) > 0).all()):
            found = _cells(distribution, newton)
            if float(found[0].abs().max()) < float(residual.abs().max()):
                levels, (residual, jacobian) = newton, found
                continue
        if float(residual.abs().max()) <= 1e-11 * float(levels[-1]):
            break  # what is left is rounding
        levels = levels + residual
        residual, jacobian = _cells(distribution, levels)
    positive = levels.tolist()
    return (*(-level for level in reversed(positive)), *positive)


def _companded(distribution: Distribution, count: int) -> Tensor:
    """Levels that split the cube root of the density evenly, which is optimal for many: those above 0."""
    x = torch.cat([torch.zeros(1), torch.logspace(-4, 4, 8000)]).double()
    density = distribution.density(x)
    share = torch.cumulative_trapezoid(density.pow(1 / 3), x)
    wanted = (torch.arange(count // 2, dtype=torch.float64) + 0.5) / (count // 2) * share[-1]
    above = torch.searchsorted(share, wanted)
    low, high = share[(above - 1).clamp(min=0)], share[above]
    part = torch.where(above > 0, (wanted - low) / (high - low), wanted / high)
    return torch.lerp(x[above], x[above + 1], part)


def _cells(distribution: Distribution, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each level's cell less the level, and the derivative of that by the levels."""
    inner = (levels[1:] + levels[:-1]) / 2
    ends = levels.new_tensor([0.0, math.inf])
    zeroth, first, _ = (-tail.diff() for tail in distribution.tails(torch.cat([ends[:1], inner, ends[1:]])))
    mean = first / zeroth
    density = distribution.density(inner)
    below = density * (mean[1:] - inner) / zeroth[1:] / 2  # by the lower edge, of all cells but the first
    above = density * (inner - mean[:-1]) / zeroth[:-1] / 2
    diagonal = -torch.ones_like(levels)
    diagonal[1:] += below
    diagonal[:-1] += above
    return mean - levels, torch.diag(diagonal) + torch.diag(above, 1) + torch.diag(below, -1)


@cache
def gaussian_with_zero(count: int) -> tuple[float, ...]:
    """The `count` best levels (even) for N(0, 1) among those that hold 0: one more positive than negative.

    The optimum has no zero at an even count, which would move pruned weights and empty blocks; NF4 pays the same
    price. Either side is optimal given the zero, whose cell ends halfway to its neighbours.
    """
    half = count // 2
    positive = _half(count, half, _gaussian_mean, math.sqrt(3.0), zero=True)
    negative = _half(count, half - 1, _gaussian_mean, math.sqrt(3.0), zero=True)
    return (*(-level for level in reversed(negative)), 0.0, *positive)


def _gaussian_mean(a: float, b: float) -> tuple[float, float, float]:
    """Mean of the half normal on (a, b), 0 <= a < b, and its derivatives by a and b."""
    density_a = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    density_b = 0.0 if math.isinf(b) else math.exp(-b * b / 2) / math.sqrt(2 * math.pi)
    mass = (math.erfc(a / _SQRT2) - math.erfc(b / _SQRT2)) / 2
    mean = (density_a - density_b) / mass
    return mean, density_a * (mean - a) / mass, 0.0 if math.isinf(b) else density_b * (b - mean) / mass


def _symmetric(count: int, mean: _Mean, start: float) -> tuple[float, ...]:
    """Levels of a symmetric log-concave density."""
    if count < 2 or count % 2:
        raise BadInput(f"{count} levels: an even number of at least 2 is needed")
    levels = _half(count, count // 2, mean, start)
    return (*(-level for level in reversed(levels)), *levels)


def _half(count: int, half: int, mean: _Mean, start: float, zero: bool = False) -> list[float]:
    """The `half` levels above 0 by damped Newton steps on  mean(cell) - level = 0; `zero`: 0 is a level too."""
    # The optimal density of points goes with the cube root of the density: a normal one of sigma sqrt(3), which
    # quantiles approximate.
    quantiles = (torch.arange(half, dtype=torch.float64) + 0.5) / count + 0.5
    levels = (start * _SQRT2 * torch.erfinv(2 * quantiles - 1)).tolist()
    for _ in range(200):
        edges = [
            levels[0] / 2 if zero else 0.0,
            *((a + b) / 2 for a, b in itertools.pairwise(levels)),
            math.inf,
        ]
        cells = [mean(a, b) for a, b in itertools.pairwise(edges)]
        residual = [cell[0] - level for cell, level in zip(cells, levels, strict=True)]
        lower = [cells[i][1] / 2 if i or zero else 0.0 for i in range(half)]
        upper = [cells[i][2] / 2 if i + 1 < half else 0.0 for i in range(half)]
        diagonal = [lower[i] + upper[i] - 1.0 for i in range(half)]
        step = _tridiagonal(lower, diagonal, upper, residual)
        size = 1.0
        while not _ascending([level - size * change for level, change in zip(levels, step, strict=True)]):
            size /= 2
        levels = [level - size * change for level, change in zip(levels, step, strict=True)]
        if max(abs(change) for change in step) < 1e-13 * levels[-1]:
            break
    return levels


def _ascending(levels: list[float]) -> bool:
    return levels[0] > 0 and all(a < b for a, b in itertools.pairwise(levels))


def _tridiagonal(lower: list[float], diagonal: list[float], upper: list[float], right: list[float]) -> list[float]:
    """Thomas's elimination."""
    n = len(right)
    ratio, value = [0.0] * n, [0.0] * n
    for i in range(n):
        pivot = diagonal[i] - (lower[i] * ratio[i - 1] if i else 0.0)
        ratio[i] = upper[i] / pivot
        value[i] = (right[i] - (lower[i] * value[i - 1] if i else 0.0)) / pivot
    for i in range(n - 2, -1, -1):
        value[i] -= ratio[i] * value[i + 1]
    return value


def fit(samples: Tensor, count: int, weights: Tensor | None = None, iterations: int = 300) -> tuple[float, ...]:
    """At most `count` levels of least (weighted) squared error for `samples`, ascending; deterministic.

    samples: any shape, finite.  weights: the same shape, non-negative.  Runs Lloyd's iteration on a histogram of
    4096 bins that keeps each bin's mass and mean; it starts from the levels that split the cube root of the
    density evenly, which is optimal for many levels.
    """
    flat = samples.detach().flatten().float()
    low, high = (float(end) for end in torch.aminmax(flat))
    if low == high:
        return (low,)
    index = ((flat - low) * (_BINS / (high - low))).to(torch.int64).clamp_(max=_BINS - 1)
    mass = torch.bincount(index, None if weights is None else weights.flatten().double(), _BINS).double()
    moment = torch.bincount(index, flat.double() if weights is None else flat.double() * weights.flatten(), _BINS)
    moment = moment.double()
    if not bool(mass.sum() > 0):
        return (low, high)
    used = mass > 0
    mass, centre = mass[used], moment[used] / mass[used]
    if len(mass) <= count:
        return tuple(centre.tolist())
    total, first = mass.cumsum(0), (mass * centre).cumsum(0)
    levels = _even_split(mass, centre, count)
    for _ in range(iterations):
        cuts = torch.searchsorted(centre, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([cuts, cuts.new_tensor([len(mass)])]) - 1
        below, sums = _at(total, ends), _at(first, ends)
        cell, part = below.diff(prepend=below.new_zeros(1)), sums.diff(prepend=sums.new_zeros(1))
        moved = torch.where(cell > 0, part / cell.clamp(min=1e-300), levels)
        if torch.allclose(moved, levels, rtol=0, atol=1e-7 * (high - low)):
            levels = moved
            break
        levels = moved
    return tuple(sorted(set(levels.tolist())))


def _at(running: Tensor, ends: Tensor) -> Tensor:
    """A running sum read at `ends`, where -1 is before the first."""
    return torch.where(ends >= 0, running[ends.clamp(min=0)], torch.zeros_like(running[:1]))


def _even_split(mass: Tensor, centre: Tensor, count: int) -> Tensor:
    """Centres at even steps of the running cube root of the mass."""
    share = mass.pow(1 / 3).cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64, device=mass.device) + 0.5) / count * share[-1]
    picked = torch.searchsorted(share, wanted).clamp(max=len(centre) - 1).unique()
    return centre[picked]
