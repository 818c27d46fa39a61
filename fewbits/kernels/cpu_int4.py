"""Integer weights of at most 4 bits on a CPU, through torch's packed 4-bit product.

`aten::_weight_int4pack_mm_for_cpu` computes, for kernel groups of 32, 64, 128 or 256 columns,

    y[m, n] = sum_k x[m, k] * ((code[n, k] - 8) * scale[g, n] + offset[g, n])

with x, scale and offset in bfloat16 and sums in float32. Codes of 2 and 3 bits are moved up so that their
middle is 8; then offset = (2**(b-1) + level[0] - zero) * scale, which is 0 for symmetric formats.

Layout. Rows come in blocks (32 on AVX2, 64 on AVX-512); within a block, column by column, a byte holds two
rows. Which two depends on the build, so the order is probed once and a build with an order we do not know is
refused. Groups that are no multiple of 32 are refused. Rows and columns are padded: the padded columns meet
zeros in x.

Accuracy. x, y, scales and offsets are rounded to 8 bits of mantissa: 52 to 53 dB per product measured on
Gaussian data, 45 guaranteed. Rounding the weights to 4 bits is worth about 20 dB, so this adds under a
hundredth to its noise power. Results therefore differ in the third digit from a float32 product with the same
codes; they repeat bit for bit.

Speed. For a few rows the time is that of unpacking (some 5 G weights/s on an AVX2 core), nearly the same for
1 and 4 rows. From `_MANY_ROWS` rows on, decoding the weight tile by tile to float32 and multiplying by a
dense product is faster; that path rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.formats import Quantized
from fewbits.kernels.base import (
    Bound,
    LinearSpec,
    No,
    Packed,
    Yes,
    affine,
    joined_rows,
    middle_code,
    on_cpu,
    operator_exists,
    split_levels,
    whole_tokens,
)

_GROUPS = (256, 128, 64, 32)
_MANY_ROWS = 128
_TILE = 512


def kernel_group(group_size: int | None, in_features: int) -> int | None:
    """Columns per kernel group: the largest that divides both the format's groups and, if any does, the row.

    None where no size the kernel knows divides the format's groups.
    """
    one = group_size is None or group_size >= in_features
    fitting = [size for size in _GROUPS if one or group_size % size == 0]
    exact = [size for size in fitting if in_features % size == 0]
    return (exact or fitting[-1:] or [None])[0]


@lru_cache(maxsize=1)
def _layout() -> tuple[int, bool] | None:
    """(rows per block, whether a byte holds adjacent rows) of this build's packing; None: unknown."""
    codes = (torch.arange(128 * 32).reshape(128, 32) * 7 % 16).to(torch.uint8)
    codes = codes ^ (torch.arange(128) % 13).to(torch.uint8)[:, None]
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    if packed.dtype != torch.uint8 or packed.numel() != 128 * 16:
        return None
    for block in (32, 64, 16):
        for adjacent in (False, True):
            if torch.equal(_unpack(packed, 32, block, adjacent), codes):
                return block, adjacent
    return None


def _unpack(packed: Tensor, columns: int, block: int, adjacent: bool) -> Tensor:
    """Packed rows (whole blocks) -> codes uint8 [rows, columns]."""
    blocks = packed.reshape(-1, columns, block // 2)
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=3 if adjacent else 2)
    return nibbles.reshape(-1, columns, block).transpose(1, 2).reshape(-1, columns)


