"""INT8 products: right wherever torch has them, taken where the hardware has them."""

from __future__ import annotations

import pytest
import torch

from fewbits.formats import parse_format
from fewbits.kernels import KERNELS, LinearSpec, choose, dispatch, int8_mm
from fewbits.kernels.int8_mm import KERNEL
from fewbits.metrics.error import sqnr_db

REFERENCE = KERNELS.get("reference")


def spec(weights: str, inputs: str | None, shape: tuple[int, int] = (33, 100)) -> LinearSpec:
    activations = None if inputs is None else parse_format(inputs)
    return LinearSpec(format=parse_format(weights), shape=shape, device=torch.device("cpu"), activations=activations)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with INT8 products; torch's plain loop computes the same."""
    monkeypatch.setattr(int8_mm, "multiplies_int8", lambda device: True)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("inputs", ["int8-token", "int8-narrow-token", "int8-tensor", "int8-tensor-static-sinks"])
@pytest.mark.parametrize("weights", ["int8-channel", "int8-narrow-channel", "int8-tensor", "int6-channel"])
@pytest.mark.usefixtures("able")
def test_it_is_the_reference_to_the_rounding_of_scales(weights: str, inputs: str) -> None:
    for shape in ((33, 100), (16, 64), (5, 7)):
        product = spec(weights, inputs, shape)
        assert choose(product).name == ("int8_mm" if product.format.bits > 4 else "cpu_int4")
        generator = torch.Generator().manual_seed(0)
        weight = product.format.quantize(torch.randn(shape, generator=generator))
        packed = KERNEL.prepack(weight)
        assert torch.equal(KERNEL.codes(packed, product), weight.codes)
        state = {"input_scale": torch.tensor([[0.02]])} if "static" in inputs else {}
        for rows in (1, 3, 40):
            x = torch.randn(rows, shape[1], generator=generator)
            x[0] *= 300
            expected = REFERENCE.linear(x, REFERENCE.prepack(weight) | state, product)
            y = KERNEL.linear(x.to(torch.float32), packed | state, product)
            assert sqnr_db(expected, y) > KERNEL.floor_db
        assert KERNEL.linear(torch.zeros(0, shape[1]), packed | state, product).shape == (0, shape[0])


def test_inputs_that_are_not_rounded_meet_the_same_weight() -> None:
    product = spec("int8-channel", None)
    weight = product.format.quantize(torch.randn(product.shape))
    x = torch.zeros(2, 3, product.shape[1])
    x[..., 7:9] = torch.randn(2, 3, 2)
    expected = REFERENCE.linear(x, REFERENCE.prepack(weight), product)
    y = KERNEL.linear(x, KERNEL.prepack(weight), product)
    assert y.shape == expected.shape and sqnr_db(expected, y) > KERNEL.floor_db
    assert not KERNEL.linear(torch.zeros(1, product.shape[1]), KERNEL.prepack(weight), product).any()


@pytest.mark.usefixtures("able")
def test_what_it_cannot_multiply_it_refuses() -> None:
    refused = [
        ("int8-channel", None, "INT8 inputs"),
        ("int8-channel", "int8-asym-token", "zero point"),
        ("int8-channel", "fp8_e4m3-token", "INT8 inputs"),
        ("int8-channel", "int8-g32", "several scales"),
        ("int8-asym-channel", "int8-token", "zero point"),
        ("int8-g32", "int8-token", "one per group"),
        ("int4-channel", "int8-token", "fewer than 5"),
        ("fp8_e4m3-channel", "int8-token", "table"),
    ]
    for weights, inputs, reason in refused:
        answer = KERNEL.accepts(spec(weights, inputs))
        assert not answer and reason in str(answer), (weights, inputs, answer)


def test_without_the_hardware_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    int8_mm.multiplies_int8.cache_clear()
    answer = KERNEL.accepts(spec("int8-channel", "int8-token"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    int8_mm.multiplies_int8.cache_clear()
    assert not answer and "VNNI" in str(answer)
    assert KERNEL.accepts(spec("int8-channel", "int8-token"))
    int8_mm.multiplies_int8.cache_clear()


@pytest.mark.usefixtures("able")
def test_joined_weights_are_one_product() -> None:
    product = spec("int8-channel", "int8-token", (32, 64))
    weights = [product.format.quantize(torch.randn(32, 64)) for _ in range(2)]
    joined = KERNEL.join([KERNEL.prepack(weight) for weight in weights], [product, product])
    assert joined is not None
    x = torch.randn(4, 64)
    whole = KERNEL.linear(x, joined[0], spec("int8-channel", "int8-token", (64, 64)))
    parts = [KERNEL.linear(x, part, product) for part in joined[1]]
    assert torch.equal(whole, torch.cat(parts, dim=1))
