"""GPTQ checkpoints: AutoGPTQ's layout, and GPTQModel's second version of it (quant_method "gptq").

    qweight  int32 [ceil(in*b/32), out]     packed along the input, least significant first, across word borders
    qzeros   int32 [G, ceil(out*b/32)]      zero points, packed along the output
    scales   float16 [G, out]
    g_idx    int32 [in]                     the group of each input channel; with act-order not i // group_size

    value = scales[g_idx[i]] * (q - zero[g_idx[i]])

Version 1 ("gptq") stores zero - 1, an accident of the first implementation that every reader undoes; version 2
("gptq_v2") stores zero. For 2, 4 and 8 bits the one is subtracted from whole words, so that a field of 0 borrows from
the next: adding it to whole words gives back what was. A version-1 file is only written without zero points of 0, since
readers that add field by field differ there.

"gptq_p" keeps 5, 6 and 7 bits (and 3, where it says so) as planes: of 32 codes first the low 4 bits, then the others.

Act-order sorts the columns by importance before grouping. A permutation of the input channels makes the groups
contiguous again, so such a layer keeps its codes: it becomes an ordinary grouped weight and an `order` (see
`codecs.Stored`), one gather of the input a product. Groups of unequal size have no such form and are decoded.

A transposed matrix of words is the canonical packing of the rows; nothing is unpacked. Source: GPTQModel 7.7
(nn_modules/qlinear, utils/planar_packing), Frantar et al. 2022, arXiv 2210.17323.
"""

from __future__ import annotations

import dataclasses
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
    reorder_columns,
    tensor_named,
)
from fewbits.checkpoints.words import from_words, to_words
from fewbits.core.errors import BadInput
from fewbits.formats import Format, parse_format
from fewbits.formats import bits as packing
from fewbits.formats.scales import PlainScale

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_PLANES = {3: ((2, 0), (1, 2)), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}


def input_order(index: Tensor, width: int, columns: int) -> Tensor | None:
    """The input channel of each column once groups of `width` are contiguous; None where they are already.

    BadInput where `index` [in] has other groups than those.
    """
    if len(index) != columns:
        raise BadInput(f"g_idx has {len(index)} entries for {columns} input channels")
    grouped = torch.arange(columns) // width
    index = index.long()
    if torch.equal(index, grouped):
        return None
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], grouped):
        raise BadInput(f"g_idx does not make groups of {width} input channels")
    return order


