"""The exact error of rounding to levels, for distributions of which the moments are known. Nothing is sampled.

For x > 0 let  S_k(a) = E[x**k ; x > a],  k = 0, 1, 2  (the tail moments). A level l with the cell (a, b) adds

    E[(x - l)**2 ; a < x < b] = dS_2 - 2 l dS_1 + l**2 dS_0,     dS_k = S_k(a) - S_k(b)

and x < 0 is x > 0 with the levels mirrored. Tail moments, not cumulative ones: far out, where a large level
multiplies a small probability, they keep their digits. All distributions have mean 0 and variance 1, so
1 / error is the signal-to-quantization-noise ratio.

| distribution | S_0 | source of S_1, S_2 |
|---|---|---|
| uniform, Gaussian, Laplace | elementary, erfc | by parts |
| Student-t, integer nu >= 3 | finite sums of powers of cos(atan(a / sqrt(nu))) | S_2 by that of nu - 2 |
| Gaussian with outliers | mixture: a share of the values is `ratio` times as wide | |

No code of R bits does better than the Shannon lower bound  2**(2 h) / (2 pi e) * 4**-R  with h the differential
entropy in bits (for the Gaussian this is its rate-distortion function 4**-R, Shannon 1959).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor, Tensor]


class Distribution(Protocol):
    """Symmetric, mean 0, variance 1; hashable, so that what is computed for it can be kept."""

    def __hash__(self) -> int: ...

    def density(self, x: Tensor) -> Tensor:
        """The density at x >= 0, float64."""
        ...

    def tails(self, a: Tensor) -> Moments:
        """S_0, S_1, S_2 at a >= 0 (float64, may be inf)."""
        ...

    def entropy(self) -> float:
        """Differential entropy in bits."""
        ...


@dataclass(frozen=True)
class Uniform:
    """On [-sqrt 3, sqrt 3]."""

    end = math.sqrt(3.0)

    def density(self, x: Tensor) -> Tensor:
        return torch.where(x <= self.end, 0.5 / self.end, 0.0).to(x.dtype)

    def tails(self, a: Tensor) -> Moments:
        a = a.clamp(max=self.end)
        height = 0.5 / self.end
        return height * (self.end - a), height * (self.end**2 - a**2) / 2, height * (self.end**3 - a**3) / 3

    def entropy(self) -> float:
        return math.log2(2 * self.end)


@dataclass(frozen=True)
class Gaussian:
    """N(0, sigma**2); sigma is 1 but for the parts of a mixture."""

    sigma: float = 1.0

    def density(self, x: Tensor) -> Tensor:
        return torch.exp(-((x / self.sigma) ** 2) / 2) / (self.sigma * math.sqrt(2 * math.pi))

    def tails(self, a: Tensor) -> Moments:
        z = a / self.sigma
        zeroth = torch.special.erfc(z / math.sqrt(2)) / 2
        height = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        second = _at_infinity(z * height) + zeroth
        return zeroth, self.sigma * height, self.sigma**2 * second

    def entropy(self) -> float:
        return math.log2(2 * math.pi * math.e * self.sigma**2) / 2


@dataclass(frozen=True)
class Laplace:
    """Of rate sqrt 2."""

    rate = math.sqrt(2.0)

    def density(self, x: Tensor) -> Tensor:
        return self.rate / 2 * torch.exp(-self.rate * x)

    def tails(self, a: Tensor) -> Moments:
        zeroth = torch.exp(-self.rate * a) / 2
        first = _at_infinity((a + 1 / self.rate) * zeroth)
        return zeroth, first, _at_infinity((a**2 + 2 * a / self.rate + 2 / self.rate**2) * zeroth)

    def entropy(self) -> float:
        return math.log2(2 * math.e / self.rate)


@dataclass(frozen=True)
class StudentT:
    """Student's t with an integer `nu` >= 3 degrees of freedom, divided by its standard deviation."""

    nu: int

    @property
    def _scale(self) -> float:
        return math.sqrt(self.nu / (self.nu - 2))

    @property
    def _height(self) -> float:
        return math.exp(math.lgamma((self.nu + 1) / 2) - math.lgamma(self.nu / 2)) / math.sqrt(self.nu * math.pi)

    def density(self, x: Tensor) -> Tensor:
        return self._scale * self._height * (1 + (x * self._scale) ** 2 / self.nu) ** (-(self.nu + 1) / 2)

    def tails(self, a: Tensor) -> Moments:
        nu, t = self.nu, a * self._scale
        zeroth = _t_tail(t, nu)
        first = self._height * nu / (nu - 1) * (1 + t**2 / nu) ** (-(nu - 1) / 2)
        # t**2 = nu ((1 + t**2 / nu) - 1), and a density times the bracket is one of nu - 2 degrees, stretched.
        second = nu * ((nu - 1) / (nu - 2) * _t_tail(t / self._scale, nu - 2) - zeroth)
        return zeroth, first / self._scale, second.clamp(min=0) / self._scale**2

    def entropy(self) -> float:
        half, more = torch.tensor([self.nu / 2, (self.nu + 1) / 2], dtype=torch.float64)
        digamma = float(torch.special.digamma(more) - torch.special.digamma(half))
        nats = (self.nu + 1) / 2 * digamma - math.log(self._height)
        return (nats - math.log(self._scale)) / math.log(2)


