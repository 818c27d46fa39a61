"""SmoothQuant's scales: divide what is hard in the activations into the weights.

    X W^T = (X diag(1/s)) (W diag(s))^T,      s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

An outlier channel of X spoils the one scale its tensor (or token) has, while weights are smooth. Any positive s leaves
the product as it is; alpha says how much of the difficulty moves. At 1/2 both sides end with the same largest
magnitude in every channel, sqrt(max|X_j| max|W_j|); models with larger outliers want 0.75 to 0.9.

max|W_j| runs over all linears that read the same X. The division by s is free where a norm precedes: it goes into
the norm's weight (and bias).
Source: Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.core.errors import BadInput

_SMALLEST = 1e-5  # of a column's magnitude and of a scale


def smoothing_scales(activations: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """s [in], positive, from max|X_j| `activations` [in] and the weights [out, in] that read X.

    Channels that were never active keep s = 1. BadInput for alpha outside [0, 1] or weights of another width.
    """
    if not 0 <= alpha <= 1:
        raise BadInput(f"alpha {alpha}: needs 0 <= alpha <= 1, e.g. 0.5")
    if any(weight.shape[1] != len(activations) for weight in weights):
        widths = ", ".join(str(weight.shape[1]) for weight in weights)
        raise BadInput(f"{len(activations)} activation channels for weights of {widths} columns")
    largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).clamp(min=_SMALLEST)
    scales = (activations.pow(alpha) / largest.to(activations.dtype).pow(1 - alpha)).clamp(min=_SMALLEST)
    return torch.where(activations > 0, scales, torch.ones_like(scales))