def scales_and_offsets(weight: Quantized, group: int, row_block: int) -> Tensor:
    """bfloat16 [kernel groups, out padded to whole row blocks, 2]: scale and offset of each kernel group."""
    rows, columns = weight.shape
    first = torch.arange(0, columns, group, device=weight.scale.device)
    size = weight.format.scaling.group_size or columns
    scale = weight.scale.float()[:, first // size].expand(rows, -1)
    offset = torch.zeros_like(scale)
    if weight.zero is not None:
        offset = (middle_code(weight.format) - weight.zero.float()[:, first // size].expand(rows, -1)) * scale
    both = torch.stack((scale.t(), offset.t()), dim=-1)
    return functional.pad(both, (0, 0, 0, -rows % row_block)).to(torch.bfloat16).contiguous()


class CpuInt4:
    name = "cpu_int4"
    floor_db = 45.0
    input_dtype: torch.dtype | None = torch.bfloat16
    recovers_codes = True

    def accepts(self, spec: LinearSpec) -> Yes | No:
        for no in (on_cpu(spec), affine(spec.format), whole_tokens(spec)):
            if no is not None:
                return no
        if spec.format.bits > 4:
            return No(f"{spec.format.bits} bits do not fit in its 4-bit codes")
        size = spec.format.scaling.group_size
        if kernel_group(size, spec.shape[1]) is None:
            return No(f"groups of {size} columns are no multiple of 32")
        if not operator_exists("aten", "_weight_int4pack_mm_for_cpu"):
            return No("this torch has no packed 4-bit product for CPUs")
        if _layout() is None:
            return No("this torch packs 4-bit weights in an order not known here")
        return Yes("bfloat16 products, 4 bits per weight in memory")

    def prepack(self, weight: Quantized) -> Packed:
        rows, columns = weight.shape
        format, layout = weight.format, _layout()
        assert layout is not None
        group = kernel_group(format.scaling.group_size, columns)
        assert group is not None
        more = (0, -columns % group, 0, -rows % layout[0])
        codes = functional.pad(weight.codes.int() + (8 - middle_code(format)), more, value=8)
        packed = {
            "weight": torch._convert_weight_to_int4pack_for_cpu(codes, 2),
            "scales": scales_and_offsets(weight, group, layout[0]),
            "scale": weight.scale,
        }
        return packed if weight.zero is None else {**packed, "zero": weight.zero}

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        rows, columns = spec.shape
        return self._codes(packed, spec, 0, packed["weight"].shape[0])[:rows, :columns].contiguous()

    def _codes(self, packed: Packed, spec: LinearSpec, start: int, stop: int) -> Tensor:
        layout = _layout()
        assert layout is not None
        columns = 2 * packed["weight"].shape[1]
        return _unpack(packed["weight"][start:stop], columns, *layout) - (8 - middle_code(spec.format))

    def bind(self, packed: Packed, spec: LinearSpec) -> Bound:
        weight, scales = packed["weight"], packed["scales"]
        width = 2 * weight.shape[1]
        if spec.activations is not None or (weight.shape[0], width) != spec.shape:
            return lambda x: self.linear(x, packed, spec)
        group, multiply = width // scales.shape[0], torch._weight_int4pack_mm_for_cpu

        def bound(x: Tensor) -> Tensor:
            if x.shape[0] < _MANY_ROWS:
                return multiply(x, weight, group, scales)
            return self.linear(x, packed, spec)

        return bound

    def join(self, parts: Sequence[Packed], specs: Sequence[LinearSpec]) -> tuple[Packed, list[Packed]] | None:
        return joined_rows(parts, specs, {"weight": 0, "scales": 1, "scale": 0, "zero": 0})

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        out, columns = spec.shape
        weight, scales = packed["weight"], packed["scales"]
        rows = x.reshape(-1, columns)
        token_scale = None
        if spec.activations is not None:
            rows, token_scale = split_levels(rows, spec.activations, packed)
        if rows.shape[0] >= _MANY_ROWS:
            y = self._decoded(rows.float(), packed, spec)
        else:
            width = 2 * weight.shape[1]
            rows = rows.to(torch.bfloat16)
            if width != columns:
                rows = functional.pad(rows, (0, width - columns))
            y = torch._weight_int4pack_mm_for_cpu(rows.contiguous(), weight, width // scales.shape[0], scales)
            if y.shape[1] != out:
                y = y[:, :out]
        if token_scale is not None:
            y = y * token_scale
        return y.to(x.dtype).reshape(*x.shape[:-1], out)

    def _decoded(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        """Many rows: decode `_TILE` rows of the weight at a time and multiply in float32."""
        out, columns = spec.shape
        y = x.new_empty(x.shape[0], out)
        per_row = spec.format.scaling.block != "tensor"
        for start in range(0, out, _TILE):
            stop = min(start + _TILE, packed["weight"].shape[0])
            rows = slice(start, min(stop, out))
            here = rows if per_row else slice(None)
            tile = Quantized(
                format=spec.format,
                codes=self._codes(packed, spec, start, stop)[: rows.stop - start, :columns],
                scale=packed["scale"][here],
                zero=packed["zero"][here] if "zero" in packed else None,
            )
            torch.mm(x, tile.dequantize().t(), out=y[:, rows])
        return y


KERNEL = CpuInt4()
