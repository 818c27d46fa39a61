"""GPTQ's own laws: identities of the paper's algorithm, and what it does where it cannot work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.algorithms.base import proxy_loss
from fewbits.algorithms.clipping import RangeSearch
from fewbits.algorithms.gptq import GPTQ
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.formats import Quantized, parse_format

PLAIN = {"act_order": False, "search": None, "static_groups": False}


def problem(
    n: int = 256, rows: int = 48, rho: float = 0.5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    covariance = torch.full((n, n), rho, dtype=torch.float64).fill_diagonal_(1)
    x = torch.randn(4096, n, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    return weight.to(dtype), (2 / len(x) * x.T @ x).to(dtype)


def decoded(q: Quantized, dtype: torch.dtype) -> Tensor:
    """Values in `dtype` throughout, so that identities are not blurred by a float32 decode."""
    scale, zero = q.format.expand(q.scale, q.zero, q.shape)
    return q.format.decode(q.codes, scale, zero, dtype)


def loss(weight: Tensor, q: Quantized, hessian: Tensor) -> float:
    return float(proxy_loss(weight - decoded(q, weight.dtype), hessian).sum())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("act_order", [False, True])
def test_output_error_is_the_sum_of_squared_step_errors(dtype: torch.dtype, tolerance: float, act_order: bool) -> None:
    """tr(dW Hd dW^T) == sum(((w - q) / U_ii)^2), Hd the damped Hessian: dW = E U."""
    weight, hessian = problem(dtype=dtype)
    format = parse_format("int4-asym-g64")
    method = GPTQ(act_order=act_order, search=None)
    order = torch.arange(256)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper, _ = method.factor(hessian[order][:, order], "w")
    quantized = method.solve(weight, format, Inputs(hessian=hessian), "w").quantized
    delta = (weight - decoded(quantized, dtype)).double()[:, order]
    damped = hessian.double()[order][:, order]
    damped.diagonal().add_(0.01 * hessian.double().diagonal().mean())
    left = ((delta @ damped) * delta).sum()
    # dW = E U, so the step errors are dW U^-1.
    errors = torch.linalg.solve_triangular(upper, delta, upper=True, left=False)
    assert float(left) == pytest.approx(float(errors.square().sum()), rel=tolerance)
    # and each is what the algorithm saw: within half a step of the grid, scaled by U_ii
    scale, _ = format.expand(quantized.scale, quantized.zero, quantized.shape)
    steps = (scale[:, order].double() / 2) / upper.diagonal()
    inside = (quantized.codes[:, order] > 0) & (quantized.codes[:, order] < 15)
    assert bool((errors.abs() <= steps * (1 + 1e-3))[inside].all())


def test_a_diagonal_hessian_gives_rounding_to_nearest() -> None:
    weight, hessian = problem()
    format = parse_format("int4-asym-g64")
    diagonal = torch.diag(hessian.diagonal())
    for options in (PLAIN, {"search": None}):
        q = GPTQ(**options).solve(weight, format, Inputs(hessian=diagonal), "w").quantized
        nearest = format.quantize(weight)
        assert torch.equal(q.codes, nearest.codes) and torch.equal(q.scale, nearest.scale)


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("format_name", ["int4-asym-g64", "int3-g48", "nf4-g64"])
def test_the_block_size_does_not_matter(format_name: str, static_groups: bool) -> None:
    weight, hessian = problem()
    results = [
        GPTQ(act_order=False, search=None, static_groups=static_groups, block_size=size)
        .solve(weight, parse_format(format_name), Inputs(hessian=hessian), "w")
        .quantized
        for size in (1, 16, 100, 128, 256)
    ]
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes) and torch.equal(results[0].scale, other.scale)


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = problem()
    format = parse_format("int3-asym-g64")
    first, second = (GPTQ().solve(weight, format, Inputs(hessian=hessian * c), "w").quantized for c in (1, 1024))
    assert torch.equal(first.codes, second.codes)
    third = GPTQ().solve(weight, format, Inputs(hessian=hessian * 3), "w").quantized
    assert torch.equal(first.codes, third.codes)


def test_infinite_damping_gives_rounding_to_nearest_but_for_ties() -> None:
    weight, hessian = problem()
    format = parse_format("int4-asym-g64")
    q = GPTQ(search=None, damping=1e9).solve(weight, format, Inputs(hessian=hessian), "w").quantized
    assert int((q.codes != format.quantize(weight).codes).sum()) <= 0.002 * weight.numel()


def test_unclipped_error_is_that_of_uniform_noise() -> None:
    """Step s, nothing clipped: mean row loss s^2/12 * sum 1/U_ii^2; no row above s^2/4 * sum 1/U_ii^2."""
    weight, hessian = problem(n=128, rows=600)
    step = 0.05
    # A 16-bit integer grid does not exist; a range wide enough on int8 does the same for |w| < 6.
    format = parse_format("int8-tensor")
    weight = weight.clamp(-5, 5)
    weight[0, 0] = step * 127.5
    method = GPTQ(act_order=False, search=None)
    upper, _ = method.factor(hessian, "w")
    q = method.solve(weight, format, Inputs(hessian=hessian), "w").quantized
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    rows = proxy_loss(weight - decoded(q, torch.float64), damped)[1:]
    unit = float(upper.diagonal().square().reciprocal().sum()) * step**2
    assert float(rows.mean()) == pytest.approx(unit / 12, rel=0.02)
    assert float(rows.max()) <= unit / 4


@pytest.mark.parametrize(("rho", "bound"), [(0.5, 0.6), (0.9, 0.2)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gain_over_rounding_on_correlated_inputs(rho: float, bound: float, bits: int) -> None:
    weight, hessian = problem(rho=rho, rows=384)  # the common mode is one number a row: average many
    format = parse_format(f"int{bits}-asym-g64")
    nearest = loss(weight, format.quantize(weight), hessian)
    plain = loss(weight, GPTQ(**PLAIN).solve(weight, format, Inputs(hessian=hessian), "w").quantized, hessian)
    ordered = loss(weight, GPTQ(search=None).solve(weight, format, Inputs(hessian=hessian), "w").quantized, hessian)
    assert plain / nearest < bound
    assert ordered <= plain * 1.02
    searched = loss(
        weight, GPTQ(search=RangeSearch()).solve(weight, format, Inputs(hessian=hessian), "w").quantized, hessian
    )
    assert searched < ordered


def test_dead_columns_keep_their_nearest_level() -> None:
    weight, hessian = problem()
    dead = [0, 63, 200]
    hessian[dead] = 0
    hessian[:, dead] = 0
    format = parse_format("int4-asym-g64")
    q = GPTQ(search=None).solve(weight, format, Inputs(hessian=hessian), "w").quantized
    assert torch.equal(q.codes[:, dead], format.quantize(weight).codes[:, dead])


def test_no_input_at_all_is_rounding_to_nearest_and_says_so() -> None:
    weight, _ = problem()
    format = parse_format("int4-asym-g64")
    solved = GPTQ(search=None).solve(weight, format, Inputs(hessian=torch.zeros(256, 256)), "expert")
    assert torch.equal(solved.quantized.codes, format.quantize(weight).codes)
    assert solved.notes == ["no input reached this layer: rounded to nearest"]


def test_fewer_tokens_than_columns_still_factors() -> None:
    weight, _ = problem()
    x = torch.randn(20, 256, dtype=torch.float64)
    solved = GPTQ().solve(weight, parse_format("int4-g64"), Inputs(hessian=2 / 20 * x.T @ x), "w")
    assert bool(torch.isfinite(solved.quantized.dequantize()).all()) and not solved.notes


def test_a_failing_cholesky_is_retried_with_more_damping_and_noted() -> None:
    weight, hessian = problem()
    # Rounding in a long accumulation can leave an eigenvalue below zero.
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * float(hessian.diagonal().mean())
    solved = GPTQ().solve(
        weight, parse_format("int4-g64"), Inputs(hessian=vectors @ torch.diag(values) @ vectors.T), "w"
    )
    assert solved.notes == ["Cholesky failed at damping 0.01, retried at 0.1"]


def test_a_hopeless_hessian_is_an_error_with_the_layer_and_the_way_out() -> None:
    weight, hessian = problem()
    indefinite = torch.full_like(hessian, -1e3).fill_diagonal_(1)
    with pytest.raises(FewbitsError, match=r"mlp\.down_proj: the Hessian cannot be factored .* more calibration text"):
        GPTQ().solve(weight, parse_format("int4-g64"), Inputs(hessian=indefinite), "mlp.down_proj")
    hessian[3, 3] = torch.inf
    with pytest.raises(FewbitsError, match="overflowed"):
        GPTQ().solve(weight, parse_format("int4-g64"), Inputs(hessian=hessian), "w")


@pytest.mark.parametrize(
    "options",
    [{"damping": 0}, {"damping": -1}, {"block_size": 0}, {"act_order": True, "static_groups": False}],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        GPTQ(**options)  # type: ignore[arg-type]
