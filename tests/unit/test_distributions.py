"""Exact errors of rounding, against published figures and numbers computed elsewhere (tests/data/oracles.json)."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.core.errors import BadInput
from fewbits.formats import lloyd_max
from fewbits.formats.elements import ELEMENTS, NARROW
from fewbits.metrics.distributions import (
    DISTRIBUTIONS,
    Gaussian,
    Laplace,
    StudentT,
    best_scale,
    block_error,
    decibels,
    lower_bound,
    panels,
    squared_error,
)

ORACLES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "oracles.json").read_text(encoding="utf-8"))
ONE = torch.ones(1, dtype=torch.float64)

BEST = {
    "INT8_2c": ELEMENTS["int8"],
    "INT8_sym": NARROW["int8"],
    "E2M5": ELEMENTS["fp8_e2m5"],
    "E3M4": ELEMENTS["fp8_e3m4"],
    "E4M3_allfinite": ELEMENTS["fp8_e4m3_finite"],
    "E5M2_allfinite": ELEMENTS["fp8_e5m2_finite"],
    "E4M3FN": ELEMENTS["fp8_e4m3"],
    "E5M2_ieee": ELEMENTS["fp8_e5m2"],
    "INT4_2c": ELEMENTS["int4"],
    "INT4_sym": NARROW["int4"],
    "E2M1": ELEMENTS["fp4_e2m1"],
    "E3M0": ELEMENTS["fp4_e3m0"],
}
NAMES = {
    "uniform": "uniform[-1,1]",
    "gaussian": "gauss",
    "laplace": "laplace",
    "student-t 8": "student-t nu=8",
}
BLOCKS = {
    "NF4": ELEMENTS["nf4"],
    "AF4-64": ELEMENTS["af4"],
    "FP4 bnb": ELEMENTS["fp4_bnb"],
    "FP4 E2M1 (OCP)": ELEMENTS["fp4_e2m1"],
    "FP4 E3M0": ELEMENTS["fp4_e3m0"],
    "INT4 sym +-7": NARROW["int4"],
    "INT3 sym +-3": NARROW["int3"],
    "INT8 sym +-127": NARROW["int8"],
    "E4M3FN": ELEMENTS["fp8_e4m3"],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", BEST)
def test_optimal_clipping(name: str, format: str) -> None:
    oracle = ORACLES["format_sqnr_optimal_clip"][NAMES[name]][format]
    error = best_scale(DISTRIBUTIONS[name], BEST[format].levels)[1]
    assert decibels(error) == pytest.approx(oracle["sqnr_db"], abs=1e-4)


@pytest.mark.parametrize("nu, expected", [(4, {"E3M4": 34.92, "E4M3FN": 31.52, "E2M5": 27.90, "INT8_sym": 24.94})])
def test_heavy_tails_prefer_exponent_bits(nu: int, expected: dict[str, float]) -> None:
    found = {name: decibels(best_scale(StudentT(nu), BEST[name].levels, high=400.0)[1]) for name in expected}
    assert found == pytest.approx(expected, abs=0.02)
    of_three = {name: best_scale(StudentT(3), BEST[name].levels, high=400.0)[1] for name in expected}
    assert min(of_three, key=of_three.__getitem__) == "E4M3FN"


@pytest.mark.parametrize("format", BLOCKS)
def test_absmax_blocks_of_the_gaussian(format: str) -> None:
    grid = BLOCKS[format]
    for size, expected in ORACLES["gaussian_absmax_block_mse"][format].items():
        found = block_error(Gaussian(), grid.levels, max(map(abs, grid.levels)), int(size))
        assert found == pytest.approx(expected, rel=1e-8)


def test_a_signed_scale_always_meets_the_lowest_level() -> None:
    """llama.cpp's Q4_0, to the seven digits that are published."""
    expected = {16: 5.750949e-3, 32: 7.377443e-3, 64: 9.003416e-3, 128: 1.063329e-2}
    found = {size: block_error(Gaussian(), ELEMENTS["int4"].levels, 8.0, size, signed=True) for size in expected}
    assert found == pytest.approx(expected, rel=3e-7)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tails_are_the_integrals_of_the_density(name: str) -> None:
    distribution = DISTRIBUTIONS[name]
    points = torch.tensor([0.0, 0.3, 1.0, 1.7, 4.0, 30.0, torch.inf], dtype=torch.float64)
    zeroth, first, second = distribution.tails(points)
    assert zeroth[0] == pytest.approx(0.5) and second[0] == pytest.approx(0.5)  # mass 1, variance 1
    assert zeroth[-1] == first[-1] == second[-1] == 0
    t, weights = panels(math.log(1e-9), math.log(1e9), 4000)
    x = t.exp()
    for power, tail in enumerate((zeroth, first, second)):
        values = weights * x ** (power + 1) * distribution.density(x)
        for a, value in zip(points[:-1].tolist(), tail[:-1].tolist(), strict=True):
            assert value == pytest.approx(float(values[x > a].sum()), rel=2e-2, abs=1e-9)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_entropy_is_that_of_the_density(name: str) -> None:
    distribution = DISTRIBUTIONS[name]
    t, weights = panels(math.log(1e-9), math.log(1e9), 4000)
    x = t.exp()
    density = distribution.density(x)
    plog = torch.where(density > 0, density * density.clamp(min=1e-300).log2(), 0.0)
    assert distribution.entropy() == pytest.approx(float(-2 * (weights * x * plog).sum()), abs=2e-3)


