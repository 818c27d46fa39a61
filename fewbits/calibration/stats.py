"""Statistics of a layer's inputs: sums that can be added up in any order and merged across machines.

    H = (2/n) sum_t x_t x_t^T        [in, in], n tokens

is the Hessian of the mean squared output error with respect to a row of the weight. Products are taken in
float32 per batch and accumulated in float64: one sink token of magnitude 26,000 would otherwise drown the
contribution of thousands of ordinary ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError


class HessianSum:
    """Running sum of x x^T over tokens; `hessian()` normalises it."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds inputs `x` [..., in]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if len(x):
            self.total += x.t() @ x
            self.tokens += len(x)

    def merge(self, other: HessianSum) -> None:
        """Adds what `other` has seen; equal to having seen both inputs here."""
        self.total += other.total.to(self.total.device)
        self.tokens += other.tokens

    def hessian(self, name: str) -> Tensor:
        """H [in, in], float64; zero if no token came by. FewbitsError naming the layer if it overflowed."""
        if not bool(torch.isfinite(self.total).all()):
            raise FewbitsError(
                f"{name}: calibration inputs are NaN or infinite; run calibration in float32 or bfloat16"
            )
        return self.total * (2 / max(self.tokens, 1))
