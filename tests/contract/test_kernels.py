"""Every kernel equals the reference within the signal-to-noise ratio it states, at any shape it accepts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fewbits.formats import Quantized, parse_format
from fewbits.kernels import KERNELS, LinearSpec, No, Yes, choose, explain
from fewbits.kernels.reference import KERNEL as REFERENCE
from fewbits.metrics.error import sqnr_db

CPU = torch.device("cpu")
FORMATS = [
    "int4-g128",
    "int4-asym-g64",
    "int4-g32",
    "int4-g96",
    "int4-channel",
    "int4-asym-channel",
    "int4-tensor",
    "int3-g64",
    "int3-asym-g32",
    "int2-asym-g64",
    "int2-channel",
    "int8-channel",
    "int8-asym-channel",
    "int8-tensor",
    "int8-g64",
    "int6-channel",
    "int5-asym-channel",
    "fp8_e4m3-channel",
    "fp8_e5m2-tensor",
    "fp4_e2m1-g16",
    "nf4-g64",
]
# (out, in): tiny and ragged, groups that do not divide, aligned, more rows than one tile of decoded weight.
SHAPES = [(5, 100), (33, 200), (96, 576), (600, 128)]
# What a result stored in this dtype can hold at best, less a margin.
OUTPUT_DB = {torch.float32: 120.0, torch.float16: 65.0, torch.bfloat16: 48.0}
CPU_KERNELS = [name for name in KERNELS if not name.startswith("cuda")]


def quantized(name: str, shape: tuple[int, int], scale_dtype: torch.dtype = torch.float32) -> Quantized:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * (0.2 + torch.rand(shape[0], 1, generator=generator))
    weight = weight + 0.3 * torch.rand(shape[0], 1, generator=generator)
    return parse_format(name).with_scale_dtype(scale_dtype).quantize(weight)


def spec_for(weight: Quantized, activations: str | None = None) -> LinearSpec:
    found = None if activations is None else parse_format(activations)
    return LinearSpec(format=weight.format, shape=weight.shape, device=CPU, activations=found)


def usable(name: str, shape: tuple[int, int]) -> bool:
    size = parse_format(name).scaling.group_size
    return size is None or size <= shape[1]


CASES = [
    pytest.param(kernel, name, shape, id=f"{kernel}-{name}-{shape[0]}x{shape[1]}")
    for kernel in CPU_KERNELS
    for name in FORMATS
    for shape in SHAPES
    if usable(name, shape)
    and KERNELS.get(kernel).accepts(LinearSpec(format=parse_format(name), shape=shape, device=CPU))
]


@pytest.mark.parametrize(("kernel", "name", "shape"), CASES)
def test_equals_the_reference(kernel: str, name: str, shape: tuple[int, int]) -> None:
    found, weight = KERNELS.get(kernel), quantized(name, shape)
    spec = spec_for(weight)
    packed = found.prepack(weight)
    for rows in (1, 3, 17, 70, 130):
        for dtype, limit in OUTPUT_DB.items():
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
            expected = REFERENCE.linear(x.float(), REFERENCE.prepack(weight), spec)
            y = found.linear(x, packed, spec)
            assert y.dtype == dtype and y.shape == (rows, shape[0])
            assert sqnr_db(expected, y) >= min(found.floor_db, limit), (rows, dtype)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("activations", ["int8-token", "int8-asym-token", "fp8_e4m3-token"])
def test_quantizes_activations_as_the_reference_does(kernel: str, activations: str) -> None:
    found = KERNELS.get(kernel)
    for name in ("int4-asym-g64", "int8-channel", "nf4-g64"):
        weight = quantized(name, (64, 160))
        spec = spec_for(weight, activations)
        if not found.accepts(spec):
            continue
        for rows in (1, 5, 200):
            x = torch.randn(rows, 160)
            x[0] = 0
            x[-1, 3] = 40.0
            expected = REFERENCE.linear(x, REFERENCE.prepack(weight), spec)
            y = found.linear(x, found.prepack(weight), spec)
            assert sqnr_db(expected, y) >= found.floor_db
            assert rows == 1 or not y[0].any(), "a row of zeros stays zero"


def test_the_reference_rounds_activations_per_token() -> None:
    weight, activations = quantized("int8-channel", (7, 33)), parse_format("int8-token")
    x = torch.randn(4, 33)
    scale, zero = activations.params(x)
    expected = activations.snap(x, scale, zero) @ weight.dequantize().t()
    y = REFERENCE.linear(x, REFERENCE.prepack(weight), spec_for(weight, "int8-token"))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(("kernel", "name", "shape"), CASES)
def test_codes_come_back(kernel: str, name: str, shape: tuple[int, int]) -> None:
    found, weight = KERNELS.get(kernel), quantized(name, shape)
    if found.recovers_codes:
        assert torch.equal(found.codes(found.prepack(weight), spec_for(weight)), weight.codes)


@pytest.mark.parametrize(("kernel", "name", "shape"), CASES)
def test_the_bound_product_is_the_product(kernel: str, name: str, shape: tuple[int, int]) -> None:
    found, weight = KERNELS.get(kernel), quantized(name, shape)
    packed, spec = found.prepack(weight), spec_for(weight)
    bound = found.bind(packed, spec)
    for rows in (1, 3, 200):
        x = torch.randn(rows, shape[1]).to(found.input_dtype or torch.float32)
        torch.testing.assert_close(bound(x).to(x.dtype), found.linear(x, packed, spec))


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("name", ["int4-asym-g64", "int3-channel", "int8-asym-channel", "int4-tensor", "nf4-g64"])
@pytest.mark.parametrize("heights", [(64, 32, 96), (64, 40)])
def test_joined_weights_are_the_parts_on_top_of_each_other(kernel: str, name: str, heights: tuple[int, ...]) -> None:
    found = KERNELS.get(kernel)
    weights = [quantized(name, (height, 128)) for height in heights]
    specs = [spec_for(weight) for weight in weights]
    if not found.accepts(specs[0]):
        return
    joined = found.join([found.prepack(weight) for weight in weights], specs)
    if joined is None:
        return
    whole, views = joined
    spec = dataclasses.replace(specs[0], shape=(sum(heights), 128))
    for rows in (1, 200):
        x = torch.randn(rows, 128)
        parts = [found.linear(x, found.prepack(w), s) for w, s in zip(weights, specs, strict=True)]
        torch.testing.assert_close(found.linear(x, whole, spec), torch.cat(parts, 1))
        for view, one, part in zip(views, specs, parts, strict=True):
            torch.testing.assert_close(found.linear(x, view, one), part)
    assert views[1]["weight"].untyped_storage().data_ptr() == whole["weight"].untyped_storage().data_ptr()


@pytest.mark.parametrize("kernel", ["cpu_int4", "cpu_int8"])
def test_integer_kernels_join(kernel: str) -> None:
    found, weights = KERNELS.get(kernel), [quantized("int4-channel", (64, 128))] * 2
    packs, specs = [found.prepack(weight) for weight in weights], [spec_for(weight) for weight in weights]
    assert found.join(packs, specs) is not None


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("name", ["int4-asym-g64", "int8-channel", "nf4-g64"])
def test_any_layout_and_rank_of_x(kernel: str, name: str) -> None:
    found, weight = KERNELS.get(kernel), quantized(name, (48, 128))
    spec = spec_for(weight)
    if not found.accepts(spec):
        return
    packed = found.prepack(weight)
    x = torch.randn(2, 3, 256)[..., ::2]
    rows = found.linear(x.reshape(6, 128).contiguous(), packed, spec)
    torch.testing.assert_close(found.linear(x, packed, spec), rows.reshape(2, 3, 48))
    columns = torch.randn(128, 5).t()
    torch.testing.assert_close(found.linear(columns, packed, spec), found.linear(columns.contiguous(), packed, spec))
    assert found.linear(x[0, 0], packed, spec).shape == (48,)
    assert found.linear(x[:0], packed, spec).shape == (0, 3, 48)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_scales(scale_dtype: torch.dtype) -> None:
    weight = quantized("int4-g32", (32, 96), scale_dtype)
    spec = spec_for(weight)
    kernel, x = choose(spec), torch.randn(2, 96)
    expected = REFERENCE.linear(x, REFERENCE.prepack(weight), spec)
    assert sqnr_db(expected, kernel.linear(x, kernel.prepack(weight), spec)) >= kernel.floor_db


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("int4-g64", "cpu_int4"),
        ("int3-asym-g128", "cpu_int4"),
        ("int4-g16", "cpu_fp16"),
        ("int8-channel", "cpu_int8"),
        ("int8-g64", "cpu_fp16"),
        ("nf4-g64", "cpu_fp16"),
        ("fp8_e4m3-channel", "cpu_fp16"),
    ],
)
def test_what_is_chosen_on_a_cpu(name: str, kernel: str) -> None:
    assert choose(LinearSpec(format=parse_format(name), shape=(64, 256), device=CPU)).name == kernel


def test_explain_gives_every_kernel_a_reason() -> None:
    answers = dict(explain(LinearSpec(format=parse_format("nf4-g64"), shape=(64, 64), device=CPU)))
    assert list(answers) == KERNELS.names()
    assert isinstance(answers["cpu_int4"], No) and "table" in answers["cpu_int4"].reason
    assert isinstance(answers["cuda_int4"], No) and "cuda" in answers["cuda_int4"].reason
    assert isinstance(answers["reference"], Yes)
    assert str(answers["cpu_int4"]).startswith("no: ")


def test_reference_takes_what_no_device_kernel_does() -> None:
    spec = LinearSpec(format=parse_format("fp4_e2m1-g16"), shape=(8, 32), device=torch.device("meta"))
    assert choose(spec).name == "reference"
