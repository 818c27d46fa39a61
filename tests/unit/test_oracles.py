"""Formats against numbers computed elsewhere, to many digits (tests/data/oracles.json), and published tables."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.formats import lloyd_max, parse_format
from fewbits.formats.elements import ELEMENTS, NARROW

ORACLES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "oracles.json").read_text(encoding="utf-8"))
COUNTS = [2, 4, 8, 16, 32, 64, 128, 256]


def gaussian_error(levels: tuple[float, ...]) -> float:
    """Expected squared error of nearest rounding of N(0,1), in closed form."""
    edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]

    def moments(x: float) -> tuple[float, float, float]:  # integrals of 1, x and x² times the density, up to x
        below = math.erfc(-x / math.sqrt(2)) / 2
        density = 0.0 if math.isinf(x) else math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return below, -density, below - (0.0 if math.isinf(x) else x * density)

    total = 0.0
    for level, a, b in zip(levels, edges, edges[1:], strict=False):
        zeroth, first, second = (right - left for left, right in zip(moments(a), moments(b), strict=True))
        total += second - 2 * level * first + level * level * zeroth
    return total


@pytest.mark.parametrize("count", COUNTS)
def test_lloyd_max_of_the_gaussian(count: int) -> None:
    oracle, levels = ORACLES["gauss"][str(count)], lloyd_max.gaussian(count)
    assert levels[count // 2 :] == pytest.approx(oracle["levels_pos"], abs=1e-9)
    assert gaussian_error(levels) == pytest.approx(oracle["D_lloyd"], rel=1e-6)
    assert gaussian_error(levels) >= 1 / count**2  # the rate-distortion bound, 4**-bits


@pytest.mark.parametrize("count", COUNTS)
def test_optimal_uniform_grids_of_the_gaussian(count: int) -> None:
    """The published steps are where the error of our levels is least, and it is the published error."""
    oracle = ORACLES["gauss"][str(count)]
    grids = {
        "uniform_midrise": [i + 0.5 for i in range(-count // 2, count // 2)],
        "sym_midtread": list(NARROW[f"int{count.bit_length() - 1}"].levels) if count > 2 else None,
        "twoscomp": list(ELEMENTS[f"int{count.bit_length() - 1}"].levels) if count > 2 else None,
    }
    for name, levels in grids.items():
        if levels is None:
            continue
        step, least = oracle[f"{name}_step"], oracle[f"{name}_D"]
        found = [gaussian_error(tuple(step * factor * level for level in levels)) for factor in (0.99, 1.0, 1.01)]
        assert found[1] == pytest.approx(least, rel=1e-6)
        assert found[1] < found[0] and found[1] < found[2]


def test_no_grid_beats_lloyd_max() -> None:
    for grid in ELEMENTS.values():
        best = gaussian_error(lloyd_max.gaussian(1 << grid.bits))
        for sigma in (1.0, 2.0, 3.0):
            scaled = tuple(level * sigma / grid.top for level in grid.levels)
            assert gaussian_error(scaled) >= best * (1 - 1e-9)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_a_codebook_fitted_to_gaussian_samples_is_nearly_the_gaussian_one(bits: int) -> None:
    w = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    levels = lloyd_max.fit(w, 1 << bits)
    assert gaussian_error(levels) == pytest.approx(ORACLES["gauss"][str(1 << bits)]["D_lloyd"], rel=0.01)


def test_normal_float_is_what_its_quantiles_give() -> None:
    """QLoRA's code: quantiles at 8 and 7 even steps up to 0.9677083, and an exact zero; normalised."""
    offset = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    normal = torch.distributions.Normal(0.0, 1.0)

    def steps(count: int) -> list[float]:
        return normal.icdf(torch.linspace(offset, 0.5, count, dtype=torch.float64)[:-1]).tolist()

    levels = sorted([*steps(9), 0.0, *(-value for value in steps(8))])
    assert ELEMENTS["nf4"].levels == pytest.approx([level / max(levels) for level in levels], abs=2e-7)


def test_dynamic_map_has_its_known_shape() -> None:
    levels = ELEMENTS["dynamic8"].levels
    assert len(set(levels)) == 256 and levels.count(0.0) == 1 and max(levels) == 1
    assert min(levels) == pytest.approx(-0.99296874, abs=1e-8)
    assert abs(sum(levels) - 1) < 1e-6
    unsigned = ELEMENTS["dynamic8u"].levels
    assert unsigned[1] == pytest.approx(3.25e-7, rel=1e-5) and unsigned[-2] == pytest.approx(0.9964844, abs=1e-7)


@pytest.mark.parametrize(("name", "count", "top"), [("fp8_e4m3", 253, 448.0), ("fp8_e5m2", 247, 57344.0)])
def test_fp8_saturates_and_counts(name: str, count: int, top: float) -> None:
    grid = ELEMENTS[name]
    assert len(grid.levels) == count and grid.levels[-1] == top
    x = torch.tensor([top, 1.03 * top, 2 * top, -5 * top])
    assert grid.snap(x).tolist() == [top, top, top, -top]


