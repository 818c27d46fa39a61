"""A mean with its standard error.

Tokens of one text are not independent: a hard passage is hard for many tokens on end, and dividing by the
square root of the token count would claim more certainty than there is. So values are first averaged over
blocks (here the sequences, which are far apart in the text), and the spread of the block means gives the
error:  stderr = std(block means) / sqrt(number of blocks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """mean ± stderr over `n` values; stderr is NaN when there was one block only."""

    mean: float
    stderr: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-ready: what is not finite becomes None."""
        return {"mean": finite(self.mean), "stderr": finite(self.stderr), "n": self.n}

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if math.isnan(self.stderr) else f"{self.mean:.4g} ± {self.stderr:.2g}"


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no word for it."""
    return float(value) if math.isfinite(value) else None


def block_estimate(values: torch.Tensor, block: int | None = None) -> Estimate:
    """The mean of `values` and its standard error by blocks.

    values: [blocks, block] when `block` is None, or flat with `block` values each (the last may be shorter:
    it is weighted by its length in the mean and counts as one block in the error).
    """
    flat = values.detach().to(torch.float64).cpu()
    if flat.numel() == 0:
        raise ValueError("no values to estimate from")
    parts = list(flat.unbind(0)) if block is None else list(flat.reshape(-1).split(block))
    means = torch.stack([part.mean() for part in parts])
    stderr = float(means.std(correction=1)) / math.sqrt(len(parts)) if len(parts) > 1 else math.nan
    return Estimate(mean=float(flat.mean()), stderr=stderr, n=flat.numel())
