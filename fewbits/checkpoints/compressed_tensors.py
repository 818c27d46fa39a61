"""compressed-tensors: the format vLLM, SGLang and transformers load (quant_method "compressed-tensors").

Per quantized linear, by `format` (compressed-tensors 0.20, compressors/):
- pack-quantized: `weight_packed` int32 [out, ceil(in*b/32)], code q + 2**(b-1), element i at bit i*b, least
  significant first, across word borders; `weight_scale` [out, G]; `weight_shape` int64 [2]; asymmetric:
  `weight_zero_point` int32 packed the same way along the *output* dimension, [ceil(out*b/32), G].
- int-quantized: `weight` int8 [out, in], `weight_scale` [out, 1].
- float-quantized: `weight` float8_e4m3fn [out, in], `weight_scale` [out, 1] or [1].
- what scales blocks otherwise (MXFP4, FP8 tiles): compressed_blocks.py.

A row of 32-bit words read as bytes is fewbits' canonical packing padded to whole words, and the offset
code is the canonical level index, so packing changes no code. What this format cannot say (tables such as
NF4, groups that do not divide the input dimension, E5M2) is written in the native format instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints import compressed_blocks as blocks
from fewbits.checkpoints.base import Source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, Quantized, parse_format
from fewbits.formats import bits as packing
from fewbits.formats.elements import ELEMENTS, UNSIGNED
from fewbits.formats.scales import PlainScale

QUANT_METHOD = "compressed-tensors"
_VERSION = "0.20.0"


@dataclass(frozen=True, kw_only=True)
class DecodedModule:
    """One quantized linear of a checkpoint: its weight and, if any, the format of its activations."""

    weight: Quantized
    activations: Format | None = None


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
    if activations is not None and activations.scaling.block != "token":
        return f"activations as {activations.name} are not dynamic per token"
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
    return {
        "num_bits": format.bits,
        "type": "float" if format.grid.kind == "float" else "int",
        "symmetric": not format.scaling.zero_point,
        "strategy": "token" if dynamic else _strategy(format),
        "group_size": format.scaling.group_size,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        **(blocks.arguments(format) if blocks.layout(format) or (dynamic and format.scaling.block == "group") else {}),
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
        "input_activations": None if activations is None else _arguments(activations, dynamic=True),
        "output_activations": None,
        "format": layout(format, activations),
    }


def _to_words(codes: Tensor, bits: int) -> Tensor:
    packed = packing.pack(codes, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4))
    # Through one dimension: a matrix of one row may keep a stride that no view as words accepts.
    return padded.reshape(-1).view(torch.int32).reshape(len(codes), -1)


def _from_words(words: Tensor, bits: int, count: int) -> Tensor:
    packed = words.reshape(-1).view(torch.uint8).reshape(len(words), -1)
    length = packing.packed_length(count, bits)
    if packed.shape[-1] != -(-length // 4) * 4:
        raise BadInput(f"packed rows of {packed.shape[-1]} bytes; {count} codes of {bits} bits take {length}")
    return packing.unpack(packed[..., :length].contiguous(), bits, count)


def encode(weight: Quantized, activations: Format | None) -> dict[str, Tensor]:
    """The tensors of one linear, by suffix. Raises Unsupported where `refuses` gives a reason."""
    reason = refuses(weight.format, activations, weight.shape)
    if reason is not None:
        raise Unsupported(f"compressed-tensors cannot hold {weight.format.name}: {reason}; use the native format")
    if blocks.layout(weight.format):
        return blocks.encode(weight)
    kind = layout(weight.format, activations)
    scale = weight.scale.reshape(1) if weight.format.scaling.block == "tensor" else weight.scale
    if kind == "float-quantized":
        values = weight.format.grid.value(weight.codes)
        return {"weight": values.to(torch.float8_e4m3fn), "weight_scale": scale}
    bits = weight.format.bits
    if kind == "int-quantized":
        return {"weight": (weight.codes.short() - 128).to(torch.int8), "weight_scale": scale}
    tensors = {
        "weight_packed": _to_words(weight.codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        tensors["weight_zero_point"] = _to_words(weight.zero.t().contiguous(), bits).t().contiguous()
    return tensors


def _format_of(arguments: dict[str, Any], *, where: str) -> Format:
    """The format that quantization arguments describe; Unsupported for what is not read here."""
    bits, kind, strategy = arguments.get("num_bits"), arguments.get("type"), arguments.get("strategy")
    if arguments.get("dynamic") not in (True, False, None):
        raise Unsupported(f"{where}: dynamic={arguments['dynamic']!r} is not read by fewbits")
    if name := blocks.format_name(arguments):
        return parse_format(name)
    readable = {("int", width): f"int{width}" for width in range(2, 9)} | {("float", 8): "fp8_e4m3"}
    element = readable.get((str(kind), bits)) if isinstance(bits, int) else None
    if element is None or strategy not in ("tensor", "channel", "group", "token"):
        raise Unsupported(
            f"{where}: {bits}-bit {kind} per {strategy} is not read by fewbits; load it with vLLM or transformers"
        )
    zero = "" if arguments.get("symmetric", True) else "-asym"
    block = f"g{arguments.get('group_size')}" if strategy == "group" else strategy
    return parse_format(f"{element}{zero}-{block}")


def _targets(group: dict[str, Any], module: str) -> bool:
    for target in group.get("targets", []):
        if target == "Linear" or target == module:
            return True
        if target.startswith("re:") and re.match(target[3:], module):
            return True
    return False


def quantized_modules(source: Source) -> dict[str, dict[str, Any]]:
    """Module name -> its config group, for every module of `source` that holds quantized tensors."""
    config = source.config().get("quantization_config", {})
    groups = list(config.get("config_groups", {}).values())
    names = source.names()
    present = set(names)
    modules = [name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")]
    modules += [
        name.removesuffix(".weight_scale")
        for name in names
        if name.endswith(".weight_scale") and f"{name.removesuffix('_scale')}" in present
    ]
    found = {}
    for module in modules:
        group = next((group for group in groups if _targets(group, module)), None)
        if group is None:
            raise BadInput(f"{module}: quantized in the file, but no group of quantization_config names it")
        found[module] = group
    return found


def decode(source: Source, module: str, group: dict[str, Any]) -> DecodedModule:
    """Reads one linear back as codes; exactly what was written, no rounding."""
    format = _format_of(group["weights"], where=module)
    inputs = group.get("input_activations")
    activations = None if inputs is None else _format_of(inputs, where=f"{module} activations")
    if f"{module}.weight_g_idx" in source.names():
        raise Unsupported(
            f"{module}: activation order with g_idx is not read by fewbits; load it with vLLM or transformers"
        )
    scale = source.tensor(f"{module}.weight_scale")
    if format.name == "mxfp4":
        weight = blocks.decode_mxfp4(source.tensor(f"{module}.weight_packed"), scale, module)
        return DecodedModule(weight=weight, activations=activations)
    zero = None
    if f"{module}.weight_packed" in source.names():
        shape = source.tensor(f"{module}.weight_shape")
        if shape.numel() != 2 or shape.dtype != torch.int64 or int(shape.min()) < 1:
            raise BadInput(f"{module}.weight_shape: {shape.tolist()} is no shape [out, in]")
        rows, columns = (int(size) for size in shape)
        words = source.tensor(f"{module}.weight_packed")
        if words.dim() != 2 or words.shape[0] != rows or words.dtype != torch.int32:
            raise BadInput(f"{module}.weight_packed: {words.dtype} {tuple(words.shape)} does not hold {rows} rows")
        codes = _from_words(words, format.bits, columns)
        if format.scaling.zero_point:
            packed = source.tensor(f"{module}.weight_zero_point")
            zero = _from_words(packed.t().contiguous(), format.bits, rows).t().contiguous()
    else:
        stored = source.tensor(f"{module}.weight")
        if stored.dtype == torch.int8:
            codes = (stored.short() + 128).to(torch.uint8)
        elif stored.dtype == torch.float8_e4m3fn:
            codes = format.grid.nearest(stored.float())
        else:
            raise BadInput(f"{module}.weight: {stored.dtype}; int8 or float8_e4m3fn belongs to {group.get('format')}")
    expected = format.parameter_shape((codes.shape[0], codes.shape[1]))
    if scale.numel() != expected[0] * expected[1]:
        raise BadInput(f"{module}.weight_scale: shape {tuple(scale.shape)}; {format.name} has {expected} here")
    scale = scale.reshape(expected)
    if not bool(torch.isfinite(scale).all()):
        raise BadInput(f"{module}.weight_scale holds NaN or infinite values: the checkpoint is damaged")
    weight = Quantized(format=format.with_scale_dtype(scale.dtype), codes=codes, scale=scale, zero=zero)
    return DecodedModule(weight=weight, activations=activations)
