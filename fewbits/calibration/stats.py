"""Statistics of a layer's inputs: sums that can be added up in any order and merged across machines.

    H = (2/n) sum_t x_t x_t^T        [in, in], n tokens

is the Hessian of the mean squared output error with respect to a row of the weight. Where the inputs of the
original model are known too (x', what x would be had nothing been quantized before),

    C = (2/n) sum_t (x'_t - x_t) x_t^T        [in, in]

says how far the inputs have drifted, in the directions that this layer can still correct. Products are taken in
float32 per batch and accumulated in float64: one sink token of magnitude 26,000 would otherwise drown the
contribution of thousands of ordinary ones.

`rows` are a sample of the inputs themselves, every so many tokens: what is rounded to few bits is no linear function of
its input, and no sum of products tells its error. `reference` is no sum either: a step that asks for it compares whole
blocks, and the text runs through the original model too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.formats.rows import sinks

STATISTICS = ("hessian", "cross", "mean_abs", "max_abs", "rows", "reference")
ROWS = 256  # at least so many tokens are kept, where there are so many, and less than twice as many


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is known of the inputs of a linear; None where no step asked for it.

    hessian: H [in, in], float64, undamped.  cross: C [in, in].  mean_abs: mean |x| per channel [in].
    max_abs: the largest |x| per channel [in].  ordinary: the same without sink tokens (formats/rows.py).
    rows: some of the inputs, float32 [tokens, in].
    """

    hessian: Tensor | None = None
    cross: Tensor | None = None
    mean_abs: Tensor | None = None
    max_abs: Tensor | None = None
    ordinary: Tensor | None = None
    rows: Tensor | None = None
    tokens: int = 0

    def divided(self, s: Tensor) -> Inputs:
        """The statistics of x / s, `s` [in] positive: what a linear sees once its input was scaled down."""

        def both(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else matrix / torch.outer(s, s).to(matrix.dtype)

        def each(values: Tensor | None) -> Tensor | None:
            return None if values is None else values / s.to(values.dtype)

        return dataclasses.replace(
            self, hessian=both(self.hessian), cross=both(self.cross), mean_abs=each(self.mean_abs),
            max_abs=each(self.max_abs), ordinary=each(self.ordinary), rows=each(self.rows),
        )  # fmt: skip


class InputSum:
    """Running sums over tokens of what `wanted` names; `inputs()` normalises them."""

    def __init__(self, in_features: int, wanted: frozenset[str], device: torch.device | str = "cpu") -> None:
        self.wanted, self.device = wanted, device

        def matrix(name: str) -> Tensor | None:
            if name not in wanted:
                return None
            return torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

        self.total, self.cross = matrix("hessian"), matrix("cross")
        self.magnitude = torch.zeros(in_features, dtype=torch.float64, device=device) if "mean_abs" in wanted else None
        self.largest = torch.zeros(in_features, device=device) if "max_abs" in wanted else None
        self.ordinary = None if self.largest is None else torch.zeros_like(self.largest)
        self.rows = torch.zeros(0, in_features, device=device) if "rows" in wanted else None
        self._stride = 1
        self.tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Adds inputs `x` [..., in]; `original` are the same tokens' inputs in the original model."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        if self.total is not None:
            self.total += x.t() @ x
        if self.cross is not None and original is not None:
            drift = original.detach().reshape(-1, x.shape[-1]).float() - x
            self.cross += drift.t() @ x
        if self.magnitude is not None:
            self.magnitude += x.abs().sum(dim=0, dtype=torch.float64)
        if self.largest is not None:
            assert self.ordinary is not None
            self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
            self.ordinary = torch.maximum(self.ordinary, x[~sinks(x)].abs().amax(dim=0))
        if self.rows is not None:
            self._keep(x[-self.tokens % self._stride :: self._stride], self._stride)
        self.tokens += len(x)

    def _keep(self, x: Tensor, stride: int) -> None:
        """Adds rows that are every `stride`-th of their tokens; thins all out when they are too many."""
        assert self.rows is not None
        self._stride = max(self._stride, stride)
        self.rows = torch.cat([self.rows, x.to(self.rows.device)])
        while len(self.rows) >= 2 * ROWS:
            self.rows = self.rows[::2].clone()
            self._stride *= 2

    def merge(self, other: InputSum) -> None:
        """Adds what `other` has seen; equal to having seen both inputs here."""
        for mine, theirs in (
            (self.total, other.total),
            (self.cross, other.cross),
            (self.magnitude, other.magnitude),
        ):
            if mine is not None and theirs is not None:
                mine += theirs.to(mine.device)
        if self.largest is not None and other.largest is not None:
            self.largest = torch.maximum(self.largest, other.largest.to(self.largest.device))
        if self.ordinary is not None and other.ordinary is not None:
            self.ordinary = torch.maximum(self.ordinary, other.ordinary.to(self.ordinary.device))
        if self.rows is not None and other.rows is not None:
            self._keep(other.rows, other._stride)
        self.tokens += other.tokens

    def inputs(self, name: str) -> Inputs:
        """What was seen; zero if no token came by. FewbitsError naming the layer if it overflowed."""
        for total in (self.total, self.cross, self.magnitude, self.largest, self.rows):
            if total is not None and not bool(torch.isfinite(total).all()):
                raise FewbitsError(
                    f"{name}: calibration inputs are NaN or infinite; run calibration in float32 or bfloat16"
                )
        count = max(self.tokens, 1)
        return Inputs(
            hessian=None if self.total is None else self.total * (2 / count),
            cross=None if self.cross is None else self.cross * (2 / count),
            mean_abs=None if self.magnitude is None else self.magnitude / count,
            max_abs=self.largest,
            ordinary=self.ordinary,
            rows=self.rows,
            tokens=self.tokens,
        )
