"""Exact values: published tables, ties, sizes, names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import BadInput
from fewbits.formats import bits, parse_format, parse_scheme
from fewbits.formats.codebooks import NF4_LEVELS
from fewbits.formats.elements import ELEMENTS


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 8), rows=st.integers(1, 4), count=st.integers(1, 200), seed=st.integers(0, 1 << 30))
def test_packing_is_exact_dense_and_little_endian(width: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << width, (rows, count), generator=generator, dtype=torch.uint8)
    packed = bits.pack(codes, width)
    assert packed.shape == (rows, (count * width + 7) // 8)
    assert torch.equal(bits.unpack(packed, width, count), codes)
    # The definition: row as one little-endian number.
    number = sum(int(code) << (index * width) for index, code in enumerate(codes[0]))
    assert number == int.from_bytes(bytes(packed[0].tolist()), "little")


def test_a_code_too_large_is_refused() -> None:
    with pytest.raises(BadInput, match="code 4 does not fit in 2 bits"):
        bits.pack(torch.tensor([[4]], dtype=torch.uint8), 2)


def test_e4m3_has_the_published_values() -> None:
    levels = ELEMENTS["fp8_e4m3"].levels
    assert len(levels) == 253 and max(levels) == 448
    assert min(v for v in levels if v > 0) == 2**-9
    patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert sorted(set(patterns[torch.isfinite(patterns)].tolist())) == sorted(set(levels))


def test_e5m2_has_the_published_values() -> None:
    levels = ELEMENTS["fp8_e5m2"].levels
    assert len(levels) == 247 and max(levels) == 57344
    patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).float()
    assert sorted(set(patterns[torch.isfinite(patterns)].tolist())) == sorted(set(levels))


def test_e4m3_saturates_and_rounds_half_to_even() -> None:
    x = torch.tensor([449.0, 464.0, 465.0, 1e9, -1e9])
    assert ELEMENTS["fp8_e4m3"].snap(x).tolist() == [448, 448, 448, 448, -448]


@pytest.mark.parametrize(
    ("x", "level"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4), (9.0, 6)]
)
def test_e2m1_ties_go_to_the_even_code(x: float, level: float) -> None:
    grid = ELEMENTS["fp4_e2m1"]
    assert grid.snap(torch.tensor([x, -x])).tolist() == [level, -level]


def test_nf4_is_quantiles_of_the_normal_distribution() -> None:
    """QLoRA's code: 8 positive and 7 negative quantiles up to the mean of 1 - 1/30 and 1 - 1/32."""
    offset = 0.9677083
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    assert torch.allclose(values / values.max(), torch.tensor(NF4_LEVELS, dtype=torch.float64), atol=2e-7)


def test_a_tie_on_nf4_goes_to_the_lower_level() -> None:
    grid = ELEMENTS["nf4"]
    assert int(grid.nearest(torch.tensor([(grid.levels[14] + grid.levels[15]) / 2], dtype=torch.float64))) == 14


@pytest.mark.parametrize(("name", "expected"), [("nf4-g64", 8.460053e-3), ("fp4_e2m1-g64", 1.117379e-2)])
def test_block_error_on_a_gaussian_matches_the_integral(name: str, expected: float) -> None:
    """Mean squared error of absmax scaling over blocks of 64 of N(0,1), against the exact 1-D integral."""
    w = torch.randn(4000, 1024, generator=torch.Generator().manual_seed(0))
    error = (parse_format(name).quantize(w).dequantize() - w).square().mean()
    assert float(error) == pytest.approx(expected, rel=4e-3)


def test_fp8_error_on_a_gaussian_is_the_same_at_any_scale() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) * 17.0
    grid = ELEMENTS["fp8_e4m3"]
    sqnr = 10 * torch.log10(x.square().mean() / (x - grid.snap(x)).square().mean())
    assert 31.48 <= float(sqnr) <= 31.59


@pytest.mark.parametrize(
    ("name", "expected"),
    [("int4-asym-g128", 4.15625), ("nf4-g64", 4.25), ("int4-g64", 4.25), ("int8-channel", 8 + 16 / 4096)],
)
def test_bits_per_weight(name: str, expected: float) -> None:
    assert parse_format(name).with_scale_dtype(torch.float16).bits_per_weight((4096, 4096)) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4", "names no scaling; known: int4-g64"),
        ("int9-g64", "unknown format 'int9-g64'; known: int"),
        ("nf4-asym-g64", "only integer types take a zero point; use 'nf4-g64'"),
        ("int4-g0", "at least 1 weight"),
        ("", "unknown format"),
    ],
)
def test_bad_format_names_say_what_to_use(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_format(name)


def test_schemes() -> None:
    assert parse_scheme("w4a16").weights.name == "int4-g128"
    assert parse_scheme("W4A16_ASYM", 64).weights.name == "int4-asym-g64"
    assert parse_scheme("nf4-g64", 32).weights.name == "nf4-g32"
    assert parse_scheme("mxfp4").activations is None and parse_scheme("mxfp4").weights.name == "mxfp4"
    for name in ("MXFP4", "NVFP4", "FP8_BLOCK", "W4A4", "W4AFP8"):
        assert parse_scheme(name).activations is not None
    pair = parse_scheme("fp4_e2m1-g32/fp8_e4m3-token")
    assert (pair.weights.name, pair.activations and pair.activations.name) == ("fp4_e2m1-g32", "fp8_e4m3-token")
    for bad in ("int4-g32/int8-channel", "int4-g32/nf4-g64-dq", "int4-g32/nvfp4_4over6", "int4-g32/lloyd4_fit-token"):
        with pytest.raises(BadInput, match="activations as"):
            parse_scheme(bad)
    activations = parse_scheme("FP8_DYNAMIC").activations
    assert activations is not None and activations.name == "fp8_e4m3-token"
    for bad, message in [("W5A5", "unknown scheme 'W5A5'"), ("W4A61", "known: W4A16")]:
        with pytest.raises(BadInput, match=message):
            parse_scheme(bad)
    with pytest.raises(BadInput, match="group size 0"):
        parse_scheme("W4A16", 0)
    with pytest.raises(BadInput, match="channel-wise"):
        parse_scheme("W8A8", 64)


def test_a_group_larger_than_the_dimension_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="q_proj: group size 128 is larger than its input dimension 100"):
        parse_format("int4-g128").quantize(torch.ones(2, 100), "q_proj")


def test_a_scale_that_overflows_its_dtype_is_refused() -> None:
    with pytest.raises(BadInput, match="overflows"):
        parse_format("int2-channel").with_scale_dtype(torch.float16).quantize(torch.full((1, 8), 1e6))
