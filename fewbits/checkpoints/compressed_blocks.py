"""Block formats in compressed-tensors: MXFP4, MXFP8, NVFP4 and FP8 in tiles of 128 x 128.

- mxfp4-pack-quantized: `weight_packed` uint8 [out, in/2], the earlier element in the lower four bits, each a sign and
  an index into E2M1's magnitudes; `weight_scale` uint8 [out, in/32], the exponent of a power of two plus 127.
- mxfp8-quantized: `weight` float8_e4m3fn [out, in] with such scales.
- nvfp4-pack-quantized: packed as MXFP4, `weight_scale` E4M3 [out, in/16], `weight_global_scale` float32 [1]: a divisor.
- float-quantized, strategy "block": `weight` float8_e4m3fn [out, in], `weight_scale` [out/128, in/128].

Activations: MXFP4's are groups of 32 again, FP8's groups of 128 of a token. The library pads nothing, so what the
blocks do not divide goes out in the native format. So does `nvfp4`, whose outer scale multiplies: this format divides
by its own, which is `nvfp4_ct` here, and the last bit of the two differs. What activations are rounded to is up to who
runs the file: the library's MX scales take the next power of two once a block's absmax has a mantissa of 1.75, fewbits'
follow OCP's rule, the power of two below.
"""

from __future__ import annotations

from typing import Any

from fewbits.formats import Format
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.scales import DividedScale, PlainScale, PowerScale

MXFP4, MXFP8, NVFP4 = "mxfp4-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized"
_TILE = 128
_PARTNERS = {MXFP4: ("mxfp4", "fp8_e4m3-g128"), MXFP8: ("mxfp8",), NVFP4: (), "float-quantized": ("fp8_e4m3-g128",)}


def layout(format: Format) -> str | None:
    """The value of `format` that describes such a layer; None where this module has nothing to say."""
    scaling, fp8 = format.scaling, format.grid == ELEMENTS["fp8_e4m3"]
    if scaling.block == "tile":
        plain = fp8 and isinstance(scaling.store, PlainScale) and scaling.group_size == _TILE
        return "float-quantized" if plain else None
    if scaling.block != "group" or not (fp8 or format.grid == ELEMENTS["fp4_e2m1"]):
        return None
    if scaling.group_size == 32 and isinstance(scaling.store, PowerScale):
        return MXFP8 if fp8 else MXFP4
    return NVFP4 if scaling.group_size == 16 and isinstance(scaling.store, DividedScale) and not fp8 else None


def refuses(format: Format, activations: Format | None, shape: tuple[int, int]) -> str | None:
    """Why a layer of one of these formats cannot be said, or None if it can."""
    size, kind = format.scaling.group_size, layout(format)
    assert size is not None and kind is not None
    if shape[1] % size or (format.scaling.block == "tile" and shape[0] % size):
        return f"blocks of {size} do not divide {shape[0]} x {shape[1]}"
    if activations is not None and activations.name not in _PARTNERS[kind]:
        return f"activations as {activations.name} do not go with weights in {format.name}"
    return None


def arguments(format: Format) -> dict[str, Any]:
    """What differs from the usual arguments."""
    if format.scaling.block == "tile":
        return {"strategy": "block", "group_size": None, "block_structure": [_TILE, _TILE]}
    if layout(format) == NVFP4:
        return {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    return {"strategy": "group", "scale_dtype": "torch.uint8"} if layout(format) else {"strategy": "group"}


def format_name(arguments: dict[str, Any], *, inputs: bool) -> str | None:
    """The format that quantization arguments describe; None where it is none of these."""
    bits, kind, strategy = arguments.get("num_bits"), arguments.get("type"), arguments.get("strategy")
    size, powers = arguments.get("group_size"), "uint8" in str(arguments.get("scale_dtype"))
    if kind != "float" or not arguments.get("symmetric", True):
        return None
    if (bits, strategy, size) == (4, "tensor_group", 16):
        return "nvfp4" if inputs else "nvfp4_ct"
    if strategy == "group" and size == 32 and (powers or bits == 8):
        return {4: "mxfp4", 8: "mxfp8"}.get(bits) if isinstance(bits, int) else None
    sides = arguments.get("block_structure")
    if bits == 8 and strategy == "block" and isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1]:
        return "fp8_block" if sides[0] == _TILE else f"fp8_e4m3-tile{sides[0]}"
    if inputs and (bits, strategy) == (8, "group"):
        return f"fp8_e4m3-g{size}"
    return None