@dataclass(frozen=True)
class Outliers:
    """A Gaussian of which a `share` of the values is `ratio` times as wide; variance 1 in all."""

    share: float = 0.01
    ratio: float = 10.0

    @property
    def parts(self) -> list[tuple[float, Gaussian]]:
        """Weights and Gaussians of the mixture."""
        sigma = 1 / math.sqrt(1 - self.share + self.share * self.ratio**2)
        return [(1 - self.share, Gaussian(sigma)), (self.share, Gaussian(self.ratio * sigma))]

    def density(self, x: Tensor) -> Tensor:
        return torch.stack([weight * part.density(x) for weight, part in self.parts]).sum(0)

    def tails(self, a: Tensor) -> Moments:
        narrow, wide = ([weight * moment for moment in part.tails(a)] for weight, part in self.parts)
        return narrow[0] + wide[0], narrow[1] + wide[1], narrow[2] + wide[2]

    def entropy(self) -> float:
        nodes, weights = panels(0.0, 12 * self.parts[1][1].sigma, 400)
        density = self.density(nodes)
        return float(-2 * (weights * density * torch.log2(density)).sum())


DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": Uniform(),
    "gaussian": Gaussian(),
    "laplace": Laplace(),
    "student-t 8": StudentT(8),
    "student-t 4": StudentT(4),
    "student-t 3": StudentT(3),
    "outliers": Outliers(),
}


def _at_infinity(product: Tensor) -> Tensor:
    """inf * 0, which floating point cannot say, is 0 for tails that fall faster than any power."""
    return torch.where(product.isnan(), 0.0, product)


