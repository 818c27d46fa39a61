"""HQQ checkpoints in safetensors (quant_method "hqq").

    W_q     codes, packed over rows of the grouped matrix: uint8 halves, quarters, eighths, or int32 tenths (3 bits)
    scale, zero   float, one a group
    nbits, group_size, shape, axis, packing, view_as_float, ...   small tensors, strings as their bytes

    value = (code - zero) * scale, reshaped to `shape`

The matrix is reshaped to [groups, group_size] (axis 1) and packed so that the first half of its rows are the high
nibbles and the second half the low ones. zero is real, so this is our format with a minimum, zero * scale; where both
are 16-bit floats that product is exact in float32 and the layer is, as a real number, what HQQ means. HQQ computes it
in 16 bits. Where every zero is a whole number the layer is one of integers with zero
points. Groups along the other axis, and single bits, are decoded. What is written has scales and zeros of 16 bits.

HQQ itself evaluates the bytes of `compute_dtype` and `unpack_view_dtype` as Python. They are not read here, and other
names are compared with those that exist.

Source: hqq 0.2.8 (core/quantize.py, core/bitpack.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import (
    FLOATS,
    Codec,
    Dense,
    Entry,
    Layer,
    Stored,
    entries_with,
    group_name,
    tensor_named,
)
from fewbits.checkpoints.minima import minimum_of, with_zeros
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, parse_format
from fewbits.formats import bits as packing
from fewbits.formats.scales import PlainScale

_KEYS = (
    *("W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)
# name -> (bits of a field, fields in a word, first field's shift, dtype)
_PACKINGS = {
    "8bit_u8": (8, 1, 0, torch.uint8),
    "4bit_u8": (4, 2, 4, torch.uint8),
    "3bit_32": (3, 10, 27, torch.int32),
    "2bit_u8": (2, 4, 6, torch.uint8),
    "1bit_u8": (1, 8, 7, torch.uint8),
}
_PACKED_AS = {2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}


class HQQ(Codec):
    holds = "integers of 1 to 8 bits with real zero points; loads in transformers"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == "hqq")

    def entries(self, source: Source) -> dict[str, Entry]:
        return entries_with(source, "W_q", _KEYS)

    def read(self, source: Source, module: str, entry: Entry) -> Stored | Dense:
        rows, columns = _shape(source.tensor(f"{module}.shape"))
        axis, size = _whole(source, f"{module}.axis"), _whole(source, f"{module}.group_size")
        name = _text(source.tensor(f"{module}.packing"))
        if axis not in (0, 1) or size < 1 or rows * columns % size or name not in _PACKINGS:
            raise BadInput(f"{module}: axis {axis}, group_size {size}, packing {name!r} of {rows} x {columns}")
        scale, zero = (tensor_named(source, f"{module}.{part}", 2, *FLOATS) for part in ("scale", "zero"))
        grouped = (rows * columns // size, size) if axis == 1 else (size, rows * columns // size)
        codes = _unpack(source.tensor(f"{module}.W_q"), name, grouped)
        bits = _whole(source, f"{module}.nbits")
        shape = (grouped[0], 1) if axis == 1 else (1, grouped[1])
        if scale.shape != shape or zero.shape != shape:
            raise Unsupported(f"{module}: scales {tuple(scale.shape)}; {shape} is read (not those quantized again)")
        if axis == 0 or columns % size or not 2 <= bits <= 8 or int(codes.max()) >= 1 << bits:
            value = ((codes.float() - zero.float()) * scale.float()).reshape(rows, columns)
            return Dense(value=value, note="HQQ groups that are not of one row: decoded in float32")
        format = parse_format(f"int{bits}-min-{group_name(size, columns)}")
        scale = scale.float().reshape(rows, -1)
        state = {
            "codes": packing.pack(codes.reshape(rows, columns), bits),
            "scale": scale,
            "minimum": zero.float().reshape(rows, -1) * scale,
        }
        return with_zeros(Stored(format=format, shape=(rows, columns), state=state))

    def refuses(self, stored: Stored) -> str | None:
        format, scaling, (rows, columns) = stored.format, stored.format.scaling, stored.shape
        if not stored.plain:
            return "HQQ has no quantized, transformed or reordered activations and no residuals"
        if format.grid.kind != "integer" or not isinstance(scaling.store, PlainScale) or "narrow" in format.name:
            return f"HQQ has no {format.name}"
        if format.bits not in _PACKED_AS or scaling.block not in ("group", "channel"):
            return f"HQQ holds integers of {tuple(_PACKED_AS)} bits in groups; this is {format.name}"
        count = _PACKINGS[_PACKED_AS[format.bits]][1]
        groups = rows * columns // scaling.width(columns)
        if columns % scaling.width(columns) or (format.bits != 3 and groups % count):
            return f"{rows} x {columns} are not {count} times whole groups of {scaling.width(columns)}"
        if _scales(stored) is None:
            return "HQQ has scales and zero points of 16 bits; these have more"
        return None

    def nearest(self, layer: Layer) -> Format:
        size = layer.format.scaling.group_size or 64
        size = size if layer.shape[1] % size == 0 else layer.shape[1]
        bits = next(width for width in _PACKED_AS if width >= min(layer.format.bits, 8))
        return parse_format(f"int{bits}-asym-{group_name(size, layer.shape[1])}").with_scale_dtype(torch.float16)

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        found, bits, (rows, columns) = _scales(stored), stored.format.bits, stored.shape
        assert found is not None
        scale, zero = found
        size, packing_name = stored.format.scaling.width(columns), _PACKED_AS[bits]
        codes = packing.unpack(stored.state["codes"], bits, columns).reshape(-1, size)
        flags = {"channel_wise": True, "optimize": True, "round_zero": bits == 4, "offload_meta": False,
                 "view_as_float": False, "quant_scale": False, "quant_zero": False, "stores_quant_config": True,
                 "encoded_state_dict": True}  # fmt: skip
        texts = {"packing": packing_name, "unpack_view_dtype": str(_PACKINGS[packing_name][3]),
                 "compute_dtype": str(scale.dtype)}  # fmt: skip
        return {
            "W_q": _pack(codes, packing_name),
            "scale": scale.reshape(-1, 1),
            "zero": zero.reshape(-1, 1),
            "shape": torch.tensor([rows, columns]),
            **{name: torch.tensor(value, dtype=torch.int32)
               for name, value in (("nbits", bits), ("group_size", size), ("axis", 1))},
            **{name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()},
            **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()},
        }  # fmt: skip

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        said = {}
        for name, layer in layers.items():
            size = layer.format.scaling.width(layer.shape[1])
            weights = {"nbits": layer.format.bits, "group_size": size, "axis": 1, "view_as_float": False,
                       "channel_wise": True, "optimize": True, "round_zero": layer.format.bits == 4}  # fmt: skip
            said[name] = {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None,
                          "offload_meta": False}  # fmt: skip
        tags = {_tag(name): kind for name, kind in said.items()}
        if any(tags[_tag(name)] != kind for name, kind in said.items()):
            raise Unsupported("HQQ has one setting for linears of one name; these differ from block to block")
        kinds = list(tags.values())
        about = kinds[0] if all(kind == kinds[0] for kind in kinds) else tags
        config = {"quant_method": "hqq", "quant_config": about, "skip_modules": sorted(dense)}
        return {"quantization_config": config}


def _tag(name: str) -> str:
    """What HQQ calls the linears of one name in all blocks."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isdecimal())


