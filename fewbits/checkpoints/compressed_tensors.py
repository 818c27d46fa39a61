"""compressed-tensors: the format vLLM, SGLang and transformers load (quant_method "compressed-tensors").

Per quantized linear, by `format` (compressed-tensors 0.20, compressors/):
- pack-quantized: `weight_packed` int32 [out, ceil(in*b/32)], code q + 2**(b-1), element i at bit i*b, least
  significant first, across word borders; `weight_scale` [out, G]; `weight_shape` int64 [2]; asymmetric:
  `weight_zero_point` int32 packed the same way along the *output* dimension, [ceil(out*b/32), G].
- int-quantized: `weight` int8 [out, in], `weight_scale` [out, 1].
- float-quantized: `weight` float8_e4m3fn [out, in], `weight_scale` [out, 1] or [1].
- activations with one static scale: `input_scale` [1]; asymmetric: `input_zero_point` int8 [1], for levels from -128.
- what scales blocks otherwise (MXFP4, MXFP8, NVFP4, FP8 tiles): compressed_blocks.py.

A row of 32-bit words read as bytes is fewbits' canonical packing padded to whole words, and the offset
code is the canonical level index, so packing changes no code. What this format cannot say (tables such as
NF4, groups that do not divide the input dimension, E5M2) is written in the
native format instead. Reading is in compressed_tensors_read.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints import compressed_blocks as blocks
from fewbits.checkpoints import compressed_tensors_read as reading
from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Codec, Entry, Layer, Stored
from fewbits.checkpoints.words import to_e2m1, to_e4m3, to_words
from fewbits.core.errors import Unsupported
from fewbits.formats import Format, Quantized, parse_format
from fewbits.formats import bits as packing
from fewbits.formats.elements import ELEMENTS, UNSIGNED
from fewbits.formats.scales import PlainScale, State

QUANT_METHOD = "compressed-tensors"
_VERSION = "0.20.0"
# What its presets can name: integers of the full range, and E4M3.
_GRIDS = (*(ELEMENTS[f"int{bits}"] for bits in range(2, 9)), *UNSIGNED.values(), ELEMENTS["fp8_e4m3"])


def refuses(format: Format, activations: Format | None, shape: tuple[int, int]) -> str | None:
    """Why compressed-tensors cannot say this layer, or None if it can."""
    scaling, kind = format.scaling, format.grid.kind
    if blocks.layout(format):
        return blocks.refuses(format, activations, shape)
    if format.grid not in _GRIDS or not isinstance(scaling.store, PlainScale) or scaling.minimum:
        return f"it has no {format.name}"
    if scaling.block == "tile":
        return f"fewbits writes no tiles of {scaling.group_size} in it"
    if scaling.block == "group" and scaling.group_size and shape[1] % scaling.group_size:
        return f"groups of {scaling.group_size} do not divide the input dimension {shape[1]}"
    if kind == "float" and scaling.block == "group":
        return "it has no group scales for FP8"
    if scaling.zero_point and scaling.block == "tensor":
        return "it packs no zero point per tensor"
    if (
        activations is not None
        and kind == "integer"
        and format.bits == 8
        and (scaling.zero_point or scaling.block == "group")
    ):
        return "int-quantized holds symmetric weights per channel or tensor"
    return None if activations is None else _refuses_activations(activations)


def _refuses_activations(activations: Format) -> str | None:
    scaling = activations.scaling
    if scaling.sinks:
        return "it has one scale for all tokens, or one for each"
    if scaling.block not in ("token", "tensor"):
        return f"activations as {activations.name} have several scales in a token"
    return None


def refuses_mix(formats: Iterable[Format]) -> str | None:
    """Why transformers could not read linears of these formats from one checkpoint, or None if it can.

    transformers 5.23 decodes every linear by the first config group when it decodes while loading, which asymmetric
    formats need (see `quantization_config`). vLLM and fewbits read each by its own group.
    """
    distinct = {format.name: format for format in formats}
    asymmetric = sorted(name for name, format in distinct.items() if format.scaling.zero_point)
    if len(distinct) > 1 and asymmetric:
        return f"transformers reads no zero points ({asymmetric[0]}) from a file of several formats"
    return None


def layout(format: Format, activations: Format | None) -> str:
    """The value of `format` that describes such a layer."""
    if format.grid.kind == "float":
        return blocks.layout(format) or "float-quantized"
    return "int-quantized" if format.bits == 8 and activations is not None else "pack-quantized"


def _strategy(format: Format) -> str:
    return "channel" if format.scaling.block == "token" else format.scaling.block


def _arguments(format: Format, *, dynamic: bool) -> dict[str, Any]:
    grouped = dynamic and format.scaling.block == "group"
    return {
        "num_bits": format.bits,
        "type": "float" if format.grid.kind == "float" else "int",
        "symmetric": not format.scaling.zero_point,
        "strategy": format.scaling.block if dynamic else _strategy(format),
        "group_size": format.scaling.group_size,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        **(blocks.arguments(format) if blocks.layout(format) or grouped else {}),
    }


def quantization_config(
    formats: Format | Mapping[str, Format], activations: Format | None, ignore: Iterable[str]
) -> dict[str, Any]:
    """`quantization_config` of config.json for a model whose linears, but for `ignore`, are of one format, or each of
    its own: then one config group a format, with the modules' names as its targets."""
    named: dict[str, list[str]] = {}
    by_name = {"": formats} if isinstance(formats, Format) else dict(formats)
    for module, format in by_name.items():
        named.setdefault(format.name, []).append(module)
    distinct = {format.name: format for format in by_name.values()}
    groups = {
        f"group_{index}": _group(format, activations, sorted(named[name]) if len(distinct) > 1 else ["Linear"])
        for index, (name, format) in enumerate(distinct.items())
    }
    kinds = {group["format"] for group in groups.values()}
    # compressed-tensors 0.20 sizes an asymmetric module's packed zero points wrongly before loading (its
    # meta-device path leaves them unpacked), so transformers refuses the file; decoding while loading is sound.
    # vLLM and SGLang do not read this key.
    extra = {"dequantize": True} if any(format.scaling.zero_point for format in distinct.values()) else {}
    return {
        "quant_method": QUANT_METHOD,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": _VERSION,
        **extra,
    }


