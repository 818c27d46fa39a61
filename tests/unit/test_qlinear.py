"""QLinear: canonical and prepacked, moved, cast, saved, copied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewbits.core.errors import BadInput
from fewbits.formats import parse_format
from fewbits.kernels import KERNELS
from fewbits.metrics.error import sqnr_db
from fewbits.nn import QLinear, qlinears

FORMATS = ["int4-asym-g64", "int3-g32", "int8-channel", "nf4-g64", "fp8_e4m3-channel"]


def make(name: str, *, bias: bool = False, shape: tuple[int, int] = (48, 160)) -> QLinear:
    torch.manual_seed(1)
    weight = parse_format(name).with_scale_dtype(torch.bfloat16).quantize(torch.randn(shape))
    return QLinear.from_quantized(weight, torch.randn(shape[0]) if bias else None)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_dense_product(name: str, bias: bool) -> None:
    module, x = make(name, bias=bias), torch.randn(3, 5, 160)
    expected = nn.functional.linear(x, module.dequantize(), module.bias)
    y = module(x)
    assert module.kernel not in (None, "reference")
    assert y.shape == (3, 5, 48) and sqnr_db(expected, y) > 45


@pytest.mark.parametrize("name", FORMATS)
def test_state_dict_is_canonical_before_and_after_prepacking(name: str) -> None:
    module = make(name, bias=True)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert set(before) == {"codes", "scale", "bias"} | ({"zero"} if "asym" in name else set())
    module.prepack()
    kernel = KERNELS.get(module.kernel)
    assert (module.codes is None) == kernel.recovers_codes
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_loading_a_state_into_a_prepacked_module() -> None:
    module, other = make("int4-asym-g64").prepack(), make("int4-asym-g64")
    other.scale.mul_(2)
    x = torch.randn(2, 160)
    twice = 2 * module(x)
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(x), twice, rtol=0.02, atol=0.02)


def test_loads_on_meta_then_assigns() -> None:
    filled = make("nf4-g64")
    module = QLinear(160, 48, filled.format, device="meta")
    module.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(module.dequantize(), filled.dequantize())


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_leaves_the_weight_alone(cast: torch.dtype) -> None:
    module = make("int4-g32", bias=True)
    weight = module.dequantize()
    for packed in (module, copy.deepcopy(module).prepack()):
        packed.to(cast)
        assert packed.bias is not None and packed.bias.dtype == cast
        assert packed.scale.dtype == torch.bfloat16
        assert torch.equal(packed.dequantize(), weight)
        assert packed(torch.randn(2, 160).to(cast)).dtype == cast


def test_moving_to_another_device_goes_through_the_canonical_state() -> None:
    module = make("int4-asym-g64").prepack()
    module.to("meta")
    assert module.packed is None and module.codes is not None and module.codes.device.type == "meta"


@pytest.mark.parametrize("name", FORMATS)
def test_a_copy_computes_the_same_and_is_independent(name: str) -> None:
    module = make(name).prepack()
    twin, x = copy.deepcopy(module), torch.randn(4, 160)
    assert torch.equal(module(x), twin(x))
    twin.unpack().scale.zero_()
    assert not torch.equal(module(x), twin(x))


def test_another_kernel_on_request() -> None:
    module, x = make("int4-asym-g64").prepack(), torch.randn(2, 160)
    fast = module(x)
    module.prepack(KERNELS.get("reference"))
    assert module.kernel == "reference"
    assert sqnr_db(module(x), fast) > 45


def test_activations_are_rounded_per_token() -> None:
    weight = parse_format("int8-channel").quantize(torch.randn(16, 64))
    plain, rounded = (QLinear.from_quantized(weight, activations=found) for found in (None, parse_format("int8-token")))
    x = torch.randn(3, 64)
    assert 20 < sqnr_db(plain(x), rounded(x)) < 60
    with pytest.raises(BadInput, match="per token"):
        QLinear(64, 16, weight.format, activations=parse_format("int8-channel"))


def test_its_text_shows_format_and_kernel() -> None:
    module = make("int4-asym-g64")
    assert "format=int4-asym-g64" in repr(module) and "not yet chosen" in repr(module)
    assert "kernel=cpu_int4" in repr(module.prepack())
    answers = dict(module.explain())
    assert answers["cpu_int4"] and not answers["cuda_int4"]


def test_qlinears_finds_them_by_name() -> None:
    model = nn.Sequential(nn.Linear(160, 160), make("nf4-g64"))
    assert [name for name, _ in qlinears(model)] == ["1"]


def test_gradients_are_not_asked_of_the_weight() -> None:
    assert not any(parameter.requires_grad for parameter in make("int4-g32", bias=True).parameters())
