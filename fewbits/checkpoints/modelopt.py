"""NVIDIA ModelOpt's exports: NVFP4, FP8, MXFP8, INT8 (quant_method "modelopt").

    NVFP4  weight uint8 [out, in/2], even columns low; weight_scale E4M3 [out, in/16]; weight_scale_2 float32, a factor
    FP8    weight float8_e4m3fn; weight_scale float32, one, one a row, or one a tile of 128: [out/128, 1, in/128, 1]
    MXFP8  weight float8_e4m3fn; weight_scale uint8, E8M0 [out, in/32]
    INT8   weight int8; weight_scale float32 [out]

What a layer's weight is, its tensors say. Activations are rounded where there is an `input_scale`, whose calibrated
value is not used, or where the method (`quant_algo`) rounds them as they come. `pre_quant_scale` multiplies the input
(AWQ, SmoothQuant): such a weight is decoded and takes the factor in. SVDQuant's factors and INT4 are refused. Written
are the methods that need no calibrated scale: W4A16_NVFP4, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO and MXFP8; one scale
for a whole weight becomes one a row.

Source: nvidia-modelopt 0.47 (torch/export, torch/quantization/qtensor); vLLM (quantization/modelopt.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import FLOATS, Codec, Dense, Entry, Layer, Stored, modules_with, tensor_named
from fewbits.checkpoints.words import from_e2m1, from_e4m3, to_e2m1, to_e4m3
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, parse_format
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.scales import DividedScale, PlainScale

_PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_REFUSED = ("svdquant_lora_a", "svdquant_lora_b", "weight_quantizer._scale")
# Methods that round activations as they come, to what.
_DYNAMIC = {
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_e4m3-token",
    "FP8_PB_WO": "fp8_e4m3-g128",
    "MXFP8": "mxfp8",
}
_NOTE = "calibrated scales of activations are not used: each token has its own"


class ModelOpt(Codec):
    holds = "NVFP4, FP8, MXFP8, INT8; loads in vLLM, SGLang, TensorRT-LLM"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return str(quantization.get("quant_method")).startswith("modelopt")

    def entries(self, source: Source) -> dict[str, Entry]:
        names, about = source.names(), source.config().get("quantization_config", {})
        present, found = set(names), {}
        for module in modules_with(names, "weight_scale"):
            other = next((part for part in _REFUSED if f"{module}.{part}" in present), None)
            if other:
                raise Unsupported(f"{module}: {other} is not read by fewbits; load it with vLLM or TensorRT-LLM")
            parts = tuple(name for part in _PARTS if (name := f"{module}.{part}") in present)
            found[module] = Entry(tensor=f"{module}.weight", parts=parts, about=_algorithm(about, module))
        return found

    def read(self, source: Source, module: str, entry: Entry) -> Stored | Dense:
        dtypes = (torch.uint8, torch.float8_e4m3fn, torch.int8)
        weight = tensor_named(source, f"{module}.weight", 2, *dtypes)
        scale, rows, columns = source.tensor(f"{module}.weight_scale"), weight.shape[0], weight.shape[1]
        inputs, method = f"{module}.input_scale" in entry.parts, _DYNAMIC.get(entry.about)
        outer = {}
        if weight.dtype == torch.uint8:
            if f"{module}.weight_scale_2" not in entry.parts:
                raise Unsupported(f"{module}: packed INT4 is not read by fewbits; load it with vLLM or TensorRT-LLM")
            columns *= 2
            name, codes, activations = "nvfp4", from_e2m1(weight), "nvfp4"
            outer = {"scale_outer": source.tensor(f"{module}.weight_scale_2").reshape(-1).float()}
        elif weight.dtype == torch.int8:
            name, codes, activations = "int8-channel", weight.view(torch.uint8) ^ 128, "int8-token"
        else:
            name, codes, activations = _eight_bits(scale.numel(), scale.dtype, rows, columns), from_e4m3(weight), ""
            activations = "mxfp8" if name == "mxfp8" else "fp8_e4m3-g128" if name == "fp8_block" else "fp8_e4m3-token"
        format = parse_format(name)
        if scale.numel() != torch.Size(format.parameter_shape((rows, columns))).numel():
            raise BadInput(f"{module}.weight_scale: {tuple(scale.shape)} for {format.name} on {rows} x {columns}")
        stored = Stored(
            format=format.with_scale_dtype(scale.dtype) if scale.dtype in FLOATS else format,
            shape=(rows, columns),
            state={"codes": codes, "scale": scale.reshape(format.parameter_shape((rows, columns))), **outer},
            activations=parse_format(activations) if inputs or method == activations else None,
            note=_NOTE if inputs else "",
        )
        if f"{module}.pre_quant_scale" not in entry.parts:
            return stored
        factor = tensor_named(source, f"{module}.pre_quant_scale", 1, *FLOATS)
        if len(factor) != columns:
            raise BadInput(f"{module}.pre_quant_scale has {len(factor)} factors for {columns} input channels")
        return Dense(value=stored.dense() * factor.float(), note="pre_quant_scale taken in: decoded in float32")

    def refuses(self, stored: Stored) -> str | None:
        if stored.order is not None or stored.input_hadamard or stored.residual or stored.outliers:
            return "ModelOpt has no transformed or reordered activations and no residuals"
        found = _written_as(stored.format)
        if found is None:
            divided = isinstance(stored.format.scaling.store, DividedScale)
            why = "multiplies by NVFP4's outer scale where this weight divides: its last bit moves"
            return f"ModelOpt {why}" if divided else f"ModelOpt has no {stored.format.name}"
        algorithm, rows, columns = found, *stored.shape
        block = {"W4A16_NVFP4": (1, 16), "MXFP8": (1, 32), "FP8_PB_WO": (128, 128)}.get(algorithm, (1, 1))
        if rows % block[0] or columns % block[1]:
            return f"{rows} x {columns} are no whole blocks of {block[0]} x {block[1]}"
        if stored.activations is not None and stored.activations.name != _DYNAMIC.get(algorithm):
            return f"{algorithm} does not round activations to {stored.activations.name}"
        return None

    def nearest(self, layer: Layer) -> Format:
        if layer.format.bits <= 4 and layer.shape[1] % 16 == 0:
            return parse_format("nvfp4")
        return parse_format("fp8_e4m3-channel")

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        codes, scale = stored.state["codes"], stored.state["scale"]
        algorithm = _written_as(stored.format)
        if algorithm == "W4A16_NVFP4":
            outer = stored.state["scale_outer"].reshape(())
            return {"weight": to_e2m1(codes), "weight_scale": scale, "weight_scale_2": outer}
        if algorithm == "FP8_PB_WO":
            scale = scale.float()[:, None, :, None]
        elif algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            scale = scale.float().reshape(-1).expand(stored.shape[0]).contiguous()
        return {"weight": to_e4m3(codes), "weight_scale": scale}

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        said = {name: _said(layer.format) for name, layer in layers.items()}
        kinds = list(said.values())
        mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": said}
        about = kinds[0] if all(kind == kinds[0] for kind in kinds) else mixed
        config = {"quant_method": "modelopt", **about, "ignore": sorted(dense), "producer": {"name": "fewbits"}}
        return {"quantization_config": config}


def _algorithm(about: dict[str, Any], module: str) -> str:
    """The method's name for one module, in capitals; empty where nothing states it."""
    layers = about.get("quantized_layers")
    own = layers.get(module) if isinstance(layers, dict) else None
    stated = own.get("quant_algo") if isinstance(own, dict) else about.get("quant_algo")
    return stated.upper() if isinstance(stated, str) else ""


def _written_as(format: Format) -> str | None:
    """The method that holds weights of `format`, or None."""
    if format.name == "nvfp4":
        return "W4A16_NVFP4"
    if format.name == "mxfp8":
        return "MXFP8"
    if format.grid != ELEMENTS["fp8_e4m3"] or not isinstance(format.scaling.store, PlainScale):
        return None
    if format.scaling.block == "tile":
        return "FP8_PB_WO" if format.scaling.group_size == 128 else None
    return "FP8_PER_CHANNEL_PER_TOKEN" if format.scaling.block in ("tensor", "channel") else None


def _said(format: Format) -> dict[str, Any]:
    group = {"group_size": 16} if format.name == "nvfp4" else {}
    return {"quant_algo": _written_as(format), **group}


def _eight_bits(count: int, dtype: torch.dtype, rows: int, columns: int) -> str:
    """The format of FP8 with that many scales."""
    if dtype == torch.uint8:
        return "mxfp8"
    if count == 1:
        return "fp8_e4m3-tensor"
    return "fp8_e4m3-channel" if count == rows else "fp8_block"


CODEC = ModelOpt()
