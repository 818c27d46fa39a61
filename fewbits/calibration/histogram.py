"""A histogram of a stream whose range nobody knows beforehand, and that can be merged.

`bins` equal bins on either side of zero cover [-reach, reach]. The reach is a power of two: when a larger value
comes by it doubles and every two neighbouring bins become one, so what was counted stays exactly where it was, and
histograms of different reach merge into the one that all the values at once would have given. Between half and all
of the bins of the wider side are in use. Minimum and maximum are kept exactly.

Resolution: reach / bins, under a thousandth of the largest magnitude with 2048 bins, the number TensorRT's entropy
calibration uses. Memory: 16 kB a side, whatever the length of the text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewbits.core.errors import BadInput, FewbitsError


class Histogram:
    """Counts of finite values, `bins` (even) on each side of zero."""

    def __init__(self, bins: int = 2048) -> None:
        if bins < 2 or bins % 2:
            raise BadInput(f"{bins} bins a side: an even number of at least 2 is needed")
        self.bins = bins
        self.counts = torch.zeros(2 * bins, dtype=torch.int64)
        self.exponent: int | None = None  # reach = 2**exponent; None before the first value that is not 0
        self.low, self.high = math.inf, -math.inf
        self.finite = True

    @property
    def reach(self) -> float:
        return 1.0 if self.exponent is None else math.ldexp(1.0, self.exponent)

    @property
    def width(self) -> float:
        """Of a bin."""
        return self.reach / self.bins

    @property
    def total(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    def add(self, x: Tensor) -> None:
        """Counts the values of `x`, any shape. NaN and infinities are not counted, and `check` will say so."""
        flat = x.detach().flatten().float()
        if not bool(torch.isfinite(flat).all()):
            self.finite = False
            flat = flat[flat.isfinite()]
        if not flat.numel():
            return
        low, high = (float(end) for end in torch.aminmax(flat))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._reach_to(max(-low, high))
        # In float64 the division by a power of two and the floor are exact: bin i is [i, i + 1) widths from -reach.
        index = (flat.double() / self.width).floor().to(torch.int64).add_(self.bins).clamp_(0, 2 * self.bins - 1)
        self.counts += torch.bincount(index, minlength=2 * self.bins).cpu()

    def merge(self, other: Histogram) -> None:
        """Adds what `other` has counted; equal to having seen both here."""
        if other.bins != self.bins:
            raise BadInput(f"histograms of {self.bins} and {other.bins} bins a side do not merge; make them alike")
        self.finite &= other.finite
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        counts = other.counts
        if other.exponent is not None:  # else it holds zeros only, which stay in their bin at any reach
            self._widen(other.exponent)
            for _ in range((self.exponent or 0) - other.exponent):
                counts = _halved(counts)
        self.counts = self.counts + counts

    def check(self, name: str) -> None:
        """FewbitsError naming the layer when a NaN or an infinity came by."""
        if not self.finite:
            raise FewbitsError(f"{name}: values are NaN or infinite; run in float32 or bfloat16")

    def samples(self) -> tuple[Tensor, Tensor]:
        """The middles of the bins in use and how many values each stands for (float64); the ends are exact."""
        used = self.counts.nonzero().flatten()
        middle = ((used - self.bins).double() + 0.5) * self.width
        if len(middle):
            middle[0], middle[-1] = self.low, self.high
        return middle.float(), self.counts[used].double()

    def magnitudes(self) -> Tensor:
        """Counts of |x| by bin (int64), up to the last that is not empty."""
        folded = self.counts[self.bins :] + self.counts[: self.bins].flip(0)
        used = folded.nonzero()
        return folded[: int(used[-1]) + 1] if len(used) else folded[:0]

    def _reach_to(self, magnitude: float) -> None:
        if magnitude > 0:  # the smallest power of two above it: the value itself falls into the last bin
            self._widen(math.frexp(magnitude)[1])

    def _widen(self, exponent: int) -> None:
        if self.exponent is None:  # only zeros so far: they are in the first bin above zero, at any reach
            self.exponent = exponent
        for _ in range(exponent - self.exponent):
            self.counts = _halved(self.counts)
        self.exponent = max(self.exponent, exponent)


def _halved(counts: Tensor) -> Tensor:
    """Counts at twice the reach."""
    half = len(counts) // 4
    pairs = counts.reshape(-1, 2).sum(1)
    return torch.cat([counts.new_zeros(half), pairs, counts.new_zeros(half)])