def test_every_code_of_torch_fp8_is_a_level() -> None:
    for name, dtype in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        assert sorted(set(values[torch.isfinite(values)].tolist())) == sorted(ELEMENTS[name].levels)


def test_e2m1_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(ELEMENTS["fp4_e2m1"].snap(ties), expected)
    assert torch.equal(ELEMENTS["fp4_e2m1"].snap(-ties), -expected)


@pytest.mark.parametrize(("minifloat", "integer"), [("fp4_e1m2", "int4"), ("fp8_e1m6", "int8")])
def test_one_exponent_bit_is_an_integer(minifloat: str, integer: str) -> None:
    levels, whole = ELEMENTS[minifloat].levels, NARROW[integer].levels
    assert [level * whole[-1] / levels[-1] for level in levels] == list(whole)


BLOCKS = [("nf4", "NF4"), ("af4", "AF4-64"), ("fp4_bnb", "FP4 bnb"), ("fp4_e2m1", "FP4 E2M1 (OCP)")]
BLOCKS += [("fp4_e3m0", "FP4 E3M0"), ("fp8_e4m3", "E4M3FN")]
BLOCKS += [(f"int{bits}-narrow", f"INT{bits} sym +-{(1 << bits - 1) - 1}") for bits in (2, 3, 4, 8)]


@pytest.mark.parametrize(("element", "oracle"), BLOCKS)
@pytest.mark.parametrize("size", [16, 64, 256])
def test_error_of_absmax_blocks_on_gaussian_weights(element: str, oracle: str, size: int) -> None:
    w = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(size))
    error = float((w - parse_format(f"{element}-g{size}").quantize(w).dequantize()).square().mean())
    assert error == pytest.approx(ORACLES["gaussian_absmax_block_mse"][oracle][str(size)], rel=0.006)


def test_microscaling_formats_on_gaussian_weights() -> None:
    w = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(3))

    def error(name: str) -> float:
        return float((w - parse_format(name).quantize(w).dequantize()).square().mean())

    assert error("mxfp4") == pytest.approx(1.321880e-2, rel=0.005)
    assert error("nvfp4") == pytest.approx(9.043913e-3, rel=0.005)
    assert error("nvfp4_4over6") / error("nvfp4") == pytest.approx(0.836, abs=0.005)


def test_four_over_six_takes_four_where_it_is_better() -> None:
    """[10, 20, 30, 40]: on 6, at the E4M3 scale 6.5, the mean squared error is 4.328125; on 4 it is 0."""
    x = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert float((ELEMENTS["fp4_e2m1"].snap(x / 6.5) * 6.5 - x).square().mean()) == 4.328125
    w = torch.zeros(1, 16)
    w[0, :4] = x
    assert torch.allclose(parse_format("nvfp4_4over6").quantize(w).dequantize(), w, rtol=1e-6, atol=0)


def test_double_quantization_takes_the_published_bits() -> None:
    shape = (4096, 4096)
    assert parse_format("nf4-g64-dq").bits_per_weight(shape) - 4 == pytest.approx(0.126953125, abs=1e-5)
    assert parse_format("mxfp4").bits_per_weight(shape) == 4.25
    assert parse_format("nvfp4").bits_per_weight(shape) == pytest.approx(4.5, abs=1e-5)


def test_fp8_is_free_of_scale_on_gaussian_weights() -> None:
    w = torch.randn(1 << 20, generator=torch.Generator().manual_seed(5))
    for scale in (1.0, 3.7, 20.0):
        error = (ELEMENTS["fp8_e4m3"].snap(w * scale) / scale - w).square().mean()
        assert 31.48 < -10 * math.log10(float(error)) < 31.59


MIN_MAX = {32: (0.16472, 0.029906, 0.0065073, 2.2531e-5), 64: (0.20865, 0.038066, 0.0082881, 2.8682e-5)}
MIN_MAX[128] = (0.25266, 0.046383, 0.010098, 3.4940e-5)


@pytest.mark.parametrize("size", MIN_MAX)
def test_error_of_min_max_blocks_on_gaussian_weights(size: int) -> None:
    """GPTQ's asymmetric quantizer; the published figures are good to 0.1 %, our sample to 0.5 %."""
    w = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(size))
    for bits, expected in zip((2, 3, 4, 8), MIN_MAX[size], strict=True):
        found = parse_format(f"int{bits}-asym-g{size}").quantize(w).dequantize()
        assert float((w - found).square().mean()) == pytest.approx(expected, rel=0.006)


def test_double_quantization_saves_what_qlora_says() -> None:
    saved = parse_format("nf4-g64").bits_per_weight((8192, 8192)) - parse_format("nf4-g64-dq").bits_per_weight(
        (8192, 8192)
    )
    assert 65e9 * saved / 8 == pytest.approx(3.03e9, rel=0.001)
