"""Integer weights of up to 8 bits with one scale per row, on a CPU, through torch's weight-only int8 product.

    y[m, n] = (sum_k x[m, k] * q[n, k]) * scale[n]  +  (sum_k x[m, k]) * (half - zero[n]) * scale[n]

q is the code less that of level 0 (with a zero point: less half the range), as int8;
`aten::_weight_int8pack_mm` computes the first term in bfloat16 with float32 sums, and the second, which only
asymmetric formats have, is a rank-one correction in float32.
Scales per group are refused: the product knows one scale per row.

Quantized activations (W8A8) multiply levels instead of x, which are exact in bfloat16. torch's int8 x int8
product, `torch._int_mm`, is exact too, but without the AVX-512 VNNI or AMX instructions it is a plain loop:
25 times slower than float32 here (238 ms against 9 ms for 256 x 576 x 3072 on 2 AVX2 cores), so it is not
used (with them: int8_mm.py).

Rows and columns are padded to whole blocks: the product reads 16 columns at a time and past the end of a row
that is no multiple of that.

Accuracy: x, y and the scales are rounded to bfloat16, 50 to 55 dB per product. From `_MANY_ROWS` rows on,
tiles of q go to float32 and a dense product is faster; that path rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    whole_rows,
    whole_tokens,
)

_MANY_ROWS = 32
_TILE = 512
_COLUMN_BLOCK = 32
_ROW_BLOCK = 16


def pack_levels(weight: Quantized, row_block: int, column_block: int) -> Tensor:
    """The codes less that of level 0 as int8, padded with zeros to whole blocks."""
    rows, columns = weight.shape
    levels = (weight.codes.short() - middle_code(weight.format)).to(torch.int8)
    return functional.pad(levels, (0, -columns % column_block, 0, -rows % row_block)).contiguous()


def codes_of_levels(levels: Tensor, spec: LinearSpec) -> Tensor:
    """The inverse of `pack_levels`."""
    rows, columns = spec.shape
    return (levels[:rows, :columns].short() + middle_code(spec.format)).to(torch.uint8)


def by_row(values: Tensor, weight: Quantized) -> Tensor:
    """Scales or zero points, of rows or of the whole tensor, as float32 [out]."""
    return values.float().expand(weight.shape[0], 1).flatten().contiguous()


class CpuInt8:
    name = "cpu_int8"
    floor_db = 45.0
    input_dtype: torch.dtype | None = torch.bfloat16
    recovers_codes = True

    def accepts(self, spec: LinearSpec) -> Yes | No:
        for no in (on_cpu(spec), affine(spec.format), whole_tokens(spec), whole_rows(spec)):
            if no is not None:
                return no
        if not operator_exists("aten", "_weight_int8pack_mm"):
            return No("this torch has no weight-only int8 product")
        return Yes("bfloat16 products, 8 bits per weight in memory")

    def prepack(self, weight: Quantized) -> Packed:
        levels, scale = pack_levels(weight, _ROW_BLOCK, _COLUMN_BLOCK), by_row(weight.scale, weight)
        packed = {
            "weight": levels,
            "scale16": functional.pad(scale, (0, len(levels) - len(scale))).to(torch.bfloat16),
            "scale": scale,
        }
        if weight.zero is not None:
            packed["offset"] = (middle_code(weight.format) - by_row(weight.zero, weight)) * scale
        return packed

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        return codes_of_levels(packed["weight"], spec)

    def bind(self, packed: Packed, spec: LinearSpec) -> Bound:
        weight, scale = packed["weight"], packed["scale16"]
        if spec.activations is not None or "offset" in packed or tuple(weight.shape) != spec.shape:
            return lambda x: self.linear(x, packed, spec)
        multiply = torch._weight_int8pack_mm

        def bound(x: Tensor) -> Tensor:
            if x.shape[0] < _MANY_ROWS:
                return multiply(x, weight, scale)
            return self.linear(x, packed, spec)

        return bound

    def join(self, parts: Sequence[Packed], specs: Sequence[LinearSpec]) -> tuple[Packed, list[Packed]] | None:
        return joined_rows(parts, specs, {"weight": 0, "scale16": 0, "scale": 0, "offset": 0})

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        out, columns = spec.shape
        weight = packed["weight"]
        rows, token_scale = x.reshape(-1, columns), None
        if spec.activations is not None:
            rows, token_scale = split_levels(rows, spec.activations, packed)
        if rows.shape[0] >= _MANY_ROWS:
            rows = rows.float()
            y = self._decoded(rows, packed)
        else:
            rows = rows.to(torch.bfloat16)
            if weight.shape[1] != columns:
                rows = functional.pad(rows, (0, weight.shape[1] - columns))
            y = torch._weight_int8pack_mm(rows.contiguous(), weight, packed["scale16"])
            if y.shape[1] != out:
                y = y[:, :out]
        if "offset" in packed:
            y = torch.addcmul(y.float(), rows.float().sum(1, keepdim=True), packed["offset"])
        if token_scale is not None:
            y = y * token_scale
        return y.to(x.dtype).reshape(*x.shape[:-1], out)

    def _decoded(self, x: Tensor, packed: Packed) -> Tensor:
        """Many rows: `_TILE` rows of the weight at a time as float32, scaled after the product."""
        scale, columns = packed["scale"], x.shape[1]
        out = scale.shape[0]
        y = x.new_empty(x.shape[0], out)
        for start in range(0, out, _TILE):
            rows = slice(start, min(start + _TILE, out))
            torch.mm(x, packed["weight"][rows, :columns].float().t(), out=y[:, rows])
        return y.mul_(scale)


KERNEL = CpuInt8()
