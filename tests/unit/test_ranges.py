"""Range estimators and the streaming histogram: published thresholds, edge cases, and that each keeps its promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.algorithms.clipping import RangeSearch, range_error
from fewbits.algorithms.entropy import KL, threshold
from fewbits.algorithms.gptq import GPTQ
from fewbits.algorithms.ranges import MSE, RANGES, AbsMax, ExponentBias, Percentile, TFEnhanced
from fewbits.algorithms.rtn import RTN
from fewbits.calibration.histogram import Histogram
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput, FewbitsError, Unsupported
from fewbits.formats import parse_format
from fewbits.metrics.distributions import Gaussian, best_scale

INT8, INT4, ASYM = parse_format("int8-channel"), parse_format("int4-channel"), parse_format("int4-asym-channel")
SOME = [INT8, INT4, ASYM, parse_format("fp8_e4m3-channel"), parse_format("nf4-g64")]


def gaussian(count: int = 1 << 16, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))


def histogram_of(*parts: Tensor, bins: int = 2048) -> Histogram:
    histogram = Histogram(bins)
    for part in parts:
        histogram.add(part)
    return histogram


# ---- the published entropy calibration


def masses(name: str, reach: float) -> Tensor:
    """Counts of 2048 bins of |x| on [0, reach] for ten million values."""
    edges = torch.linspace(0, reach, 2049, dtype=torch.float64)
    below = {
        "normal": lambda: 2 * torch.special.ndtr(edges) - 1,
        "laplace": lambda: 1 - torch.exp(-edges),
        # |T| of 4 degrees of freedom, in closed form
        "t4": lambda: edges / (4 + edges**2).sqrt() * (1 + 2 / (4 + edges**2)),
    }[name]()
    return (1e7 * below.diff()).round()


@pytest.mark.parametrize(
    "name, reach, kept, magnitude",
    [
        ("normal", 5.0, 1882, 4.594726562),
        ("normal", 6.0, 1583, 4.637695312),
        ("laplace", 16.0, 1390, 10.859375),
        ("t4", 100.0, 389, 18.994140625),
    ],
)
def test_entropy_calibration_is_tensorrts(name: str, reach: float, kept: int, magnitude: float) -> None:
    """The thresholds NVIDIA's pytorch-quantization gives for these histograms."""
    found = threshold(masses(name, reach))
    assert found == kept
    assert found * reach / 2048 == pytest.approx(magnitude, abs=1e-8)


def test_entropy_calibration_clips_less_than_the_squared_error() -> None:
    values = gaussian(1 << 20)
    clipped = float(KL().of_blocks(values, INT8)[1])
    scale, _ = best_scale(Gaussian(), INT8.grid.levels)
    assert 128 * scale < clipped < float(values.abs().max())


@pytest.mark.parametrize("place", [0, 1, 127, 128, 1000, 2047])
def test_all_mass_in_one_bin_keeps_it(place: int) -> None:
    counts = torch.zeros(2048)
    counts[place] = 1000
    assert threshold(counts) >= place + 1


@pytest.mark.parametrize("used", [1, 2, 100, 127, 128, 129])
def test_a_histogram_of_few_bins(used: int) -> None:
    """As many bins as levels or fewer: nothing to merge, so nothing is clipped; of sparse bins none is lost."""
    assert threshold(torch.ones(used)) in (used, min(used, 128))
    sparse = torch.zeros(2048)
    sparse[torch.linspace(1, 2047, used).long()] = 10
    assert threshold(sparse) == 2048 if used < 128 else threshold(sparse) > 128


# ---- every estimator


@pytest.mark.parametrize("name", RANGES.names())
@pytest.mark.parametrize("format", SOME, ids=lambda format: format.name)
def test_a_range_lies_within_what_was_seen(name: str, format: object) -> None:
    values = gaussian(2048, rows=3)
    low, high = RANGES.get(name)().of_blocks(values, format)
    assert low.shape == high.shape == (3,)
    reach = 1.2 * values.abs().amax(-1) + 1e-6
    assert bool((low >= -reach).all()) and bool((high <= reach).all()) and bool((low < high).all())