@pytest.mark.parametrize("name", ["student-t 8", "outliers", "laplace"])
def test_the_error_is_the_mean_over_samples(name: str) -> None:
    """A Monte Carlo check of the whole chain, on distributions torch can sample."""
    torch.manual_seed(0)
    n = 1 << 21
    x = {
        "student-t 8": lambda: torch.distributions.StudentT(8.0).sample((n,)) / math.sqrt(8 / 6),
        "outliers": lambda: torch.randn(n) * torch.where(torch.rand(n) < 0.01, 10.0, 1.0) / math.sqrt(0.99 + 1),
        "laplace": lambda: torch.distributions.Laplace(0.0, math.sqrt(0.5)).sample((n,)),
    }[name]()
    for element in ("int4", "nf4", "fp4_e2m1", "fp8_e3m4"):
        grid, scale = ELEMENTS[element], 3.0 / ELEMENTS[element].top
        errors = (grid.snap(x / scale) * scale - x).square().double()
        exact = float(squared_error(DISTRIBUTIONS[name], grid.levels, ONE * scale))
        assert abs(float(errors.mean()) - exact) < 3.5 * float(errors.std()) / math.sqrt(n)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_lies_between_the_bound_and_every_format(name: str, bits: int) -> None:
    distribution = DISTRIBUTIONS[name]
    levels = lloyd_max.of(distribution, 1 << bits)
    error = float(squared_error(distribution, levels, ONE))
    assert error >= lower_bound(distribution, bits)
    if bits in (4, 8):
        for format in BEST.values():
            if format.bits == bits:
                assert best_scale(distribution, format.levels, high=1000.0)[1] > error
    nearby = torch.linspace(0.98, 1.02, 5, dtype=torch.float64)
    assert int(squared_error(distribution, levels, nearby).argmin()) == 2


@pytest.mark.parametrize("count", [2, 4, 8, 16, 32, 64, 128, 256])
def test_lloyd_max_of_any_distribution_is_the_published_one(count: int) -> None:
    for name, distribution in (("gauss", Gaussian()), ("laplace", Laplace())):
        oracle, levels = ORACLES[name][str(count)], lloyd_max.of(distribution, count)
        assert levels[count // 2 :] == pytest.approx(oracle["levels_pos"], abs=1e-8)
        assert float(squared_error(distribution, levels, ONE)) == pytest.approx(oracle["D_lloyd"], rel=1e-9)
        assert lower_bound(distribution, math.log2(count)) < oracle["D_lloyd"]
    assert lloyd_max.of(Gaussian(), count) == pytest.approx(lloyd_max.gaussian(count), abs=1e-11)
    assert lower_bound(Gaussian(), math.log2(count)) == pytest.approx(ORACLES["gauss"][str(count)]["rate_distortion"])


def test_an_odd_number_of_levels_is_refused() -> None:
    with pytest.raises(BadInput, match="even number"):
        lloyd_max.of(Gaussian(), 3)


def test_the_order_of_8_bit_formats_on_the_gaussian() -> None:
    """Van Baalen et al. 2023: E2M5 is best, then INT8; every further exponent bit costs."""
    names = ("fp8_e2m5", "int8_narrow", "fp8_e3m4", "fp8_e4m3_finite", "fp8_e5m2_finite")
    grids = {**ELEMENTS, "int8_narrow": NARROW["int8"]}
    errors = [best_scale(Gaussian(), grids[name].levels)[1] for name in names]
    gaps = [decibels(a) - decibels(b) for a, b in itertools.pairwise(errors)]
    assert gaps == pytest.approx([2.13, 2.98, 6.01, 5.97], abs=0.05)


def test_no_scalar_format_beats_the_rate_distortion_bound() -> None:
    for grid in ELEMENTS.values():
        _, error = best_scale(Gaussian(), grid.levels)
        assert error >= 4.0**-grid.bits
        assert error >= float(squared_error(Gaussian(), lloyd_max.gaussian(1 << grid.bits), ONE)) * (1 - 1e-9)
