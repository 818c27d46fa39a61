"""NVIDIA ModelOpt's exports: NVFP4, FP8, MXFP8, INT8 (quant_method "modelopt").

    NVFP4  weight uint8 [out, in/2], even columns low; weight_scale E4M3 [out, in/16]; weight_scale_2 float32, a factor
    FP8    weight float8_e4m3fn; weight_scale float32, one or one a row
    MXFP8  weight float8_e4m3fn; weight_scale uint8, E8M0 [out, in/32]
    INT8   weight int8; weight_scale float32 [out]

What a layer is, its tensors say; `hf_quant_config.json` is only read for the method's name where config.json has none.
`input_scale` says that activations are rounded; its calibrated value is not used. `pre_quant_scale` multiplies the
input (AWQ, SmoothQuant): such a weight is decoded and takes the factor in. SVDQuant's factors and INT4 are refused.

Source: nvidia-modelopt 0.47 (torch/export, torch/quantization/qtensor).
"""

from __future__ import annotations

from typing import Any

import torch

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import FLOATS, Codec, Dense, Entry, Stored, modules_with, tensor_named
from fewbits.checkpoints.words import from_e2m1, from_e4m3
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, parse_format

_PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_REFUSED = ("svdquant_lora_a", "svdquant_lora_b", "weight_quantizer._scale")
_NOTE = "calibrated scales of activations are not used: each token has its own"


class ModelOpt(Codec):
    holds = "NVFP4, FP8, MXFP8, INT8; loads in vLLM, SGLang, TensorRT-LLM"

    def claims(self, quantization: dict[str, Any]) -> bool:
        return str(quantization.get("quant_method")).startswith("modelopt")

    def entries(self, source: Source) -> dict[str, Entry]:
        names = source.names()
        present, found = set(names), {}
        for module in modules_with(names, "weight_scale"):
            other = next((part for part in _REFUSED if f"{module}.{part}" in present), None)
            if other:
                raise Unsupported(f"{module}: {other} is not read by fewbits; load it with vLLM or TensorRT-LLM")
            parts = tuple(name for part in _PARTS if (name := f"{module}.{part}") in present)
            found[module] = Entry(tensor=f"{module}.weight", parts=parts)
        return found

    def read(self, source: Source, module: str, entry: Entry) -> Stored | Dense:
        dtypes = (torch.uint8, torch.float8_e4m3fn, torch.int8)
        weight = tensor_named(source, f"{module}.weight", 2, *dtypes)
        scale, rows, columns = source.tensor(f"{module}.weight_scale"), weight.shape[0], weight.shape[1]
        inputs = f"{module}.input_scale" in entry.parts
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
            activations=_format(activations) if inputs else None,
            note=_NOTE if inputs else "",
        )
        if f"{module}.pre_quant_scale" not in entry.parts:
            return stored
        factor = tensor_named(source, f"{module}.pre_quant_scale", 1, *FLOATS)
        if len(factor) != columns:
            raise BadInput(f"{module}.pre_quant_scale has {len(factor)} factors for {columns} input channels")
        return Dense(value=stored.dense() * factor.float(), note="pre_quant_scale taken in: decoded in float32")


def _format(name: str) -> Format:
    return parse_format(name)


def _eight_bits(count: int, dtype: torch.dtype, rows: int, columns: int) -> str:
    """The format of FP8 with that many scales."""
    if dtype == torch.uint8:
        return "mxfp8"
    if count == 1:
        return "fp8_e4m3-tensor"
    return "fp8_e4m3-channel" if count == rows else "fp8_block"


CODEC = ModelOpt()
