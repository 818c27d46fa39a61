"""Checkpoint formats: what a codec writes it reads back bit for bit, and refuses what it cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.checkpoints.codecs import CODECS, Dense, Layer, QuantizedModules, Stored, quantized_modules
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import parse_format

# What each codec is to hold, with the dtype of plain scales.
HELD = {
    "native": ("int3-g32 nf4-g64-dq fp4_e2m1-g32 q4_k nvfp4 nvfp4_ct int4-min-g32", torch.bfloat16),
    "compressed-tensors": (
        "int4-g32 int4-asym-g32 int3-g32 int8-channel fp8_e4m3-channel fp8_block nvfp4_ct mxfp4 mxfp8",
        torch.bfloat16,
    ),
    "gptq": ("int4-g32 int4-g128 int8-g32 int3-g32 int2-g64 int4-channel", torch.float16),
    "gptq_v2": ("int4-g32 int4-asym-g32 int8-asym-g32 int3-asym-g32 int2-asym-g64", torch.float16),
    "awq": ("int4-g32 int4-asym-g32 int4-asym-g128", torch.float16),
    "fp8": ("fp8_block", torch.float32),
    "mlx": ("int4-min-g64 int4-g32 int8-asym-g64 int3-min-g128 mxfp4 mxfp8 int6-min-g32 int4-asym-g64", torch.float16),
    "hqq": ("int4-g64 int4-asym-g64 int8-asym-g128 int3-g64 int2-asym-g32 int5-g64 int6-asym-channel", torch.float16),
    "modelopt": ("nvfp4 fp8_e4m3-channel fp8_e4m3-tensor fp8_block mxfp8", torch.float32),
    "bitsandbytes": ("nf4-g64 nf4-g64-dq fp4_bnb-g64 fp4_bnb-g32-dq nf4-g128", torch.float32),
}
CASES = [(codec, name, dtype) for codec, (names, dtype) in HELD.items() for name in names.split()]
SHAPE = (128, 256)


class Memory:
    """A source of named tensors and a configuration."""

    path = "memory"

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.tensors, self._config = tensors, config

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise BadInput(f"no tensor {name}")
        return self.tensors[name].clone()

    def config(self) -> dict[str, Any]:
        return self._config


def stored(name: str, dtype: torch.dtype, shape: tuple[int, int] = SHAPE, **more: Any) -> Stored:
    format = parse_format(name)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = format.with_scale_dtype(dtype).quantize(weight)
    return Stored(format=found.format, shape=shape, state=found.to_state(), **more)


def written(codec: str, weight: Stored) -> Any:
    """`weight` as module m.0 of a checkpoint, written and opened again."""
    coder = CODECS.get(codec)
    assert coder.refuses(weight) is None
    tensors = {f"m.0.{suffix}": tensor for suffix, tensor in coder.encode(weight).items()}
    return Memory(tensors, coder.quantization({"m.0": weight.layer}, ["head"]))


def same(a: Stored, b: Stored) -> bool:
    return (
        a.format.name == b.format.name
        and a.state.keys() == b.state.keys()
        and all(torch.equal(a.state[key], b.state[key]) and a.state[key].dtype == b.state[key].dtype for key in a.state)
    )


@pytest.mark.parametrize(("codec", "name", "dtype"), CASES)
def test_round_trip(codec: str, name: str, dtype: torch.dtype) -> None:
    weight = stored(name, dtype)
    source = written(codec, weight)
    modules = quantized_modules(source)
    assert modules.name == codec
    assert list(modules.entries) == ["m.0"] and set(modules.entries["m.0"].parts) == set(source.tensors)
    again = modules.read("m.0")
    assert isinstance(again, Stored) and torch.equal(again.dense(), weight.dense())
    assert (
        same(again, weight)
        or codec in ("awq", "mlx")  # which has one word for all layers on whether there are zero points
        or name == "fp8_e4m3-tensor"  # ModelOpt writes its scale for every row
    )
    once_more = CODECS.get(codec).encode(again)
    assert all(torch.equal(once_more[name.removeprefix("m.0.")], tensor) for name, tensor in source.tensors.items())


@pytest.mark.parametrize("codec", ["gptq", "native"])
def test_activation_order(codec: str) -> None:
    order = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(1))
    order = torch.cat([part.sort().values for part in order.split(32)])  # as a file says it: sorted within a group
    weight = stored("int4-g32", torch.float16, order=order)
    again = quantized_modules(written(codec, weight)).read("m.0")
    assert isinstance(again, Stored) and again.order is not None
    assert torch.equal(again.order, order) and torch.equal(again.dense(), weight.dense())


def test_groups_of_unequal_size_are_decoded() -> None:
    source = written("gptq", stored("int4-g32", torch.float16))
    index = source.tensors["m.0.g_idx"]
    index[0] = 3
    found = quantized_modules(source).read("m.0")
    assert isinstance(found, Dense) and "unequal" in found.note
    scales, plain = source.tensors["m.0.scales"], stored("int4-g32", torch.float16)
    levels = plain.quantized().codes.float() - 8
    assert torch.equal(found.value, levels * scales.t().float()[:, index.long()])


def test_version_1_of_gptq_refuses_a_zero_point_of_zero() -> None:
    weight = stored("int4-asym-g32", torch.float16)
    weight.state["zero"].zero_()
    assert "use gptq_v2" in (CODECS.get("gptq").refuses(weight) or "")
    assert CODECS.get("gptq_v2").refuses(weight) is None


@pytest.mark.parametrize(
    ("codec", "name", "dtype", "shape", "reason"),
    [
        ("gptq", "nf4-g64", torch.float16, SHAPE, "no nf4"),
        ("gptq", "int4-g32", torch.bfloat16, SHAPE, "float16 scales"),
        ("gptq", "int4-g32", torch.float16, (60, 256), "whole words"),
        ("awq", "int8-g32", torch.float16, SHAPE, "no int8"),
        ("awq", "int4-g32", torch.float16, (60, 256), "words of 8"),
        ("bitsandbytes", "int4-g64", torch.float32, SHAPE, "NF4"),
        ("bitsandbytes", "nf4-g16", torch.float32, SHAPE, "blocks of 32"),
        ("compressed-tensors", "nvfp4", torch.float32, SHAPE, "outer scale"),
        ("compressed-tensors", "nf4-g64", torch.float32, SHAPE, "no nf4"),
        ("hqq", "nf4-g64", torch.float16, SHAPE, "no nf4"),
        ("hqq", "int4-g64", torch.float32, SHAPE, "16 bits"),
        ("hqq", "int2-g64", torch.float16, (3, 64), "4 times whole groups"),
        ("modelopt", "int4-g64", torch.float16, SHAPE, "no int4"),
        ("modelopt", "nvfp4_ct", torch.float32, SHAPE, "last bit"),
        ("modelopt", "fp8_block", torch.float32, (64, 256), "whole blocks"),
    ],
)
def test_refusals(codec: str, name: str, dtype: torch.dtype, shape: tuple[int, int], reason: str) -> None:
    assert reason in (CODECS.get(codec).refuses(stored(name, dtype, shape)) or "")


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(Unsupported, match="'aqlm' is not read"):
        quantized_modules(Memory({}, {"quantization_config": {"quant_method": "aqlm"}}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("codec", "name", "dtype"), CASES)
def test_every_damage_is_an_error_with_the_module_in_it(codec: str, name: str, dtype: torch.dtype) -> None:
    """Each tensor of a module missing, cut short, of another type, or not finite."""
    for damage in (_missing, _short, _other_type, _not_finite):
        source = written(codec, stored(name, dtype))
        for part in list(source.tensors):
            hurt = written(codec, stored(name, dtype))
            if not damage(hurt.tensors, part):
                continue
            try:
                modules = QuantizedModules(hurt, codec, CODECS.get(codec))
                found = modules.read("m.0").dense() if modules.entries else None
                assert found is None or bool(torch.isfinite(found).all()), (damage.__name__, part)
            except BadInput as error:
                assert "m.0" in str(error)


def _missing(tensors: dict[str, Tensor], part: str) -> bool:
    del tensors[part]
    return True


def _short(tensors: dict[str, Tensor], part: str) -> bool:
    if not tensors[part].dim():
        return False
    tensors[part] = tensors[part][:-1].contiguous()
    return True


def _other_type(tensors: dict[str, Tensor], part: str) -> bool:
    tensors[part] = tensors[part].float().to(torch.float64)
    return True


def _not_finite(tensors: dict[str, Tensor], part: str) -> bool:
    if not tensors[part].is_floating_point() or tensors[part].dtype.itemsize < 2:
        return False
    tensors[part].view(-1)[0] = torch.nan
    return True


def layer(name: str, shape: tuple[int, int] = SHAPE) -> Layer:
    return Layer(format=parse_format(name), shape=shape)


def test_exl2_by_its_definition() -> None:
    """Two groups of 4 and 5 bits, packed here code by code."""
    draw = torch.Generator().manual_seed(0)
    rows, widths, size = 16, (5, 4), 32
    codes = [torch.randint(0, 1 << bits, (size, rows), generator=draw) for bits in widths]
    words = torch.cat([_stream(part, bits) for part, bits in zip(codes, widths, strict=True)])
    scale = torch.randint(0, 16, (2, rows), generator=draw)
    most = torch.tensor([0.5, 0.75], dtype=torch.float16)
    order = torch.randperm(2 * size, generator=draw)
    tensors = {
        "m.0.q_weight": words,
        "m.0.q_scale": _stream(scale.t().contiguous(), 4).t().contiguous(),
        "m.0.q_scale_max": most,
        "m.0.q_groups": torch.tensor([5, 0, 4, 5], dtype=torch.int16),
        "m.0.q_invperm": order.short(),
    }
    found = quantized_modules(Memory(tensors, {"quantization_config": {"quant_method": "exl2"}})).read("m.0")  # type: ignore[arg-type]
    for channel in (0, 1, 40):
        group, row = divmod(int(order[channel]), size)
        step = ((scale[group] + 1) ** 2).half() * (most[group] / 256)
        expected = (codes[group][row] - (1 << (widths[group] - 1))).half() * step
        assert torch.equal(found.dense()[:, channel], expected.float())


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Columns of codes [n, out] as 32-bit words [n * bits / 32, out], least significant first."""
    words = torch.zeros((codes.shape[0] * bits // 32, codes.shape[1]), dtype=torch.int64)
    for row in range(codes.shape[0]):
        for bit in range(bits):
            word, place = divmod(row * bits + bit, 32)
            words[word] |= ((codes[row].long() >> bit) & 1) << place
    return torch.where(words >= 2**31, words - 2**32, words).int()


MODELOPT: dict[str, tuple[str, tuple[int, ...], bool, str | None]] = {
    # method -> format, shape of weight_scale, whether there is an input_scale, activations
    "FP8": ("fp8_e4m3-tensor", (), True, "fp8_e4m3-token"),
    "FP8-weights": ("fp8_e4m3-tensor", (), False, None),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_e4m3-channel", (128,), False, "fp8_e4m3-token"),
    "fp8_pb_wo": ("fp8_block", (1, 1, 2, 1), False, "fp8_e4m3-g128"),
}


@pytest.mark.parametrize("method", MODELOPT)
def test_modelopt_fp8_by_its_definition(method: str) -> None:
    name, shape, calibrated, activations = MODELOPT[method]
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=draw).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=draw) + 0.5
    tensors = {"m.0.weight": weight, "m.0.weight_scale": scale}
    if calibrated:
        tensors["m.0.input_scale"] = torch.tensor(0.01)
    source: Any = Memory(tensors, {"quantization_config": {"quant_method": "modelopt", "quant_algo": method}})
    found = quantized_modules(source).read("m.0")
    spread = scale.reshape(1, 2).repeat_interleave(128, 1) if len(shape) == 4 else scale.reshape(-1, 1)
    assert isinstance(found, Stored) and found.format.name == name
    assert torch.equal(found.dense(), weight.float() * spread)
    assert (None if found.activations is None else found.activations.name) == activations