@pytest.mark.parametrize("name", RANGES.names())
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 1e30])
def test_constants_have_a_range_that_holds_them(name: str, value: float) -> None:
    half = 1.01 / 15  # half a step of the coarsest: 4 bits over a range that is symmetric around 0
    for format in (INT8, ASYM):
        blocks = torch.full((2, 512), value)
        low, high = RANGES.get(name)().of_blocks(blocks, format)
        error = range_error(blocks, format, low, high)
        assert bool((error <= half * abs(value)).all())
        histogram = histogram_of(blocks)
        low, high = RANGES.get(name)().of_histogram(histogram, format)
        error = range_error(blocks[:1], format, low[None], high[None])
        assert bool((error <= half * abs(value)).all())


@pytest.mark.parametrize("name", RANGES.names())
def test_an_empty_histogram_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="empty"):
        RANGES.get(name)().of_histogram(Histogram(), INT8)


@pytest.mark.parametrize("name", ["absmax", "percentile", "mse", "kl", "tf_enhanced", "exponent_bias"])
def test_a_histogram_gives_the_range_of_its_values(name: str) -> None:
    values = gaussian(1 << 18)
    estimator = RANGES.get(name)()
    _, direct = estimator.of_blocks(values, INT4)
    _, streamed = estimator.of_histogram(histogram_of(*values.chunk(7, dim=1)), INT4)
    assert float(streamed) == pytest.approx(float(direct), rel=0.06)  # a step of the search, or a few bins


def test_errors_are_ordered_as_their_objectives_say() -> None:
    values = gaussian(1 << 14, rows=4)
    errors = {
        name: range_error(values, INT4, *RANGES.get(name)().of_blocks(values, INT4)).square().mean() for name in RANGES
    }
    # exponent_bias searches a finer ladder than mse, over a wider range
    assert min(errors["mse"], errors["exponent_bias"]) <= min(errors.values())
    assert errors["mse"] < errors["tf_enhanced"] < errors["absmax"]


def test_mse_finds_the_clip_of_the_gaussian() -> None:
    values = gaussian(1 << 20)
    scale, _ = best_scale(Gaussian(), INT4.grid.levels)
    found = INT4.params_from_range(*MSE().of_blocks(values, INT4))[0]
    assert float(found) == pytest.approx(scale, rel=0.03)


def test_range_search_still_gives_scales() -> None:
    weight = gaussian(256, rows=8)
    search = RangeSearch(steps=80, max_shrink=0.8, norm=2)
    scale, _ = search.params(weight, INT4)
    expected, _ = INT4.params_from_range(*MSE().of_blocks(INT4.blocks(weight), INT4))
    assert torch.equal(scale, expected)


@pytest.mark.parametrize("percent, kept", [(100, 1000), (99.9, 999), (50, 500), (0.01, 1)])
def test_percentile_leaves_out_what_it_says(percent: float, kept: int) -> None:
    values = torch.arange(1, 1001).float()[None]
    assert float(Percentile(percent=percent).of_blocks(values, INT8)[1]) == kept
    low, high = Percentile(percent=percent).of_blocks(-values, ASYM)
    assert float(low) == -kept and float(high) == -1


def test_saturation_costs_more_with_gamma() -> None:
    values = gaussian(1 << 14)
    highs = [float(TFEnhanced(gamma=gamma).of_blocks(values, INT4)[1]) for gamma in (1.0, 3.0, 100.0)]
    assert highs == sorted(highs) and highs[0] < highs[-1]


