"""Which layers a runtime has a kernel for: to read a checkpoint format is not yet to run every layer it can hold.

vLLM chooses a scheme by the kinds of weights and activations, then the first kernel that takes the layer. On CUDA, for
integer weights and 16-bit activations:

| kernel | weights | groups | where |
|---|---|---|---|
| Marlin | 4 bits, 8 without zero points | 32, 64, 128, a row | everywhere |
| Triton | 4 bits | 256 | everywhere |
| Machete | 8 bits with zero points | 64, 128, a row | Hopper |
| Exllama | 4 and 8 bits without zero points | any that divide the rows | in float16 |
| Humming | 2 to 8 bits | any | where its package is installed |

GPTQ goes to Marlin or nowhere: symmetric, 4 or 8 bits, and groups in order (act-order was dropped). mlx multiplies by
groups of 32, 64 or 128.

Sources: vLLM 0.33 (layers/quantization, kernels/linear), mlx 0.32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fewbits.checkpoints.codecs import Layer
from fewbits.formats import Format
from fewbits.formats.elements import ELEMENTS

_HUMMING = "with the package humming"
_MARLIN_GROUPS = _MLX_GROUPS = (32, 64, 128)
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """what: of the layer is not computed.  unless: where it is nevertheless; empty where it never is."""

    what: str
    unless: str = ""


def vllm(kind: str, settings: dict[str, Any], layer: Layer) -> Refusal | None:
    """Why vLLM does not run a layer of a checkpoint of this format and `quantization_config`, or None."""
    size, columns = layer.format.scaling.group_size, layer.shape[1]
    if layer.format.scaling.block == "group" and size is not None and columns % size:
        return Refusal(f"groups of {size} that do not divide {columns} columns")
    if kind in ("gptq", "gptq_v2"):
        return _gptq(settings, layer)
    if kind == "awq":
        return Refusal(f"{layer.shape[0]} rows, which are not packed by 8") if layer.shape[0] % 8 else None
    if kind == "compressed-tensors":
        return _compressed(layer)
    algorithm = str(settings.get("quant_algo", "")).upper()
    if kind == "modelopt" and algorithm and algorithm not in _MODELOPT:
        return Refusal(f"ModelOpt's {algorithm}")
    return None


def mlx(kind: str, settings: dict[str, Any], layer: Layer) -> Refusal | None:
    """Why mlx-lm does not run a layer of a checkpoint of this format, or None."""
    size = layer.format.scaling.width(layer.shape[1])
    if kind == "awq" and size not in _MLX_GROUPS:
        return Refusal(f"groups of {size}")
    return None


def _gptq(settings: dict[str, Any], layer: Layer) -> Refusal | None:
    if layer.format.bits not in (4, 8):
        return Refusal(f"{layer.format.bits} bits in GPTQ")
    if layer.format.scaling.zero_point or settings.get("sym") is False:
        return Refusal("zero points in GPTQ")
    rowwise = layer.format.scaling.block == "channel"
    if not rowwise and (layer.ordered or settings.get("desc_act")):
        return Refusal("activation order in GPTQ (desc_act)")
    if not rowwise and layer.format.scaling.group_size not in _MARLIN_GROUPS:
        return Refusal(f"groups of {layer.format.scaling.group_size} in GPTQ")
    return None


def _compressed(layer: Layer) -> Refusal | None:
    weights, inputs = layer.format, layer.activations
    if inputs is None:
        return _integers(weights) if weights.grid.kind == "integer" else None
    said = f"{weights.name} with activations in {inputs.name}"
    if weights.grid.kind != "integer":
        fp8 = weights.grid == ELEMENTS["fp8_e4m3"]
        fits = not inputs.scaling.static or inputs.scaling.block == "tensor" if fp8 else True
        return None if fits else Refusal(said)
    if inputs.grid.kind != "integer":
        ready = weights.bits == 4 and not weights.scaling.zero_point and weights.scaling.group_size == 128
        return Refusal(said, "on Hopper" if ready else "")
    plain = weights.scaling.block in ("tensor", "channel") and not weights.scaling.zero_point
    if weights.bits == inputs.bits == 8 and plain:
        return None
    return Refusal(said, _HUMMING if weights.bits < 8 and not inputs.scaling.zero_point else "")


def _integers(weights: Format) -> Refusal | None:
    """Of integer weights for 16-bit activations."""
    bits, zeros, scaling = weights.bits, weights.scaling.zero_point, weights.scaling
    if scaling.block not in ("group", "channel"):
        return Refusal(f"one scale a {scaling.block} for integer weights")
    size = None if scaling.block == "channel" else scaling.group_size
    usual = size is None or size in _MARLIN_GROUPS
    if (bits == 4 and (usual or size == 256)) or (bits == 8 and usual and not zeros):
        return None
    if bits == 8 and zeros and (size is None or size in (64, 128)):
        return Refusal("8 bits with zero points", f"on Hopper, or {_HUMMING}")
    if bits in (4, 8) and not zeros:
        return Refusal(f"groups of {size}", f"in float16, or {_HUMMING}")
    return Refusal(weights.name, _HUMMING)
