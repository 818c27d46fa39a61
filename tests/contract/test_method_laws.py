"""Laws that every registered method obeys, on every kind of grid it may be given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.algorithms import METHODS
from fewbits.algorithms.base import proxy_loss
from fewbits.core.errors import BadInput
from fewbits.formats import parse_format

FORMATS = [
    "int4-asym-g64",
    "int3-g64",
    "int2-channel",
    "nf4-g64",
    "fp4_e2m1-g16",
    "fp8_e4m3-tensor",
    "int4-g48",
]


def correlated(n: int, tokens: int, rho: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(inputs, Hessian) of equicorrelated Gaussian inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    covariance = torch.full((n, n), rho, dtype=torch.float64).fill_diagonal_(1)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    return x, 2 / tokens * x.T @ x


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("method", METHODS.names())
def test_never_worse_than_rounding_on_its_own_objective(method: str, format_name: str) -> None:
    _, hessian = correlated(160, 1000, 0.6)
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(1))
    before = weight.clone(), hessian.clone()
    format = parse_format(format_name).with_scale_dtype(torch.bfloat16)
    solved = METHODS.get(method)().solve(weight, format, hessian, "layer")
    ours = proxy_loss(weight - solved.quantized.dequantize(), hessian).sum()
    nearest = proxy_loss(weight - format.quantize(weight).dequantize(), hessian).sum()
    assert float(ours) <= float(nearest) * (1 + 1e-6)
    assert solved.quantized.shape == (24, 160)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1]), "inputs are left alone"


@pytest.mark.parametrize("method", METHODS.names())
def test_non_finite_weights_are_refused_by_name(method: str) -> None:
    weight = torch.ones(4, 64)
    weight[2, 3] = torch.nan
    with pytest.raises(BadInput, match=r"blocks\.0\.q_proj"):
        METHODS.get(method)().solve(weight, parse_format("int4-g32"), torch.eye(64), "blocks.0.q_proj")


@pytest.mark.parametrize("method", METHODS.names())
def test_same_input_same_codes(method: str) -> None:
    _, hessian = correlated(128, 500, 0.5)
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    first, second = (METHODS.get(method)().solve(weight, parse_format("int3-asym-g32"), hessian, "w") for _ in "ab")
    assert torch.equal(first.quantized.codes, second.quantized.codes)