def test_the_vote_over_formats_follows_the_tails() -> None:
    """arXiv 2208.09225: E2M5 for Gaussian channels, more exponent bits for channels with outliers."""
    formats = [parse_format(f"fp8_{split}-channel") for split in ("e2m5", "e3m4", "e4m3_finite", "e5m2_finite")]
    plain = gaussian(4096, rows=5)
    outliers = plain.clone()
    outliers[:3, ::512] *= 50  # three of five channels
    outliers[:3, ::512] += 200
    assert ExponentBias().elect(plain, formats)[0] is formats[0]
    chosen, (low, high) = ExponentBias().elect(outliers, formats)
    assert chosen in formats[1:]
    assert torch.equal(low, -high) and high.shape == (5,)


def test_bad_options_are_refused() -> None:
    for make in (
        lambda: Percentile(percent=0),
        lambda: MSE(steps=0),
        lambda: TFEnhanced(gamma=-1),
        lambda: KL(bins=1),
        lambda: Histogram(3),
        lambda: ExponentBias().elect(gaussian(16), []),
    ):
        with pytest.raises(BadInput):
            make()


# ---- the histogram


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=0, max_size=20),
        min_size=1,
        max_size=6,
    ),
    st.randoms(),
)
def test_order_and_merging_change_nothing(parts: list[list[float]], random: object) -> None:
    tensors = [torch.tensor(part) for part in parts]
    whole = histogram_of(torch.cat(tensors), bins=16)
    streamed = histogram_of(*tensors, bins=16)
    merged = Histogram(16)
    for tensor in reversed(tensors):
        merged.merge(histogram_of(tensor, bins=16))
    for other in (streamed, merged):
        assert torch.equal(whole.counts, other.counts)
        assert (whole.low, whole.high, whole.exponent) == (other.low, other.high, other.exponent)
    assert whole.total == sum(map(len, parts))


def test_the_range_doubles_and_keeps_its_resolution() -> None:
    histogram = histogram_of(torch.tensor([0.1, -0.2]), torch.tensor([5.0]))
    assert histogram.reach == 8.0 and histogram.total == 3
    assert (histogram.low, histogram.high) == (pytest.approx(-0.2), 5.0)
    middles, counts = histogram.samples()
    assert counts.tolist() == [1, 1, 1]
    assert middles.tolist() == pytest.approx([-0.2, 0.1, 5.0], abs=histogram.width)
    assert len(histogram.magnitudes()) == math.floor(5.0 / histogram.width) + 1


def test_nan_is_reported_by_name() -> None:
    histogram = histogram_of(torch.tensor([1.0, math.nan, math.inf]))
    assert histogram.total == 1
    with pytest.raises(FewbitsError, match=r"layers\.3"):
        histogram.check("layers.3")
    histogram_of(torch.ones(2)).check("fine")


def test_histograms_of_different_bins_do_not_merge() -> None:
    with pytest.raises(BadInput, match="do not merge"):
        Histogram(16).merge(Histogram(32))


def test_absmax_of_a_histogram_is_exact() -> None:
    values = gaussian(1000)
    low, high = AbsMax().of_histogram(histogram_of(values), INT8)
    assert (float(low), float(high)) == (float(values.min()), float(values.max()))


@pytest.mark.parametrize("name", list(RANGES))
@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_methods_take_their_ranges_from_an_estimator(name: str, method: type) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 256, generator=generator), torch.randn(512, 256, generator=generator)
    options = {} if method is RTN else {"static_groups": False, "act_order": False}
    formats = ["int8-tensor"] if name == "kl" else ["int4-channel", "int4-asym-g128", "q4_k", "nf4-g64-dq"]
    for format in formats:
        q = (
            method(range=name, **options)
            .solve(weight, parse_format(format), Inputs(hessian=x.T @ x), "layer")
            .quantized
        )
        assert float((q.dequantize() - weight).square().mean()) < 0.1
    with pytest.raises(BadInput, match=r"range estimator 'mean'.*mse"):
        method(range="mean")


def test_a_histogram_for_every_group_is_refused() -> None:
    with pytest.raises(Unsupported, match="use mse"):
        RTN(range="kl").solve(torch.randn(16, 512), parse_format("int8-g64"), Inputs(), "layer")