def _group(format: Format, activations: Format | None, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": _arguments(format, dynamic=False),
        "input_activations": (
            None if activations is None else _arguments(activations, dynamic=not activations.scaling.static)
        ),
        "output_activations": None,
        "format": layout(format, activations),
    }


def encode(weight: Quantized, activations: Format | None, inputs: State | None = None) -> dict[str, Tensor]:
    """The tensors of one linear, by suffix; inputs: the static parameters of its activations (formats/rows.py).

    Raises Unsupported where `refuses` gives a reason.
    """
    reason = refuses(weight.format, activations, weight.shape)
    if reason is not None:
        raise Unsupported(f"compressed-tensors cannot hold {weight.format.name}: {reason}; use the native format")
    state = weight.to_state()
    held = Stored(format=weight.format, shape=weight.shape, state=state, activations=activations, inputs=inputs or {})
    return _tensors(held)


def _tensors(stored: Stored) -> dict[str, Tensor]:
    inputs = {}
    if "input_scale" in stored.inputs:
        dtype = stored.state["scale"].dtype
        inputs["input_scale"] = stored.inputs["input_scale"].reshape(1).to(dtype)
    if "input_zero" in stored.inputs:
        inputs["input_zero_point"] = (stored.inputs["input_zero"].reshape(1) ^ 128).view(torch.int8)
    return {**_weight_tensors(stored), **inputs}


def _weight_tensors(stored: Stored) -> dict[str, Tensor]:
    format, codes, scale = stored.format, stored.state["codes"], stored.state["scale"]
    kind = layout(format, stored.activations)
    scale = scale.reshape(1) if format.scaling.block == "tensor" else scale
    if kind in (blocks.NVFP4, blocks.MXFP4):
        outer = {"weight_global_scale": stored.state["scale_divisor"]} if kind == blocks.NVFP4 else {}
        return {"weight_packed": to_e2m1(codes), "weight_scale": scale, **outer}
    if format.grid.kind == "float":
        return {"weight": to_e4m3(codes), "weight_scale": scale}
    if kind == "int-quantized":
        return {"weight": (codes ^ 128).view(torch.int8), "weight_scale": scale}
    tensors = {
        "weight_packed": to_words(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor(stored.shape, dtype=torch.int64),
    }
    if "zero" in stored.state:
        groups = format.parameter_shape(stored.shape)[1]
        zero = packing.unpack(stored.state["zero"], format.bits, groups)
        tensors["weight_zero_point"] = to_words(packing.pack(zero.t().contiguous(), format.bits)).t().contiguous()
    return tensors


class CompressedTensors(Codec):
    holds = "integers of 2 to 8 bits, FP8, NVFP4, MXFP4, MXFP8; loads in transformers and vLLM"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == QUANT_METHOD)

    def entries(self, source: Source) -> dict[str, Entry]:
        return reading.entries(source)

    def read(self, source: Source, module: str, entry: Entry) -> Stored:
        return reading.read(source, module, entry)

    def refuses(self, stored: Stored) -> str | None:
        format = stored.format
        if stored.order is not None:
            return "compressed-tensors 0.20 dropped activation order (weight_g_idx)"
        if stored.input_hadamard or stored.residual is not None or stored.outliers is not None:
            return "its weight is that of a transformed input, or not all in the codes"
        if format.name in ("nvfp4", "fp4_e2m1-g16-e4m3"):
            return "compressed-tensors divides by NVFP4's outer scale where this weight multiplies: its last bit moves"
        return refuses(format, stored.activations, stored.shape)

    def nearest(self, layer: Layer) -> Format:
        if layer.format.name.startswith("nvfp4") or layer.format.name == "fp4_e2m1-g16-e4m3":
            return parse_format("nvfp4_ct")
        width = layer.format.scaling.group_size or 128
        if layer.shape[1] % width:
            width = next((size for size in (128, 64, 32, 16) if layer.shape[1] % size == 0), 0)
        bits = layer.format.bits
        block = "channel" if bits == 8 or not width else f"g{width}"
        zero = "" if layer.format.symmetric or bits == 8 else "-asym"
        return parse_format(f"int{bits}{zero}-{block}").with_scale_dtype(torch.float16)

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        return _tensors(stored)

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        inputs = next((layer.activations for layer in layers.values()), None)
        formats = {name: layer.format for name, layer in layers.items()}
        single = {format.name for format in formats.values()}
        found = next(iter(formats.values())) if len(single) == 1 else formats
        return {"quantization_config": quantization_config(found, inputs, dense)}


CODEC = CompressedTensors()
