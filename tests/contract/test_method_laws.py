"""Laws that every registered step obeys, on every kind of grid it may be given; one line in METHODS enrols it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.algorithms import METHODS, mixes
from fewbits.algorithms.base import ROLES, Solved, proxy_loss
from fewbits.algorithms.compose import Recipe, compose
from fewbits.calibration.stats import STATISTICS, Inputs
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.formats import parse_format
from fewbits.formats.mix import Weights, parse_weights

FORMATS = [
    "int4-asym-g64",
    "int3-g64",
    "int2-channel",
    "nf4-g64",
    "fp4_e2m1-g16",
    "fp8_e4m3-tensor",
    "int4-g48",
    "nvfp4",
    "mxfp4",
    "nf4-g64-dq",
    "lloyd3_fit-g64",
    "int3-min-g64",
    "int4-asym-g32@25+int2-g32",
]


def of_role(*roles: str) -> list[str]:
    return [name for name, step in METHODS.items() if step.role in roles]


def correlated(n: int, tokens: int, rho: float, seed: int = 0) -> tuple[Tensor, Inputs]:
    """(inputs, their statistics) of equicorrelated Gaussian inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    covariance = torch.full((n, n), rho, dtype=torch.float64).fill_diagonal_(1)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    return x, Inputs(hessian=2 / tokens * x.T @ x, mean_abs=x.abs().mean(0), tokens=tokens)


def solve(recipe: Recipe, weight: Tensor, format: Weights, inputs: Inputs, name: str = "layer") -> Solved:
    return mixes.solve(recipe.weights, recipe.refinements, weight, format, inputs, name)


@pytest.mark.parametrize("name", METHODS.names())
def test_a_step_says_what_it_is(name: str) -> None:
    step = METHODS.get(name)
    assert step.role in ROLES
    assert step.statistics <= set(STATISTICS)
    assert (step.__doc__ or "").strip()
    assert compose(name).names[0 if step.role in ("rewrite", "transform") else -1] == name


@pytest.mark.parametrize("name", METHODS.names())
def test_options_are_checked_when_a_step_is_composed(name: str) -> None:
    for option, default in vars(METHODS.get(name)()).items():
        assert getattr(compose(name, {f"{name}.{option}": default}).steps[name], option) == default
        with pytest.raises(BadInput, match=rf"option {name}\.{option} <object"):
            compose(name, {f"{name}.{option}": object()})


# Methods that look at no data are not judged by the outputs (their own laws: tests/unit/test_<method>.py).
CALIBRATED = [name for name in of_role("weights", "refine") if METHODS.get(name).statistics]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("method", CALIBRATED)
def test_never_worse_than_rounding_on_its_own_objective(method: str, format_name: str) -> None:
    _, inputs = correlated(160, 1000, 0.6)
    assert inputs.hessian is not None
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(1))
    before = weight.clone(), inputs.hessian.clone()
    format = parse_weights(format_name).with_scale_dtype(torch.bfloat16)
    solved = solve(compose(method), weight, format, inputs)
    ours = proxy_loss(weight - solved.quantized.dequantize(), inputs.hessian).sum()
    nearest = proxy_loss(weight - format.quantize(weight).dequantize(), inputs.hessian).sum()
    assert float(ours) <= float(nearest) * (1 + 1e-6)
    assert solved.quantized.shape == (24, 160)
    assert torch.equal(weight, before[0]) and torch.equal(inputs.hessian, before[1]), "inputs are left alone"


@pytest.mark.parametrize("method", of_role("weights"))
def test_non_finite_weights_are_refused_by_name(method: str) -> None:
    weight = torch.ones(4, 64)
    weight[2, 3] = torch.nan
    with pytest.raises(BadInput, match=r"blocks\.0\.q_proj"):
        solve(compose(method), weight, parse_format("int4-g32"), Inputs(hessian=torch.eye(64)), "blocks.0.q_proj")


@pytest.mark.parametrize("method", of_role("weights", "refine"))
def test_same_input_same_codes(method: str) -> None:
    _, inputs = correlated(128, 500, 0.5)
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    first, second = (solve(compose(method), weight, parse_format("int3-asym-g32"), inputs) for _ in "ab")
    assert torch.equal(first.quantized.codes, second.quantized.codes)