def test_modelopt_says_each_layers_method_where_they_differ() -> None:
    coder = CODECS.get("modelopt")
    weights = {f"m.{n}": stored(name, torch.float32) for n, name in enumerate(("nvfp4", "mxfp8"))}
    tensors = {f"{m}.{suffix}": t for m, weight in weights.items() for suffix, t in coder.encode(weight).items()}
    said = coder.quantization({module: weight.layer for module, weight in weights.items()}, ["head"])
    assert said["quantization_config"]["quant_algo"] == "MIXED_PRECISION"
    modules = quantized_modules(Memory(tensors, said))  # type: ignore[arg-type]
    for module, weight in weights.items():
        assert torch.equal(modules.dense(module), weight.dense())


def test_hqq_zero_points_of_16_bits_come_back_whole_or_real() -> None:
    """Whole zero points make the layer one that GPTQ holds; others stay minima, of 16 bits both ways."""
    weight = stored("int4-asym-g64", torch.float16)
    again = quantized_modules(written("hqq", weight)).read("m.0")
    assert isinstance(again, Stored) and again.format.name == "int4-asym-g64"
    assert CODECS.get("gptq_v2").refuses(again) is None
    source = written("hqq", weight)
    source.tensors["m.0.zero"] += 0.25
    real = quantized_modules(source).read("m.0")
    assert isinstance(real, Stored) and real.format.name == "int4-min-g64"
    assert CODECS.get("hqq").refuses(real) is None
    assert torch.equal(CODECS.get("hqq").encode(real)["zero"], source.tensors["m.0.zero"])


def test_hqq_evaluates_nothing() -> None:
    from fewbits.checkpoints.safetensors_file import SafetensorsFile

    golden = Path(__file__).parents[1] / "golden" / "checkpoints" / "hqq.safetensors"
    file, start = SafetensorsFile(golden), "4-axis1/"
    names = [name for name in file.names() if name.startswith(f"{start}m.")]
    tensors = {f"m.0.{name.removeprefix(f'{start}m.')}": file.tensor(name) for name in names}
    text = b"__import__('os').abort()"
    tensors["m.0.compute_dtype"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensors["m.0.unpack_view_dtype"] = tensors["m.0.compute_dtype"]
    source: Any = Memory(tensors, {"quantization_config": {"quant_method": "hqq"}})
    assert torch.equal(quantized_modules(source).dense("m.0"), file.tensor(f"{start}expected"))
    tensors["m.0.packing"] = tensors["m.0.compute_dtype"]
    with pytest.raises(BadInput, match="packing"):
        quantized_modules(source).read("m.0")