def _scales(stored: Stored) -> tuple[Tensor, Tensor] | None:
    """Scale and zero point [out, G] in a 16-bit float that has their very values, or None."""
    scale, minimum = stored.state["scale"].float(), minimum_of(stored)
    zero = (minimum / scale).nan_to_num(0, 0, 0)
    for dtype in (torch.float16, torch.bfloat16):
        short, rounded = scale.to(dtype), zero.to(dtype)
        if torch.equal(short.float(), scale) and torch.equal(rounded.float() * scale, minimum):
            return short, rounded
    return None


def _pack(codes: Tensor, name: str) -> Tensor:
    """Codes uint8 [groups, size] as words: the first part of the rows in the highest field."""
    width, count, first, dtype = _PACKINGS[name]
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % count)).to(dtype)
    words = torch.zeros((len(filled) // count, codes.shape[1]), dtype=dtype)
    for index, part in enumerate(filled.chunk(count)):
        words |= part << (first - index * width)
    return words


def _unpack(words: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 of the grouped matrix."""
    width, count, first, dtype = _PACKINGS[name]
    if words.dim() != 2 or words.element_size() * words.shape[1] % dtype.itemsize:
        raise BadInput(f"W_q: {words.dtype} {tuple(words.shape)} are no codes")
    words = words.contiguous().view(dtype)
    if words.shape[1] != shape[1] or words.shape[0] != -(-shape[0] // count):
        raise BadInput(f"W_q holds {tuple(words.shape)} words of {count} codes; {shape} codes are expected")
    fields = [(words >> (first - index * width)) & ((1 << width) - 1) for index in range(count)]
    return torch.cat(fields)[: shape[0]].to(torch.uint8)


def _whole(source: Source, name: str) -> int:
    tensor = source.tensor(name)
    if tensor.numel() != 1 or not float(tensor) == int(tensor):
        raise BadInput(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is no whole number")
    return int(tensor)


def _shape(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() != 2 or tensor.is_floating_point() or not 0 < int(tensor.min()) <= int(tensor.max()) < 2**31:
        raise BadInput(f"shape: {tensor.dtype} {tuple(tensor.shape)} is no shape [out, in]")
    return int(tensor[0]), int(tensor[1])


def _text(tensor: Tensor) -> str:
    if tensor.dtype != torch.uint8 or tensor.numel() > 32:
        raise BadInput(f"{tensor.numel()} numbers of {tensor.dtype} are no name")
    return tensor.numpy().tobytes().decode("latin-1")


CODEC = HQQ()
