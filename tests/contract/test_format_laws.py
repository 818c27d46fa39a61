"""Laws that every registered format obeys; a new element enrols itself by being in the table."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import BadInput
from fewbits.formats import Grid, Quantized, known_formats, parse_format
from fewbits.formats.elements import ELEMENTS, NARROW, UNSIGNED
from fewbits.formats.kquant import BlockFormat

# What has no negative levels refuses weights that have them (tested below).
FORMATS = [name for name in known_formats() if not name.startswith("dynamic8u")]
GRIDS = {**ELEMENTS, **{grid.name: grid for table in (UNSIGNED, NARROW) for grid in table.values()}}
# GGUF's types take whole blocks, and those ggml defines round with scales before they are stored: their laws are
# in tests/golden/test_gguf_quantize.py.
EXACT = [name for name in FORMATS if not isinstance(parse_format(name), BlockFormat)]
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def table(grid: Grid) -> Grid:
    """The same grid by look-up, which is the definition."""
    return Grid(grid.name, grid.bits, grid.levels, grid.ties_up)


@pytest.mark.parametrize("name", GRIDS)
def test_arithmetic_equals_the_table_bit_for_bit(name: str) -> None:
    grid = GRIDS[name]
    levels = torch.tensor(grid.levels, dtype=torch.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    nudged = [torch.nextafter(middles, torch.full_like(middles, way)) for way in (-torch.inf, torch.inf)]
    spread = torch.linspace(1.2 * levels[0] - 1, 1.2 * levels[-1] + 1, 20011)
    x = torch.cat([levels, middles, *nudged, spread, torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30])])
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(grid.snap(x.to(dtype)), table(grid).snap(x.to(dtype)))
        assert torch.equal(grid.nearest(x.to(dtype)), table(grid).nearest(x.to(dtype)))
    assert torch.equal(grid.value(grid.nearest(x)), grid.snap(x) + 0.0)
    # Many values are looked up by cells of float32, few by bisection.
    extremes = torch.tensor([torch.inf, -torch.inf, 1e-45, -1e-45, 3e38, -3e38])
    wild = torch.randn(20011, generator=torch.Generator().manual_seed(0)).mul(30).exp()
    x = torch.cat([x, extremes, wild, -wild])
    few = torch.cat([table(grid).nearest(part) for part in x.split(1000)])
    assert torch.equal(table(grid).nearest(x), few)
    assert torch.equal(grid.nearest(x), few)


@pytest.mark.parametrize("name", GRIDS)
def test_snap_is_idempotent_monotone_and_nearest(name: str) -> None:
    grid = GRIDS[name]
    x = torch.linspace(1.1 * grid.levels[0], 1.1 * grid.levels[-1], 5001, dtype=torch.float64)
    snapped = grid.snap(x)
    assert torch.equal(grid.snap(snapped), snapped)
    assert bool((snapped[1:] >= snapped[:-1]).all())
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    best = (x[:, None] - levels).abs().min(dim=1).values
    assert torch.allclose((x - snapped).abs(), best, atol=1e-12, rtol=0)


_EXPONENTS = st.integers(-149, 127)
_EXTREMES = st.builds(
    lambda sign, fraction, exponent: sign * math.ldexp(1 + fraction / 16, exponent),
    st.sampled_from([1.0, -1.0]),
    st.integers(0, 15),
    _EXPONENTS,
)


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=15, deadline=None)
@given(values=st.lists(st.one_of(_EXTREMES, st.floats(width=32, allow_nan=False)), min_size=1, max_size=64))
def test_denormals_and_extremes_go_to_the_nearest_level(name: str, values: list[float]) -> None:
    grid = GRIDS[name]
    x = torch.tensor(values, dtype=torch.float64).float()
    assert torch.equal(grid.nearest(x), table(grid).nearest(x))
    assert torch.equal(grid.snap(x) + 0.0, table(grid).snap(x) + 0.0)
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    inside = x.double().clamp(levels[0], levels[-1])
    best = (inside[:, None] - levels).abs().amin(1)
    # A border between levels is a float32: half a unit in its last place (2**-24) off, both distances change by that.
    assert bool(((grid.snap(x).double() - inside).abs() <= best + 2**-23 * inside.abs()).all())
    assert torch.equal(grid.snap(x).double(), levels.float().double()[grid.nearest(x).long()] + 0.0)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_quantize_obeys_its_laws_at_any_shape(name: str, data: st.DataObject) -> None:
    format = parse_format(name).with_scale_dtype(data.draw(st.sampled_from(SCALE_DTYPES)))
    size = format.scaling.group_size or 1
    shape = data.draw(st.integers(1, 5)), data.draw(st.integers(size, size + 150))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    magnitude = data.draw(st.sampled_from([1e-3, 1.0, 300.0]))
    w = magnitude * torch.randn(shape, generator=generator)
    q = format.quantize(w)

    # What is stored is what was computed: pack, unpack, decode.
    again = Quantized.from_state(format, q.shape, q.to_state())
    decoded = q.dequantize()
    assert torch.equal(again.dequantize(), decoded)
    assert q.to_state()["codes"].shape == (shape[0], math.ceil(shape[1] * format.bits / 8))

    scale, zero = q.format.expand(q.scale, q.zero, shape)
    assert torch.equal(q.format.snap(w, scale, zero) + 0.0, decoded + 0.0)
    assert torch.equal(q.format.encode(decoded, scale, zero), q.codes)

    # No error beyond half the widest gap, but for what lies outside of the range that the stored scale spans.
    levels = q.format.grid.levels
    gap = max(b - a for a, b in itertools.pairwise(levels))
    low, high = (q.format._valued(torch.full(shape, end), scale, zero) for end in (levels[0], levels[-1]))
    outside = torch.maximum(w - high, low - w).clamp(min=0)
    rounding = (gap / 2 + 0.001 + (0.5 if format.scaling.zero_point else 0)) * scale.float()
    assert bool(((w - decoded).abs() <= rounding + outside).all())


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    format = parse_format(name)
    w = torch.zeros(3, 256)
    w[1, :64] = 0.3
    decoded = format.quantize(w).dequantize()
    if format.scaling.minimum and not isinstance(format, BlockFormat):
        assert float((decoded - w).abs().max()) < 0.3  # a real minimum meets the ends of a block, not zero
    else:
        assert bool((decoded[w == 0] == 0).all())
    assert bool((format.quantize(torch.zeros(2, 256)).dequantize() == 0).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_refused_by_name(name: str, value: float) -> None:
    w = torch.ones(2, 256)
    w[1, 7] = value
    with pytest.raises(BadInput, match=r"layer\.3: 1 of 512 values are NaN or infinite"):
        parse_format(name).quantize(w, "layer.3")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30])
def test_tiny_values_do_not_become_nan(name: str, magnitude: float) -> None:
    format = parse_format(name).with_scale_dtype(torch.float16)
    decoded = format.quantize(torch.full((2, 256), magnitude)).dequantize()
    assert bool(torch.isfinite(decoded).all())


@pytest.mark.parametrize("name", EXACT)
def test_ragged_groups_equal_the_groups_alone(name: str) -> None:
    """The short last group is quantized exactly as if it were a tensor of its own."""
    format = parse_format(name)
    size = format.scaling.group_size
    if format.scaling.block != "group" or not format.rowwise:
        return
    w = torch.randn(4, 2 * size + 17, generator=torch.Generator().manual_seed(1))
    whole = format.quantize(w).dequantize()
    channel = dataclasses.replace(format, scaling=dataclasses.replace(format.scaling, block="channel", group_size=None))
    for start in range(0, w.shape[1], size):
        part = w[:, start : start + size]
        assert torch.equal(whole[:, start : start + size], channel.quantize(part).dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_bits_per_weight_counts_what_is_stored(name: str) -> None:
    format = parse_format(name).with_scale_dtype(torch.bfloat16)
    shape = (32, 768)
    state = format.quantize(torch.randn(shape)).to_state()
    stored = 8 * sum(t.numel() * t.element_size() for t in state.values()) / (shape[0] * shape[1])
    assert format.bits_per_weight(shape) == pytest.approx(stored, abs=0.02)


def test_negative_values_are_refused_where_no_level_is_below_zero() -> None:
    format = parse_format("dynamic8u-g64")
    with pytest.raises(BadInput, match="no level below 0"):
        format.quantize(torch.randn(2, 128), "layer.3")
    w = torch.rand(2, 128)
    assert float((format.quantize(w).dequantize() - w).abs().max()) < 0.01
