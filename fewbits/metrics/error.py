"""How far an approximation of a tensor is from the tensor.

    relative error   e = ||x - y||^2 / ||x||^2
    SQNR             10 log10(1 / e) dB: 6.02 dB is one bit

Both are energy ratios, so they compare layers of any scale; both are summed in float64, for the square of a
bf16 weight keeps few digits. An all-zero reference has no energy to compare with: the error is 0 when the
approximation is zero as well, infinite otherwise.
"""

from __future__ import annotations

import math

import torch


def relative_error(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """||reference - approximation||² / ||reference||² over all elements (same shape); 0 is exact."""
    if reference.shape != approximation.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(approximation.shape)}")
    exact = reference.detach().to(torch.float64)
    noise = float((exact - approximation.detach().to(torch.float64)).square().sum())
    signal = float(exact.square().sum())
    if signal == 0.0:
        return 0.0 if noise == 0.0 else math.inf
    return noise / signal


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantization-noise ratio in decibels; infinite when the two are equal."""
    error = relative_error(reference, approximation)
    if error == 0.0:
        return math.inf
    return -10.0 * math.log10(error) if math.isfinite(error) else -math.inf
