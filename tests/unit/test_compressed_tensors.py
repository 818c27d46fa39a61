"""The compressed-tensors codec against the compressed-tensors library itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.checkpoints import compressed_tensors as codec
from fewbits.checkpoints.codecs import Stored, quantized_modules
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, Quantized, parse_format

WEIGHTS = [f"int{bits}{asym}-{block}" for bits in range(2, 9) for asym in ("", "-asym") for block in ("g32", "channel")]


class FakeSource:
    """A source that holds the tensors of one module."""

    path = "fake"

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        self._tensors = {f"m.{name}": tensor for name, tensor in tensors.items()}
        self._config = config

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def config(self) -> dict[str, Any]:
        return {"quantization_config": self._config}


def quantized(format: Format, rows: int = 10, columns: int = 96) -> Quantized:
    return format.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", [*WEIGHTS, "int4-tensor", "fp8_e4m3-channel", "fp8_e4m3-tensor"])
@pytest.mark.parametrize("activations", [None, "token"])
def test_round_trip_is_exact(name: str, activations: str | None) -> None:
    format = parse_format(name).with_scale_dtype(torch.bfloat16)
    inputs = None
    if activations:
        inputs = parse_format("fp8_e4m3-token" if name.startswith("fp8") else "int8-token")
        if name in ("int8-g32", "int8-asym-g32", "int8-asym-channel"):
            pytest.skip("int-quantized holds symmetric weights per channel or tensor")
    weight = quantized(format)
    config = codec.quantization_config(format, inputs, ["lm_head"])
    source: Any = FakeSource(codec.encode(weight, inputs), config)
    modules = quantized_modules(source)
    assert list(modules.entries) == ["m"]
    again = modules.read("m")
    assert isinstance(again, Stored)
    assert torch.equal(again.dense(), weight.dequantize())
    assert again.format.name == name
    assert (again.activations and again.activations.name) == (inputs and inputs.name)


@pytest.mark.parametrize("name", [*WEIGHTS, "fp8_e4m3-channel"])
def test_the_library_decodes_the_same_values(name: str) -> None:
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor

    format = parse_format(name)  # float32 scales: the library multiplies in the dtype of the scale
    weight = quantized(format)
    config = library.quantization.QuantizationConfig(**codec.quantization_config(format, None, ["lm_head"]))
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    state = compressor.decompress(dict(codec.encode(weight, None)), scheme)
    assert torch.equal(state["weight"].float(), weight.dequantize())


@pytest.mark.parametrize(("name", "inputs"), [("mxfp4", "mxfp4"), ("fp8_block", "fp8_e4m3-g128")])
def test_block_formats_are_the_library_s(name: str, inputs: str) -> None:
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    format, activations = parse_format(name), parse_format(inputs)
    weight = quantized(format, 128, 256)
    for rounded in (None, activations):
        stated = codec.quantization_config(format, rounded, ["lm_head"])
        source: Any = FakeSource(codec.encode(weight, rounded), stated)
        again = quantized_modules(source).read("m")
        assert isinstance(again, Stored)
        found = again.quantized()
        assert torch.equal(found.codes, weight.codes) and torch.equal(found.scale, weight.scale)
        assert found.format == weight.format and again.activations == rounded
    config = library.quantization.QuantizationConfig(**stated)
    scheme = config.config_groups["group_0"]
    preset = preset_name_to_scheme({"mxfp4": "MXFP4", "fp8_block": "FP8_BLOCK"}[name], ["Linear"])
    for part in ("weights", "input_activations"):
        ours, theirs = (getattr(each, part) for each in (scheme, preset))
        for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "block_structure"):
            assert getattr(ours, field) == getattr(theirs, field), (part, field)
    state = BaseCompressor.get_value_from_registry(config.format).decompress(dict(codec.encode(weight, None)), scheme)
    assert torch.equal(state["weight"].float(), weight.dequantize())


@pytest.mark.parametrize(
    ("name", "columns", "reason"),
    [
        ("nf4-g32", 96, "no nf4"),
        ("fp4_e2m1-g32", 96, "no fp4_e2m1"),
        ("mxfp4", 80, "blocks of 32 do not divide 10 x 80"),
        ("fp8_block", 128, "blocks of 128 do not divide 10 x 128"),
        ("nvfp4", 96, "no nvfp4"),
        ("fp8_e5m2-channel", 96, "no fp8_e5m2"),
        ("int4-g64", 96, "do not divide the input dimension 96"),
        ("fp8_e4m3-g32", 96, "no group scales for FP8"),
        ("int4-asym-tensor", 96, "no zero point per tensor"),
    ],
)
def test_what_it_cannot_say_is_refused_with_the_way_out(name: str, columns: int, reason: str) -> None:
    format = parse_format(name)
    assert reason in (codec.refuses(format, None, (10, columns)) or "")
    with pytest.raises(Unsupported, match="use the native format"):
        codec.encode(quantized(format, columns=columns), None)


def damaged(change: dict[str, Any]) -> Any:
    format = parse_format("int4-asym-g32").with_scale_dtype(torch.bfloat16)
    tensors = codec.encode(quantized(format), None)
    tensors.update(change.get("tensors", {}))
    config = codec.quantization_config(format, None, ["lm_head"])
    config["config_groups"]["group_0"]["weights"].update(change.get("weights", {}))
    config["config_groups"]["group_0"].update(change.get("group", {}))
    return FakeSource(tensors, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"weight_scale": torch.full((10, 3), torch.nan)}}, "NaN or infinite"),
        ({"tensors": {"weight_scale": torch.ones(10, 4)}}, "weight_scale: shape.*int4-asym-g32 has"),
        ({"tensors": {"weight_shape": torch.tensor([11, 96])}}, "does not hold 11 rows"),
        ({"tensors": {"weight_shape": torch.tensor([10, 900])}}, "packed rows"),
        ({"tensors": {"weight_shape": torch.tensor([10, -1])}}, "weight_shape"),
        ({"tensors": {"weight_g_idx": torch.zeros(96, dtype=torch.int32)}}, "g_idx"),
        ({"group": {"targets": ["re:(a+)+$"]}}, "repeats a repetition"),
        ({"weights": {"num_bits": 9}}, "9-bit int per group is not read"),
        ({"weights": {"strategy": "block"}}, "is not read"),
        ({"group": {"targets": ["re:nothing"]}}, "no group of quantization_config names it"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    source = damaged(change)
    with pytest.raises(BadInput, match=message):
        quantized_modules(source).read("m")
