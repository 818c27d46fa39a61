"""HQQ checkpoints in safetensors (quant_method "hqq").

    W_q     codes, packed over rows of the grouped matrix: uint8 halves, quarters, eighths, or int32 tenths (3 bits)
    scale, zero   float, one a group
    nbits, group_size, shape, axis, packing, view_as_float, ...   small tensors, strings as their bytes

    value = (code - zero) * scale, reshaped to `shape`

The matrix is reshaped to [groups, group_size] (axis 1) and packed so that the first half of its rows are the high
nibbles and the second half the low ones. zero is real, so this is our format with a minimum, zero * scale; where both
are 16-bit floats that product is exact in float32 and the layer is, as a real number, what HQQ means. HQQ computes it
in 16 bits. Groups along the other axis, and single bits, are decoded.

HQQ itself evaluates the bytes of `compute_dtype` and `unpack_view_dtype` as Python. They are not read here, and other
names are compared with those that exist.

Source: hqq 0.2.8 (core/quantize.py, core/bitpack.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import FLOATS, Codec, Dense, Entry, Stored, entries_with, group_name, tensor_named
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import bits as packing
from fewbits.formats import parse_format

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


class HQQ(Codec):
    holds = "integers of 1 to 8 bits with real zero points; loads in transformers"

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
        return Stored(format=format, shape=(rows, columns), state=state)


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
