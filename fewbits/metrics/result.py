"""The outcome of an evaluation: numbers with error bars, and the record to repeat them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fewbits.metrics import Estimate, block_estimate
from fewbits.metrics.estimate import finite


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(original || model) per token, in nats: mean ± stderr (by sequences), median, 99th percentile."""

    mean: float
    stderr: float
    median: float
    p99: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        values = {name: finite(getattr(self, name)) for name in ("mean", "stderr", "median", "p99")}
        return {**values, "n": self.n}

    def __str__(self) -> str:
        return str(Estimate(mean=self.mean, stderr=self.stderr, n=self.n))


@dataclass(frozen=True, kw_only=True)
class PositionBin:
    """Mean KL over the tokens at positions start <= t < end of their windows."""

    start: int
    end: int
    kl: Estimate

    def to_dict(self) -> dict[str, float | int | None]:
        return {"start": self.start, "end": self.end, **self.kl.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `model` loses against `against` (None: perplexity alone, and the fields that compare are None).

    what: the label of the row in tables ("original", "rtn", "gptq", ...).
    method: how the numbers were taken, in words. text: the description of the token windows.
    lost: nats per token by which the negative log-likelihood rose, the logarithm of the ratio of perplexities. Its
    error is that of the differences, far below those of the two perplexities.
    record: machine, versions, date and command.
    """

    what: str
    model: str
    against: str | None
    method: str
    dtype: str
    device: str
    perplexity: Estimate
    reference_perplexity: Estimate | None
    kl: Divergence | None
    top1: Estimate | None
    lost: Estimate | None = None
    kl_by_position: tuple[PositionBin, ...] = ()
    text: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: no NaN, no infinity."""
        return {
            "what": self.what,
            "model": self.model,
            "against": self.against,
            "method": self.method,
            "dtype": self.dtype,
            "device": self.device,
            "perplexity": self.perplexity.to_dict(),
            "reference_perplexity": self.reference_perplexity and self.reference_perplexity.to_dict(),
            "kl": self.kl and self.kl.to_dict(),
            "top1": self.top1 and self.top1.to_dict(),
            "lost": self.lost and self.lost.to_dict(),
            "kl_by_position": [part.to_dict() for part in self.kl_by_position],
            "text": self.text,
            "seconds": self.seconds,
            "record": self.record,
        }


def divergence(values: torch.Tensor) -> Divergence:
    """Statistics of KL values [samples, sequence_length]; blocks are the samples."""
    estimate = block_estimate(values)
    median, p99 = np.quantile(values.double().numpy(), (0.5, 0.99))
    return Divergence(mean=estimate.mean, stderr=estimate.stderr, median=float(median), p99=float(p99), n=estimate.n)


def by_position(values: torch.Tensor) -> tuple[PositionBin, ...]:
    """KL values [samples, sequence_length] averaged over bins of positions, two bins an octave.

    Short contexts lose most and change fastest, so the first positions stand alone and later ones share.
    """
    length = values.shape[1]
    octaves = math.ceil(math.log2(length)) if length > 1 else 0
    edges = [0, *sorted({min(length, round(2 ** (half / 2))) for half in range(2 * octaves + 1)})]
    bins = itertools.pairwise(edges)
    return tuple(PositionBin(start=a, end=b, kl=block_estimate(values[:, a:b])) for a, b in bins)