def _t_tail(t: Tensor, nu: int) -> Tensor:
    """P(T > t) for t >= 0: finite sums (Abramowitz and Stegun 26.7.3, 26.7.4); far out, where they cancel, the series
    of the incomplete beta function (26.5.4) that gives its digits there."""
    angle = torch.atan2(torch.full_like(t, math.sqrt(nu)), t)  # a right angle less atan(t / sqrt nu)
    square = angle.sin() ** 2
    term, total, odd = torch.ones_like(t), torch.zeros_like(t), nu % 2
    for k in range((nu - odd) // 2):
        total = total + term
        term = term * square * ((2 * k + 1 + odd) / (2 * k + 2 + odd))
    near = (angle - angle.cos() * angle.sin() * total) / math.pi if odd else (1 - angle.cos() * total) / 2
    term, far = torch.ones_like(t), torch.zeros_like(t)
    for n in range(30):
        far = far + term / (nu + 2 * n)
        term = term * square * ((2 * n + 1) / (2 * n + 2))
    beta = math.exp(math.lgamma(nu / 2) + math.lgamma(0.5) - math.lgamma((nu + 1) / 2))
    return torch.where(square < 0.25, angle.sin() ** nu * far / beta, near)


def panels(low: float, high: float, count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss-Legendre rule of 8 points on each of `count` equal parts of [low, high]."""
    import numpy

    points, weights = (torch.from_numpy(array) for array in numpy.polynomial.legendre.leggauss(8))
    width = (high - low) / count
    starts = low + width * torch.arange(count, dtype=torch.float64)
    nodes = starts[:, None] + width * (points + 1) / 2
    return nodes.flatten(), (weights * width / 2).repeat(count)


def _half_error(distribution: Distribution, levels: Sequence[float], scales: Tensor, end: Tensor) -> Tensor:
    """Error of the values 0 < x < end, for ascending levels times each of `scales` [..., 1]."""
    reached = [level for level, above in zip(levels, [*levels[1:], math.inf], strict=True) if level + above > 0]
    scaled = torch.tensor(reached, dtype=torch.float64) * scales
    inner = (scaled[..., 1:] + scaled[..., :-1]) / 2
    edges = torch.cat([torch.zeros_like(scales), inner, torch.full_like(scales, torch.inf)], dim=-1)
    zeroth, first, second = (-moment.diff(dim=-1) for moment in distribution.tails(torch.minimum(edges, end)))
    return (second - 2 * scaled * first + scaled**2 * zeroth).sum(-1)


def squared_error(
    distribution: Distribution, levels: Sequence[float], scales: Tensor, end: Tensor | None = None
) -> Tensor:
    """E[(x - nearest of scale * levels)**2] for each of `scales` > 0; with `end`, of the values |x| < end only."""
    scales = scales.double()[..., None]
    ends = torch.full_like(scales, torch.inf) if end is None else end.double()[..., None]
    above = _half_error(distribution, levels, scales, ends)
    mirrored = [-level for level in reversed(levels)]
    below = above if mirrored == list(levels) else _half_error(distribution, mirrored, scales, ends)
    return above + below


def best_scale(
    distribution: Distribution, levels: Sequence[float], low: float = 0.05, high: float = 1e5
) -> tuple[float, float]:
    """The scale of least error whose largest magnitude lies in [low, high] standard deviations, and that error.

    The error of minifloats has a valley for every power of two, so a fine logarithmic sweep comes before the
    refinement.
    """
    top = max(abs(level) for level in levels)
    clips = torch.logspace(math.log10(low), math.log10(high), 4000, dtype=torch.float64)
    errors = squared_error(distribution, levels, clips / top)
    for _ in range(4):
        at = int(errors.argmin())
        around = clips[max(at - 1, 0)], clips[min(at + 1, len(clips) - 1)]
        clips = torch.linspace(float(around[0]), float(around[1]), 41, dtype=torch.float64)
        errors = squared_error(distribution, levels, clips / top)
    at = int(errors.argmin())
    return float(clips[at]) / top, float(errors[at])


def block_error(
    distribution: Distribution, levels: Sequence[float], top: float, size: int, *, signed: bool = False
) -> float:
    """Mean squared error per value under absmax scaling of blocks of `size` independent values.

    The largest magnitude m of a block has density  2 size f(m) (1 - 2 S_0(m))**(size - 1);  the others are
    independent draws from |x| < m; scale is m / top. `signed`: the scale takes the sign of the largest value, which
    always meets the lowest level, as in llama.cpp's Q4_0.
    """
    t, weights = panels(math.log(1e-3), math.log(1e4), 600)
    m = t.exp()
    outside = 2 * distribution.tails(m)[0]
    law = size * 2 * distribution.density(m) * torch.exp((size - 1) * torch.log1p(-outside.clamp(max=1 - 1e-15)))
    scale = m / top
    ends = torch.tensor([-1.0] if signed else [-1.0, 1.0], dtype=torch.float64) * top
    distance = (ends[:, None] - torch.tensor(levels, dtype=torch.float64)).abs().amin(-1)
    largest = scale**2 * (distance**2).mean()
    others = squared_error(distribution, levels, scale, end=m) / (1 - outside).clamp(min=1e-15)
    return float((weights * m * law * (largest + (size - 1) * others)).sum()) / size


def lower_bound(distribution: Distribution, bits: float) -> float:
    """No code of `bits` per value has a smaller squared error (Shannon; met by the Gaussian only)."""
    return float(2.0 ** (2 * distribution.entropy()) / (2 * math.pi * math.e) * 4.0**-bits)


def decibels(error: float) -> float:
    """Signal-to-quantization-noise ratio of a squared error at variance 1; 6.02 dB are one bit."""
    return -10 * math.log10(error)
