"""Block formats in compressed-tensors: MXFP4 and FP8 in tiles of 128 x 128, weights alone or with activations.

- mxfp4-pack-quantized: `weight_packed` uint8 [out, in/2], the earlier element in the lower four bits, each a sign and
  an index into E2M1's magnitudes; `weight_scale` uint8 [out, in/32], the exponent of a power of two plus 127.
- float-quantized, strategy "block": `weight` float8_e4m3fn [out, in], `weight_scale` [out/128, in/128].

Activations: MXFP4's are groups of 32 again, FP8's groups of 128 of a token. The library pads nothing, so what the
blocks do not divide goes out in the native format. NVFP4 does, too: this format divides by a global scale where fewbits
multiplies, and the last bit of the product may differ. What activations are rounded to is up to who runs the file: the
library's MX scales take the next power of two once a block's absmax has a mantissa of 1.75, fewbits' follow OCP's rule,
the power of two below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats import Format, Quantized, parse_format
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.scales import PlainScale, PowerScale

MXFP4 = "mxfp4-pack-quantized"
_TILE = 128


def layout(format: Format) -> str | None:
    """The value of `format` that describes such a layer; None where this module has nothing to say."""
    scaling = format.scaling
    if _mxfp4(format):
        return MXFP4
    fp8 = format.grid == ELEMENTS["fp8_e4m3"] and isinstance(scaling.store, PlainScale)
    return "float-quantized" if fp8 and scaling.block == "tile" and scaling.group_size == _TILE else None


def _mxfp4(format: Format) -> bool:
    scaling = format.scaling
    grouped = scaling.block == "group" and scaling.group_size == 32
    return format.grid == ELEMENTS["fp4_e2m1"] and isinstance(scaling.store, PowerScale) and grouped


def refuses(format: Format, activations: Format | None, shape: tuple[int, int]) -> str | None:
    """Why a layer of one of these formats cannot be said, or None if it can."""
    size = format.scaling.group_size
    assert size is not None
    if shape[1] % size or (format.scaling.block == "tile" and shape[0] % size):
        return f"blocks of {size} do not divide {shape[0]} x {shape[1]}"
    partner = "mxfp4" if _mxfp4(format) else "fp8_e4m3-g128"
    if activations is not None and activations.name != partner:
        return f"activations as {activations.name} do not go with weights in {format.name}"
    return None


def arguments(format: Format) -> dict[str, Any]:
    """What differs from the usual arguments."""
    if _mxfp4(format):
        return {"strategy": "group", "scale_dtype": "torch.uint8"}
    if format.scaling.block == "tile":
        return {"strategy": "block", "group_size": None, "block_structure": [_TILE, _TILE]}
    return {"strategy": "group"}


def encode(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one linear, by suffix."""
    if layout(weight.format) != MXFP4:
        values = weight.format.grid.value(weight.codes)
        return {"weight": values.to(torch.float8_e4m3fn), "weight_scale": weight.scale}
    middle = len(weight.format.grid.levels) // 2
    rank = weight.codes.short() - middle
    nibbles = (rank.abs() | ((rank < 0).short() << 3)).to(torch.uint8)
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return {"weight_packed": packed.contiguous(), "weight_scale": weight.format.settle(weight.scale, None)[2]["scale"]}


def format_name(arguments: dict[str, Any]) -> str | None:
    """The format that quantization arguments describe; None where it is none of these."""
    kind = arguments.get("num_bits"), arguments.get("type"), arguments.get("strategy")
    if kind == (4, "float", "group") and arguments.get("group_size") == 32:
        return "mxfp4" if "uint8" in str(arguments.get("scale_dtype")) else None
    if kind == (8, "float", "block"):
        return "fp8_block" if arguments.get("block_structure") == [_TILE, _TILE] else None
    if kind == (8, "float", "group") and arguments.get("dynamic") is True:
        return f"fp8_e4m3-g{arguments.get('group_size')}"
    return None


def decode_mxfp4(packed: Tensor, scale: Tensor, module: str) -> Quantized:
    """Codes and scales of one linear from its tensors."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if packed.dtype != torch.uint8 or scale.dtype != torch.uint8 or tuple(scale.shape) != (rows, columns // 32):
        raise BadInput(f"{module}: {packed.dtype} {tuple(packed.shape)} with scales {tuple(scale.shape)} is no MXFP4")
    format = parse_format("mxfp4")
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).view(rows, columns).short()
    rank = torch.where(nibbles >= 8, -(nibbles & 7), nibbles)
    codes = (rank + len(format.grid.levels) // 2).to(torch.uint8)
    return Quantized(format=format, codes=codes, scale=format.unsettle((rows, columns), {"scale": scale})[0])
