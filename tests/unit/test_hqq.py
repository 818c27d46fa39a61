"""HQQ's own laws: its error never grows, zero errors do no harm, every kind of grid is served."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.algorithms.hqq import HQQ
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput
from fewbits.formats import parse_format


def heavy(rows: int = 64, columns: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(rows, columns, generator=generator)
    return gaussian / torch.randn(rows, columns, generator=generator).abs().clamp(min=0.3)


def cost(weight: Tensor, found: Tensor) -> float:
    return float((weight - found).abs().pow(0.7).sum())


@pytest.mark.parametrize(
    "name",
    ["int4-min-g64", "int4-asym-g64", "int3-asym-channel", "int2-min-g32", "int4-g48", "nf4-g64", "fp4_e2m1-g16"],
)
def test_its_error_is_below_that_of_rounding(name: str) -> None:
    weight, format = heavy(), parse_format(name)
    before = weight.clone()
    found = HQQ().solve(weight, format, Inputs(), "w").quantized.dequantize()
    assert torch.equal(weight, before)
    gain = cost(weight, found) / cost(weight, format.quantize(weight).dequantize())
    assert gain < 0.99


def test_a_real_minimum_gains_most() -> None:
    weight = heavy()
    gains = {}
    for name in ("int2-min-g64", "int2-asym-g64"):
        format = parse_format(name)
        found = HQQ().solve(weight, format, Inputs(), "w").quantized.dequantize()
        gains[name] = cost(weight, found) / cost(weight, format.quantize(weight).dequantize())
    assert gains["int2-min-g64"] < gains["int2-asym-g64"] < 1 and gains["int2-min-g64"] < 0.8


def test_weights_on_the_grid_stay_there() -> None:
    """Every error is zero, and 0 to the power p - 1 infinite."""
    format = parse_format("int4-asym-g64")
    on_grid = format.quantize(heavy()).dequantize()
    again = HQQ().solve(on_grid, format, Inputs(), "w").quantized.dequantize()
    assert torch.allclose(again, on_grid, rtol=1e-5, atol=1e-6)
    zeros = torch.zeros(4, 128)
    assert torch.equal(HQQ().solve(zeros, format, Inputs(), "w").quantized.dequantize(), zeros)


def test_a_short_last_group_is_fitted_to_its_own_values() -> None:
    weight = heavy(columns=100)
    whole = HQQ().solve(weight, parse_format("int3-min-g64"), Inputs(), "w").quantized
    last = HQQ().solve(weight[:, 64:], parse_format("int3-min-channel"), Inputs(), "w").quantized
    # The unit of the error is the tensor's, so the two may stop at different points, and hardly differ.
    a, b = whole.dequantize()[:, 64:], last.dequantize()
    assert cost(weight[:, 64:], a) == pytest.approx(cost(weight[:, 64:], b), rel=0.02)


def test_scales_that_depend_on_each_other_are_told() -> None:
    solved = HQQ().solve(heavy(), parse_format("nf4-g64-dq"), Inputs(), "w")
    assert "rounded to nearest" in solved.notes[0]


def test_options_are_checked() -> None:
    with pytest.raises(BadInput, match="0 < norm <= 1"):
        HQQ(norm=2.0)
