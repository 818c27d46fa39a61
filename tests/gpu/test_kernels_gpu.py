"""On a CUDA device: kernels equal the reference, modules move, models load, the engine and generate agree."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_runtime_models import (
    byte_tokenizer,
    quantize_in_place,
    quantized_weights,
    tiny_llama,
    write_quantized,
)

from fewbits.formats import parse_format
from fewbits.kernels import KERNELS, LinearSpec, choose
from fewbits.kernels.reference import KERNEL as REFERENCE
from fewbits.metrics.error import sqnr_db
from fewbits.nn import QLinear
from fewbits.runtime.engine import Engine
from fewbits.runtime.generate import stream
from fewbits.runtime.load import load

# Format of weights -> the kernels that take it, in order of preference: a fast one that is lost is a failure.
FEW_BITS = ["cuda_fragments", "cuda_int4", "reference"]
TAKEN_BY = dict.fromkeys(
    ["int4-g128", "int4-asym-g64", "int4-channel", "int3-asym-g32", "int2-g64", "int4-tensor"], FEW_BITS
) | {
    "int8-channel": ["cuda_fragments", "reference"],
    "nf4-g64": ["cuda_fragments", "reference"],
    "fp4_e2m1-g16": ["cuda_fragments", "reference"],
    "fp8_e4m3-channel": ["reference"],
}
SHAPES = [(5, 100), (33, 200), (96, 576), (600, 128)]


def on_device(weight):
    module = QLinear.from_quantized(weight).to("cuda")
    return module.quantized()


@pytest.mark.parametrize("name", TAKEN_BY)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_equals_the_reference(name: str, shape: tuple[int, int]) -> None:
    format = parse_format(name)
    if (format.scaling.group_size or 0) > shape[1]:
        return  # such a format refuses such a matrix
    torch.manual_seed(0)
    weight = format.quantize(torch.randn(shape) + 0.2)
    there = on_device(weight)
    assert torch.equal(there.dequantize().cpu(), weight.dequantize())
    cpu = LinearSpec(format=format, shape=shape, device=torch.device("cpu"))
    spec = LinearSpec(format=format, shape=shape, device=torch.device("cuda", 0))
    kernels = [kernel for _, kernel in KERNELS.items() if kernel.accepts(spec)]
    assert [kernel.name for kernel in kernels] == TAKEN_BY[name] and choose(spec) is kernels[0]
    for kernel in kernels:
        packed = kernel.prepack(there)
        if kernel.recovers_codes:
            assert torch.equal(kernel.codes(packed, spec).cpu(), weight.codes)
        for rows in (1, 3, 17, 70, 200):
            x = torch.randn(rows, shape[1])
            expected = REFERENCE.linear(x, REFERENCE.prepack(weight), cpu)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                y = kernel.linear(x.to("cuda", dtype), packed, spec)
                assert y.dtype == dtype and y.shape == (rows, shape[0])
                assert sqnr_db(expected, y.cpu()) > 40, (kernel.name, rows, dtype)


def test_a_module_moves_there_and_back() -> None:
    weight = parse_format("int4-asym-g64").with_scale_dtype(torch.bfloat16).quantize(torch.randn(64, 256))
    module = QLinear.from_quantized(weight).prepack()
    assert module.kernel == "cpu_int4"
    x = torch.randn(3, 256)
    here = module(x)
    module.to("cuda")
    assert module.kernel == "cuda_fragments"
    assert sqnr_db(here, module(x.cuda()).cpu()) > 40
    twin = copy.deepcopy(module)
    module.to("cpu")
    assert module.kernel == "cpu_int4" and torch.equal(module(x), here)
    assert torch.equal(module.dequantize(), weight.dequantize())
    assert sqnr_db(here, twin(x.cuda()).cpu()) > 40


def test_activations_quantized_per_token() -> None:
    weight, activations = parse_format("int4-g64").quantize(torch.randn(48, 128)), parse_format("int8-token")
    spec = LinearSpec(format=weight.format, shape=weight.shape, device=torch.device("cuda", 0), activations=activations)
    x = torch.randn(5, 128)
    expected = REFERENCE.linear(x, REFERENCE.prepack(weight), spec)
    kernel = choose(spec)
    assert sqnr_db(expected, kernel.linear(x.cuda(), kernel.prepack(on_device(weight)), spec).cpu()) > 40


@torch.no_grad()
@pytest.mark.parametrize("name", ["int4-asym-g32", "int8-channel", "nf4-g64"])
def test_a_loaded_model_and_the_engine(tmp_path, name: str) -> None:
    original = tiny_llama()
    weights = quantized_weights(original, parse_format(name).with_scale_dtype(torch.bfloat16))
    path = write_quantized(tmp_path / "q", original, weights)
    ids = torch.randint(0, 256, (1, 24))
    expected = load(path)[0](ids).logits[0]
    model, tokenizer = load(path, device="cuda", dtype=torch.bfloat16)
    there = model(ids.cuda()).logits[0].float()
    assert sqnr_db(expected, there.cpu()) > 20  # hidden states in bfloat16
    whole = Engine(model).prefill(ids[0].tolist(), every=True)
    assert sqnr_db(expected, whole.cpu()) > 25
    engine = Engine(model, capacity=4)
    stepped = [engine.prefill(ids[0, :5].tolist()), *(engine.step(token) for token in ids[0, 5:].tolist())]
    assert sqnr_db(whole[4:], torch.stack(stepped)) > 30
    text = stream(model, tokenizer, "hello", max_new_tokens=8, ignore_eos=True)
    assert len(list(text)) <= 9 and text.runner == "fewbits decode engine" and text.stats.new_tokens == 8


def test_greedy_text_is_the_same_on_both_devices() -> None:
    model = tiny_llama()
    here = stream(model, byte_tokenizer(), "abc", max_new_tokens=16, ignore_eos=True)
    list(here)
    there = stream(model.to("cuda"), byte_tokenizer(), "abc", max_new_tokens=16, ignore_eos=True)
    list(there)
    assert here.ids == there.ids
    quantize_in_place(model, "int4-asym-g32")
    list(stream(model, byte_tokenizer(), "abc", max_new_tokens=4))


@pytest.mark.parametrize("inputs", ["int8-token", "int8-tensor", "int8-tensor-static"])
def test_int8_products_equal_the_reference(inputs: str) -> None:
    torch.manual_seed(0)
    format, activations = parse_format("int8-channel"), parse_format(inputs)
    for shape in SHAPES:
        weight = format.quantize(torch.randn(shape))
        spec = LinearSpec(format=format, shape=shape, device=torch.device("cuda", 0), activations=activations)
        cpu = LinearSpec(format=format, shape=shape, device=torch.device("cpu"), activations=activations)
        kernel = choose(spec)
        assert kernel.name == "triton_int8"
        for rows in (1, 17, 200):
            x = torch.randn(rows, shape[1])
            state = {"input_scale": torch.tensor([[0.02]])} if activations.scaling.static else {}
            expected = REFERENCE.linear(x, REFERENCE.prepack(weight) | state, cpu)
            there = kernel.prepack(on_device(weight)) | {name: value.cuda() for name, value in state.items()}
            y = kernel.linear(x.cuda(), there, spec)
            # The last bit of a scale may differ there, and with it the level of an x between two.
            assert sqnr_db(expected, y.cpu()) > 60, (shape, rows)