@pytest.mark.parametrize("method", of_role("weights", "refine"))
def test_rows_are_solved_as_if_alone(method: str) -> None:
    """Linears that share an input are stacked, solved together and taken apart again."""
    _, inputs = correlated(128, 500, 0.5)
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    format = parse_format("int3-asym-g32")
    whole = solve(compose(method), weight, format, inputs).quantized
    part = solve(compose(method), weight[16:32], format, inputs).quantized
    same = (whole.codes[16:32] == part.codes).float().mean()
    assert float(same) > 0.99  # sums over more rows may round differently


# --- inputs on which such methods have failed before ----------------------------------------------

MAKING_CODES = of_role("weights", "refine", "residual")


def values(method: str, format_name: str, weight: Tensor, inputs: Inputs, name: str = "layer") -> Tensor:
    """What a linear computes with after `method`, scales stored in the dtype of the smallest range."""
    format, recipe = parse_weights(format_name).with_scale_dtype(torch.float16), compose(method)
    found, beside = solve(recipe, weight, format, inputs, name), torch.zeros(())
    if recipe.residual is not None:
        done = recipe.residual.correct(
            found, [weight], inputs, name, lambda other: solve(recipe, other, format, inputs, name)
        )
        assert done.residuals[0] is not None
        found, beside = done.solved, done.residuals[0].dense()
    return found.quantized.dequantize() + beside


@pytest.mark.parametrize("method", MAKING_CODES)
def test_groups_rows_and_tensors_of_zeros_stay_zero(method: str) -> None:
    _, inputs = correlated(128, 500, 0.5)
    for format_name in FORMATS:
        weight = torch.randn(12, 128, generator=torch.Generator().manual_seed(4))
        weight[3], weight[5, :64] = 0, 0
        found = values(method, format_name, weight, inputs)
        assert bool(torch.isfinite(found).all()) and not bool(found[3].any()), format_name
        assert not bool(values(method, format_name, torch.zeros(12, 128), inputs).any()), format_name


@pytest.mark.parametrize("method", MAKING_CODES)
def test_weights_below_the_smallest_scale_give_no_nan(method: str) -> None:
    """A scale that underflows to 0 makes 0 / 0 of every weight of its group."""
    _, inputs = correlated(128, 500, 0.5)
    weight = torch.randn(12, 128, generator=torch.Generator().manual_seed(5))
    for format_name in FORMATS:
        for magnitude in (1e-44, 1e-38, 1e-30, 1e-9):
            found = values(method, format_name, weight * magnitude, inputs)
            assert bool(torch.isfinite(found).all()), (format_name, magnitude)


@pytest.mark.parametrize("method", MAKING_CODES)
def test_columns_that_no_token_reached_keep_their_weights(method: str) -> None:
    """Zeroing them, as GPTQ's first code does, breaks every input that calibration did not happen to hold."""
    _, inputs = correlated(128, 500, 0.5)
    dead = [0, 9, 77]
    assert inputs.hessian is not None
    inputs.hessian[dead], inputs.hessian[:, dead] = 0, 0
    weight = torch.randn(12, 128, generator=torch.Generator().manual_seed(6))
    for format_name in FORMATS:
        found = values(method, format_name, weight, inputs)
        nearest = parse_weights(format_name).with_scale_dtype(torch.float16).quantize(weight).dequantize()
        lost = [float((weight - each)[:, dead].norm()) for each in (found, nearest)]
        assert lost[0] <= 1.3 * lost[1], format_name


@pytest.mark.parametrize("method", MAKING_CODES)
def test_fewer_tokens_than_columns_are_enough(method: str) -> None:
    x = torch.randn(10, 128, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weight = torch.randn(12, 128, generator=torch.Generator().manual_seed(8))
    for format_name in FORMATS:
        found = values(method, format_name, weight, Inputs(hessian=2 / 10 * x.T @ x, tokens=10))
        assert bool(torch.isfinite(found).all()), format_name
        assert float((weight - found).norm()) < 2 * float(weight.norm()), "directions nobody saw are not given away"


@pytest.mark.parametrize("method", [name for name in MAKING_CODES if "hessian" in METHODS.get(name).statistics])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_hessian_that_overflowed_is_refused_by_name(method: str, value: float) -> None:
    _, inputs = correlated(64, 500, 0.5)
    assert inputs.hessian is not None
    inputs.hessian[3, 3] = value
    with pytest.raises(FewbitsError, match=r"blocks\.0\.down_proj: .*overflowed"):
        values(method, "int4-g32", torch.ones(4, 64), inputs, "blocks.0.down_proj")