class GPTQ(Codec):
    """version: of the layout that is written; both are read."""

    holds = (
        "integers of 2 to 8 bits in groups, act-order; loads in transformers, SGLang; symmetric and in order in vLLM"
    )
    writes = True

    def __init__(self, version: int) -> None:
        self.version = version

    def claims(self, quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "gptq" and _version(quantization) == self.version

    def entries(self, source: Source) -> dict[str, Entry]:
        parts = ("qweight", "qzeros", "scales", "g_idx")
        return entries_with(source, "qweight", parts, source.config().get("quantization_config", {}))

    def read(self, source: Source, module: str, entry: Entry) -> Stored | Dense:
        about = entry.about
        words = tensor_named(source, f"{module}.qweight", 2, torch.int32)
        scales = tensor_named(source, f"{module}.scales", 2, *FLOATS)
        index = None
        if f"{module}.g_idx" in entry.parts:
            index = tensor_named(source, f"{module}.g_idx", 1, torch.int32, torch.int64).long()
        elif about.get("desc_act") is True:
            raise BadInput("desc_act says that columns are out of order, and g_idx, their order, is missing")
        bits, columns = _bits_and_columns(about, words, index)
        rows, groups = words.shape[1], scales.shape[0]
        if scales.shape[1] != rows or not groups:
            raise BadInput(f"scales of {tuple(scales.shape)} for {rows} output channels")
        planar = bits in (5, 6, 7) or (bits == 3 and _name(about) == "gptq_p")
        zero = self._zeros(tensor_named(source, f"{module}.qzeros", 2, torch.int32), bits, rows, groups, planar)
        codes = _plane_rows(words.t().contiguous(), bits, columns) if planar else None
        codes = from_words(words.t().contiguous(), bits, columns) if codes is None else codes
        width = _width(about, columns, groups)
        try:
            order = None if index is None else input_order(index, width, columns)
        except BadInput:
            return _decode(codes, bits, scales, zero, index, groups)
        if order is not None:
            codes = reorder_columns(codes, bits, order)
        symmetric = about.get("sym") is not False and bool((zero == 1 << (bits - 1)).all())
        name = f"int{bits}{'' if symmetric else '-asym'}-{group_name(width, columns)}"
        state = {"codes": codes, "scale": scales.t().contiguous()}
        if not symmetric:
            state["zero"] = packing.pack(zero.t().contiguous(), bits)
        return Stored(
            format=parse_format(name).with_scale_dtype(scales.dtype), shape=(rows, columns), state=state, order=order
        )

    def _zeros(self, words: Tensor, bits: int, rows: int, groups: int, planar: bool) -> Tensor:
        """Zero points uint8 [G, out]."""
        if words.shape[0] != groups:
            raise BadInput(f"qzeros of {words.shape[0]} groups, scales of {groups}")
        if self.version == 1 and bits in _ONES:
            words = (words.long() + _ONES[bits]).to(torch.int32)  # modulo 2**32
        packed = _plane_rows(words, bits, rows) if planar else from_words(words, bits, rows)
        zero = packing.unpack(packed, bits, rows)
        return zero if self.version == 2 or bits in _ONES else (zero + 1) & ((1 << bits) - 1)

    def refuses(self, stored: Stored) -> str | None:
        format, (rows, columns) = stored.format, stored.shape
        scaling = format.scaling
        if format.grid.kind != "integer" or not isinstance(scaling.store, PlainScale) or scaling.minimum:
            return f"GPTQ has no {format.name}"
        if format.bits not in (2, 3, 4, 8) or "narrow" in format.name or scaling.block not in ("group", "channel"):
            return f"GPTQ holds integers of 2, 3, 4 and 8 bits in groups; this is {format.name}"
        if not dataclasses.replace(stored, order=None).plain:
            return "GPTQ has no quantized or transformed activations and no residuals"
        if rows * format.bits % 32 or columns * format.bits % 32:
            return f"{rows} x {columns} codes of {format.bits} bits are no whole words of 32 bits"
        if columns % scaling.width(columns):
            return f"groups of {scaling.group_size} do not divide the input dimension {columns}"
        if scaling.scale_dtype != torch.float16:
            return f"GPTQ stores float16 scales; these are {str(scaling.scale_dtype).removeprefix('torch.')}"
        if self.version == 1 and "zero" in stored.state and _has_zero(stored):
            return "a zero point is 0, and version 1 stores one less; use gptq_v2"
        return None

    def nearest(self, layer: Layer) -> Format:
        bits = next(width for width in (2, 3, 4, 8) if width >= min(layer.format.bits, 8))
        size = layer.format.scaling.group_size or 128
        size = size if layer.shape[1] % size == 0 else 32
        zero = "" if self.version == 1 or layer.format.symmetric else "-asym"
        return parse_format(f"int{bits}{zero}-{group_name(size, layer.shape[1])}").with_scale_dtype(torch.float16)

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        format, (rows, columns) = stored.format, stored.shape
        bits, width = format.bits, format.scaling.width(columns)
        groups, codes = -(-columns // width), stored.state["codes"]
        index = torch.arange(columns) // width
        if stored.order is not None:
            back = torch.argsort(stored.order)
            codes, index = reorder_columns(codes, bits, back), index[back]
        if "zero" in stored.state:
            zero = packing.unpack(stored.state["zero"], bits, groups).t().contiguous()
        else:
            zero = torch.full((groups, rows), 1 << (bits - 1), dtype=torch.uint8)
        if self.version == 1:
            zero = zero - 1
        return {
            "qweight": to_words(codes).t().contiguous(),
            "qzeros": to_words(packing.pack(zero, bits)),
            "scales": stored.state["scale"].t().contiguous(),
            "g_idx": index.int(),
        }

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        found = list(layers.values())
        usual = max({layer.format.name for layer in found}, key=[layer.format.name for layer in found].count)
        format = parse_format(usual)
        others = {f"+:^{name.replace('.', chr(92) + '.')}$": _said(layer.format)
                  for name, layer in layers.items() if layer.format.name != usual}  # fmt: skip
        left: dict[str, Any] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in dense}
        config = {
            "quant_method": "gptq",
            **_said(format),
            "desc_act": any(layer.ordered for layer in found),
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": "lm_head" in layers,
            **({"dynamic": {**others, **left}} if others or left else {}),
        }
        return {"quantization_config": config}


def _said(format: Format) -> dict[str, Any]:
    size = format.scaling.group_size
    return {"bits": format.bits, "group_size": -1 if size is None else size, "sym": not format.scaling.zero_point}


def _name(quantization: dict[str, Any]) -> str:
    return str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq")


def _version(quantization: dict[str, Any]) -> int:
    return 1 if _name(quantization) == "gptq" else 2


def _bits_and_columns(about: dict[str, Any], words: Tensor, index: Tensor | None) -> tuple[int, int]:
    """Bits per code and input channels: from the shapes where g_idx tells them, else from the configuration."""
    stated = about.get("bits")
    if index is not None:
        fitting = [bits for bits in range(2, 9) if -(-len(index) * bits // 32) == words.shape[0]]
        if stated in fitting or fitting:
            return (stated if stated in fitting else fitting[0]), len(index)
        raise BadInput(f"qweight has {words.shape[0]} rows of words for {len(index)} input channels")
    if type(stated) is not int or not 2 <= stated <= 8:
        raise BadInput(f"quantization_config: bits {stated!r}; 2 to 8 are expected")
    return stated, words.shape[0] * 32 // stated


def _width(about: dict[str, Any], columns: int, groups: int) -> int:
    """Input channels per group: as stated where the scales agree."""
    stated = about.get("group_size")
    if type(stated) is int and stated > 0 and -(-columns // stated) == groups:
        return min(stated, columns)
    return -(-columns // groups)


def _plane_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Canonical rows from rows of planes: per 32 codes `bits` words, the lower planes first."""
    if words.shape[1] % bits or words.shape[1] // bits * 32 < count:
        raise BadInput(f"{words.shape[1]} words hold no {count} codes of {bits} bits in planes")
    blocks = words.view(len(words), -1, bits)
    codes, first = torch.zeros((*blocks.shape[:2], 32), dtype=torch.int32), 0
    for width, shift in _PLANES[bits]:
        fields = [(blocks[..., first : first + width] >> (width * k)) & ((1 << width) - 1) for k in range(32 // width)]
        codes |= torch.stack(fields, dim=-1).flatten(2) << shift
        first += width
    return packing.pack(codes.flatten(1)[:, :count].to(torch.uint8), bits)


def _decode(codes: Tensor, bits: int, scales: Tensor, zero: Tensor, index: Tensor | None, groups: int) -> Dense:
    assert index is not None
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= groups:
        raise BadInput(f"g_idx names groups outside 0 to {groups - 1}")
    levels = packing.unpack(codes, bits, len(index)).float() - zero.t().float()[:, index]
    value = levels * scales.t().float()[:, index]
    return Dense(value=value, note="groups of unequal size: decoded in float32")


def _has_zero(stored: Stored) -> bool:
    groups = stored.format.parameter_shape(stored.shape)[1]
    return bool((packing.unpack(stored.state["zero"], stored.format.bits, groups) == 0).any())


V1, V2 = GPTQ(1), GPTQ(2)
