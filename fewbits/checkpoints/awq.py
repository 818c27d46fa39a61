"""AWQ checkpoints in AutoAWQ's "gemm" layout (quant_method "awq").

    qweight  int32 [in, out/8]     nibble i of word c holds output channel 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]
    qzeros   int32 [G, out/8]      zero points in the same order
    scales   float16 [G, out]

    value = (q - zero) * scales

The order of nibbles suits one CUDA kernel, which unpacks two halves at a time; the matrix is stored transposed. The
other layouts ("gemv", "gemv_fast", "llm-awq") are refused by name. Source: AutoAWQ, modules/linear/gemm.py; Lin et
al. 2023, arXiv 2306.00978.
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
    Entry,
    Layer,
    Stored,
    group_name,
    modules_with,
    tensor_named,
)
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, parse_format
from fewbits.formats import bits as packing
from fewbits.formats.scales import PlainScale

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(words: Tensor) -> Tensor:
    """uint8 codes [out, rows of `words`]."""
    codes = torch.empty((words.shape[1], 8, words.shape[0]), dtype=torch.uint8)
    turned = words.t().contiguous()
    for nibble, channel in enumerate(ORDER):
        codes[:, channel] = (turned >> (4 * nibble)) & 15
    return codes.flatten(0, 1)


def pack(codes: Tensor) -> Tensor:
    """The inverse of `unpack`: [out, n] -> int32 [n, out/8]."""
    grouped = codes.view(-1, 8, codes.shape[1])
    words = torch.zeros((grouped.shape[0], codes.shape[1]), dtype=torch.int32)
    for nibble, channel in enumerate(ORDER):
        words |= grouped[:, channel].int() << (4 * nibble)
    return words.t().contiguous()


class AWQ(Codec):
    holds = "4-bit integers in groups, with or without zero points; loads in transformers, vLLM, SGLang"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == "awq")

    def entries(self, source: Source) -> dict[str, Entry]:
        about = source.config().get("quantization_config", {})
        version, bits = str(about.get("version", "gemm")).lower(), about.get("bits", about.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise Unsupported(f"AWQ layout {version!r} of {bits} bits is not read by fewbits; it reads 'gemm' of 4")
        return {
            module: Entry(
                tensor=f"{module}.weight",
                parts=tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales")),
                about=about,
            )
            for module in modules_with(source.names(), "qweight")
        }

    def read(self, source: Source, module: str, entry: Entry) -> Stored:
        words = tensor_named(source, f"{module}.qweight", 2, torch.int32)
        scales = tensor_named(source, f"{module}.scales", 2, *FLOATS)
        packed = tensor_named(source, f"{module}.qzeros", 2, torch.int32)
        columns, rows, groups = words.shape[0], 8 * words.shape[1], scales.shape[0]
        if scales.shape[1] != rows or packed.shape != (groups, words.shape[1]) or not groups or columns % groups:
            raise BadInput(f"scales {tuple(scales.shape)}, qzeros {tuple(packed.shape)} for weights {rows} x {columns}")
        zero = unpack(packed)
        symmetric = entry.about.get("zero_point") is False and bool((zero == 8).all())
        state = {"codes": packing.pack(unpack(words), 4), "scale": scales.t().contiguous()}
        if not symmetric:
            state["zero"] = packing.pack(zero, 4)
        name = f"int4{'' if symmetric else '-asym'}-{group_name(columns // groups, columns)}"
        format = parse_format(name).with_scale_dtype(scales.dtype)
        return Stored(format=format, shape=(rows, columns), state=state)

    def refuses(self, stored: Stored) -> str | None:
        format, (rows, columns) = stored.format, stored.shape
        scaling = format.scaling
        if format.grid.kind != "integer" or format.bits != 4 or not isinstance(scaling.store, PlainScale):
            return f"AWQ has no {format.name}"
        if scaling.minimum or "narrow" in format.name or scaling.block not in ("group", "channel"):
            return f"AWQ holds 4-bit integers in groups; this is {format.name}"
        if not stored.plain:
            return "AWQ has no quantized, transformed or reordered activations and no residuals"
        if rows % 8 or columns % scaling.width(columns):
            return f"{rows} x {columns} does not divide into words of 8 and groups of {scaling.width(columns)}"
        if scaling.scale_dtype != torch.float16:
            return f"AWQ stores float16 scales; these are {str(scaling.scale_dtype).removeprefix('torch.')}"
        return None

    def nearest(self, layer: Layer) -> Format:
        size = layer.format.scaling.group_size or 128
        size = size if layer.shape[1] % size == 0 else 32
        return parse_format(f"int4-asym-{group_name(size, layer.shape[1])}").with_scale_dtype(torch.float16)

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        rows, groups = stored.format.parameter_shape(stored.shape)
        if "zero" in stored.state:
            zero = packing.unpack(stored.state["zero"], 4, groups)
        else:
            zero = torch.full((rows, groups), 8, dtype=torch.uint8)
        return {
            "qweight": pack(packing.unpack(stored.state["codes"], 4, stored.shape[1])),
            "qzeros": pack(zero),
            "scales": stored.state["scale"].t().contiguous(),
        }

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        found = list(layers.values())
        sizes = {layer.format.scaling.group_size for layer in found}
        if len(sizes) > 1:
            raise Unsupported(f"AWQ has one group size for all layers; these have {sorted(map(str, sizes))}")
        size = sizes.pop()
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": -1 if size is None else size,
            "zero_point": any(layer.format.scaling.zero_point for layer in found),
            "version": "gemm",
            "modules_to_not_convert": sorted(dense) or None,
        }
        return {"quantization_config": config}


CODEC = AWQ()
