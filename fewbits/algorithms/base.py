"""What a weight method is: a frozen dataclass of options with one `solve`.

A method declares in `statistics` what calibration must collect; calibration collects the union once. The
objective every calibrated method is judged by is the layer's output error over the calibration tokens,

    ||X (W - Q)^T||^2  =  n/2 * tr(dW H dW^T),     H = (2/n) sum x x^T.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fewbits.formats import Format, Quantized


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A quantized weight and what its solution needed (`notes`: retries, fallbacks; shown to the user).

    Calibrated methods report their objective per row [out]: `loss` of the result, `rtn_loss` of rounding to
    nearest, `zero_loss` of dropping the weight altogether (the scale the others are read against).
    """

    quantized: Quantized
    notes: list[str] = field(default_factory=list)
    loss: Tensor | None = None
    rtn_loss: Tensor | None = None
    zero_loss: Tensor | None = None


class WeightMethod(Protocol):
    """Turns a weight [out, in] into codes of `format`; leaves its inputs alone."""

    statistics: ClassVar[frozenset[str]]

    def solve(self, weight: Tensor, format: Format, hessian: Tensor | None, name: str) -> Solved: ...


def proxy_loss(delta: Tensor, hessian: Tensor) -> Tensor:
    """dW H dW^T per row of `delta` [out, in], summed in float64: twice the mean squared output error per token.

    The product is taken in the dtype of `delta`: float32 resolves a loss to about 1e-6 of its size.
    """
    return ((delta @ hessian.to(delta.dtype)) * delta).sum(dim=1, dtype=torch.float64)
