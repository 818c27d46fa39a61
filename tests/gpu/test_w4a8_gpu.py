"""On a CUDA device: 4-bit weights times inputs rounded to E4M3 equal the reference, for all numbers of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.formats import Quantized, parse_format
from fewbits.kernels import KERNELS, LinearSpec, choose, fragments
from fewbits.kernels.base import split_levels
from fewbits.kernels.cuda_fragments import config_for, fragments_e4m3_linear, layout_for
from fewbits.kernels.e4m3_tokens import round_tokens
from fewbits.kernels.fragment_choices import Many, dense_takes, fits
from fewbits.kernels.fragment_layout import Layout
from fewbits.metrics.error import sqnr_db

KERNEL = KERNELS.get("cuda_fragments")
INPUTS = parse_format("fp8_e4m3-token")
FORMATS = ("int4-g128", "int4-asym-g64", "int4-g32", "int4-asym-g96", "int4-channel", "int4-asym-channel")
DEVICE = torch.device("cuda", 0)
ROUNDED_FLOOR_DB = 28  # where levels times scales are rounded to E4M3 as well


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability(DEVICE)[0] != 9:
        pytest.skip("wgmma is Hopper's")


def packed(name: str, shape: tuple[int, int]) -> tuple[Quantized, dict[str, Tensor], LinearSpec, Layout]:
    weight = parse_format(name).quantize(torch.randn(shape, device=DEVICE) + 0.1)
    spec = LinearSpec(format=weight.format, shape=shape, device=DEVICE, dtype=torch.bfloat16, activations=INPUTS)
    assert choose(spec) is KERNEL
    layout = layout_for(spec)
    assert isinstance(layout, Layout) and layout.e4m3
    return weight, KERNEL.prepack(weight), spec, layout


def parts_of(held: dict[str, Tensor], n: int, k: int) -> fragments.Packed:
    return fragments.Packed(
        words=held["weight"], scale=held["scales"], zero=held.get("zeros"), alpha=held["alpha"], table=None, n=n, k=k
    )


def expected(x: Tensor, weight: Quantized) -> Tensor:
    """The very rounded inputs times the very weights, in float64."""
    levels, scale = split_levels(x, INPUTS, {})
    return (levels.double() @ weight.dequantize().double().t()) * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [16, 100, 576, 4096, 14336, 20000])
def test_tokens_are_rounded_as_the_format_says(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(9, columns, device=DEVICE).to(dtype)
    x[0], x[1], x[2, 3] = 0, x[1] * 50, 1000
    levels, scale = split_levels(x, INPUTS, {})
    whole = torch.nn.functional.pad(levels, (0, -columns % 96))
    for rows in (x, torch.cat((x, x), 1)[:, :columns], x.t().contiguous().t()):  # rows apart in memory, too
        found = round_tokens(rows, 96)
        tiles = found.levels.view(torch.float8_e4m3fn).float().reshape(9, -1, 4, 2, 2)  # 4 c + 2 i + h: 2 c + i + 8 h
        plain = tiles.permute(0, 1, 4, 2, 3).reshape(9, -1)
        assert torch.equal(plain[:, :columns], levels) and not plain[:, columns:].any()
        assert torch.equal(found.scale[:9, None], scale)
        parts = whole.shape[1] // 96
        sums = whole.reshape(9, -1, 96).sum(2)
        torch.testing.assert_close(found.sums[:, :parts].float() * 512, sums, rtol=1e-3, atol=0.01)
        assert not found.sums[:, parts:].any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(100, 200), (520, 1032), (1000, 9000)])
def test_equals_the_reference_for_every_number_of_tokens(name: str, shape: tuple[int, int]) -> None:
    weight, held, spec, layout = packed(name, shape)
    x = torch.randn(300, shape[1], device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for m in [*range(1, 71), 129, 300] if dtype == torch.bfloat16 else (1, 16, 70, 300):
            rows = x[:m].to(dtype)
            y = KERNEL.linear(rows, held, spec)
            assert y.dtype == dtype and y.shape == (m, shape[0])
            chosen = config_for(layout, *shape, m, 0)
            floor = KERNEL.floor_db if isinstance(chosen, Many) and chosen.apart else ROUNDED_FLOOR_DB
            assert sqnr_db(expected(rows, weight), y) > floor, (m, dtype, chosen)
            assert torch.equal(y, KERNEL.linear(rows, held, spec)), f"not stable at {m} tokens"


def test_rounding_of_inputs_is_what_it_loses() -> None:
    weight, held, spec, _ = packed("int4-g128", (1024, 4096))
    x = torch.randn(64, 4096, device=DEVICE, dtype=torch.bfloat16)
    exact = x.double() @ weight.dequantize().double().t()
    assert 31 < sqnr_db(exact, KERNEL.linear(x, held, spec)) < 33


@pytest.mark.parametrize("name", ["int4-g128", "int4-asym-g64"])
@pytest.mark.parametrize(("n", "k", "m"), [(5000, 1032, 64), (5003, 520, 200), (8192, 4096, 40), (300, 16500, 130)])
def test_every_kind_of_choice(name: str, n: int, k: int, m: int) -> None:
    """Shared tiles, clusters, several blocks a multiprocessor, more sums of parts than a stage holds."""
    weight, held, _, layout = packed(name, (n, k))
    parts = parts_of(held, n, k)
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    rounded, right = round_tokens(x, layout.part), expected(x, weight)
    choices = [
        Many(nt=16, wg=1, stages=4, per_sm=2, apart=True), Many(nt=64, wg=3, apart=True, share=0),
        Many(nt=128, wg=2, apart=True), Many(nt=64, wg=2, apart=True, share=1), Many(nt=128, wg=1, apart=True, split=4),
        Many(nt=160, wg=2, apart=True), Many(nt=64, wg=2, apart=True, split=2), Many(nt=96, wg=2, apart=True),
        Many(nt=128, wg=2), Many(nt=256, wg=2, stages=3), Many(nt=256, wg=1, stages=3, share=1),
        Many(nt=64, wg=3, share=0), Many(nt=128, wg=2, split=2), Many(nt=192, wg=2, stages=3, share=0),
        Many(nt=32, wg=1, split=4),
    ]  # fmt: skip
    if dense_takes(layout, n):
        assert_close(as_decoded(held, parts, layout, x), fragments.product(rounded, parts, layout, None), right)
    tried = 0
    for config in choices:
        if fits(config, layout, n, k, m, 132):
            torch.full((m, n), torch.nan, device=DEVICE, dtype=torch.bfloat16)  # what y is likely to be made of
            y = fragments.multiply(rounded, parts, layout, config)
            if config.apart:
                assert sqnr_db(right, y) > KERNEL.floor_db, config
            else:
                assert_close(as_decoded(held, parts, layout, x), y, right)
            for _ in range(10):
                assert torch.equal(y, fragments.multiply(rounded, parts, layout, config)), config
            tried += 1
    assert tried > 8


def as_decoded(held: dict[str, Tensor], parts: fragments.Packed, layout: Layout, x: Tensor) -> Tensor:
    """The product of rounded inputs with levels times scales that are rounded to E4M3, too."""
    levels = fragments.dense(parts, layout).float().reshape(parts.n, -1, 4, 2, 2)  # 4 c + 2 i + h: 2 c + i + 8 h
    weight = levels.permute(0, 1, 4, 2, 3).reshape(parts.n, -1)[:, : parts.k].double() * held["alpha"][:, None].double()
    rows, scale = split_levels(x, INPUTS, {})
    return (rows.double() @ weight.t()) * scale.double()


def assert_close(decoded: Tensor, y: Tensor, right: Tensor) -> None:
    assert sqnr_db(decoded, y) > KERNEL.floor_db
    assert sqnr_db(right, y) > ROUNDED_FLOOR_DB


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_in_e4m3_is_its_levels_times_its_scales_rounded(name: str) -> None:
    weight, held, _, layout = packed(name, (208, 1000))
    parts = parts_of(held, 208, 1000)
    found = fragments.dense(parts, layout).float().reshape(208, -1, 4, 2, 2).permute(0, 1, 4, 2, 3).reshape(208, -1)
    levels = weight.codes.float() - (layout.offset if weight.zero is None else spread(weight.zero, weight).float())
    scale = spread(weight.scale, weight).float() / held["alpha"][:, None]
    rounded = (levels.half() * scale.half()).to(torch.float8_e4m3fn).float()
    assert torch.equal(found[:, :1000], rounded)


def spread(values: Tensor, weight: Quantized) -> Tensor:
    """Of groups, one a column."""
    rows, columns = weight.shape
    group = weight.format.scaling.group_size if weight.format.scaling.block == "group" else columns
    return values.repeat_interleave(group or columns, 1)[:, :columns].expand(rows, columns)


def test_x_need_not_be_contiguous_nor_aligned() -> None:
    weight, held, spec, _ = packed("int4-g128", (256, 512))
    wide = torch.randn(9, 1025, device=DEVICE, dtype=torch.bfloat16)
    for x in (wide[:, 1:513], wide[:, :1024:2], wide.t()[:512].t()):
        assert sqnr_db(expected(x, weight), KERNEL.linear(x, held, spec)) > KERNEL.floor_db
    assert KERNEL.linear(wide[:0, :512], held, spec).shape == (0, 256)
    assert KERNEL.linear(wide[:8, :512].reshape(2, 4, 512), held, spec).shape == (2, 4, 256)


def test_it_is_an_operator_and_works_in_a_cuda_graph() -> None:
    weight, held, spec, layout = packed("int4-asym-g64", (320, 640))
    x = torch.randn(40, 640, device=DEVICE, dtype=torch.bfloat16)
    arguments = held["weight"], held["scales"], held["zeros"], held["alpha"], layout.group, layout.offset
    torch.library.opcheck(fragments_e4m3_linear, (x, *arguments))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = KERNEL.linear(KERNEL.linear(x, held, spec).repeat(1, 2), held, spec)
    x.copy_(torch.randn_like(x))
    graph.replay()
    once = KERNEL.linear(x, held, spec).repeat(1, 2)
    assert sqnr_db(expected(once, weight), y) > KERNEL.floor_db


@pytest.mark.parametrize("inputs", ["int8-token", "fp8_e4m3-tensor", "fp8_e4m3-g128"])
def test_other_inputs_take_another_path(inputs: str) -> None:
    spec = LinearSpec(
        format=parse_format("int4-g128"), shape=(256, 512), device=DEVICE, activations=parse_format(inputs)
    )
    layout = layout_for(spec)
    assert isinstance(layout, Layout) and not layout.e4m3
