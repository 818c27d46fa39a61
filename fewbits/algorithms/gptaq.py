"""GPTAQ: GPTQ that also undoes what earlier layers did to the inputs.

GPTQ asks a layer to reproduce W x on the inputs x it gets. Once earlier layers are quantized those are not the inputs
x' of the original model, and it is W x' that the next layer should see. With C = (2/n) sum (x' - x) x^T,

    ||W x' - Q x||^2  =  tr((W - Q) H (W - Q)^T) + 2 tr((W - Q) C^T W^T) + constant

and the column-by-column solution gets a second update: beside the error of column i, its part in the drift,

    P = strength * striu(C U^T) U,     w_j += w_i P_ij  for every j > i           (striu: strictly upper)

The drift that 16 k tokens show is partly noise that a full correction would fit; the authors take a quarter of it.
With x' = x it is GPTQ, bit for bit. It pays where much was lost before: at 3 and 2 bits.
Source: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization with Asymmetric Calibration", arXiv 2504.02692.
(Not to be confused with the file layout called gptq_v2.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import proxy_loss
from fewbits.algorithms.gptq import GPTQ
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class GPTAQ(GPTQ):
    """GPTQ with asymmetric calibration. strength: share of the drift to correct; 0 is GPTQ."""

    statistics: ClassVar[frozenset[str]] = frozenset({"hessian", "cross"})

    strength: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise BadInput(f"strength {self.strength}; a share of the drift from 0 to 1, e.g. 0.25")

    def _pull(self, inputs: Inputs, upper: Tensor, order: Tensor) -> Tensor | None:
        if inputs.cross is None or not self.strength or not bool(inputs.cross.any()):
            return None
        cross = inputs.cross.to(upper.dtype)[order][:, order]
        return self.strength * (torch.triu(cross @ upper.t(), 1) @ upper)

    def _objective(self, delta: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.hessian is not None
        own = proxy_loss(delta, inputs.hessian)
        if inputs.cross is None:
            return own
        target = weight @ inputs.cross.to(weight.dtype)
        return own + 2 * self.strength * (delta * target).sum(dim=1, dtype=torch.float64)
