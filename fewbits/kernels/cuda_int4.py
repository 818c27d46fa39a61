"""Integer weights of at most 4 bits on an NVIDIA GPU (compute capability 8.0 up), by torch's tinygemm.

The formula, the groups and the padding are those of `cpu_int4` (see there); the tile order is the GPU's own,
so the canonical codes are kept. `aten::_weight_int4pack_mm` is made for a few rows: with many it unpacks the
weight again for every 16 rows, and from `_MANY_ROWS` rows on decoding once and calling a dense bfloat16
product is used instead.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.formats import Quantized
from fewbits.kernels.base import (
    LinearSpec,
    No,
    Packed,
    Plain,
    Yes,
    affine,
    middle_code,
    operator_exists,
    split_levels,
    whole_tokens,
)
from fewbits.kernels.cpu_int4 import kernel_group, scales_and_offsets

_MANY_ROWS = 128
_ROW_BLOCK = 8
_INNER_TILES = 2  # 16-column tiles packed together: the least, so that padding is to 32 columns


def _pack(codes: Tensor) -> Tensor:
    """codes int [N, K], N and K multiples of 8 and 32, value = code - 8 -> tinygemm's order."""
    nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack(nibbles, _INNER_TILES)


@lru_cache(maxsize=16)
def _works(device: torch.device) -> bool:
    """Whether the product is right on this device; tried once: the order of nibbles has changed before."""
    codes = (torch.arange(8 * 32, device=device).reshape(8, 32) * 5 % 16).int()
    x = torch.eye(32, device=device, dtype=torch.bfloat16)
    scales = torch.stack((torch.ones(1, 8), torch.zeros(1, 8)), -1).to(device, torch.bfloat16)
    try:
        y = torch.ops.aten._weight_int4pack_mm(x, _pack(codes), 32, scales)
    except RuntimeError:  # built without it, or the GPU is too old
        return False
    return torch.equal(y.t().int(), codes - 8)


class CudaInt4(Plain):
    name = "cuda_int4"
    floor_db = 45.0
    input_dtype: torch.dtype | None = torch.bfloat16
    recovers_codes = True

    def accepts(self, spec: LinearSpec) -> Yes | No:
        if spec.device.type != "cuda":
            return No(f"runs on cuda, not on {spec.device.type}")
        for no in (affine(spec.format), whole_tokens(spec)):
            if no is not None:
                return no
        if spec.format.bits > 4:
            return No(f"{spec.format.bits} bits do not fit in its 4-bit codes")
        size = spec.format.scaling.group_size
        if kernel_group(size, spec.shape[1]) is None:
            return No(f"groups of {size} columns are no multiple of 32")
        if not operator_exists("aten", "_weight_int4pack_mm") or not _works(spec.device):
            return No("this torch or this GPU has no packed 4-bit product")
        return Yes("bfloat16 products, 4 bits per weight besides the codes")

    def prepack(self, weight: Quantized) -> Packed:
        group = kernel_group(weight.format.scaling.group_size, weight.shape[1])
        assert group is not None
        shift = 8 - middle_code(weight.format)
        more = (0, -weight.shape[1] % group, 0, -weight.shape[0] % _ROW_BLOCK)
        packed = {
            "weight": _pack(functional.pad(weight.codes.int() + shift, more, value=8)),
            "scales": scales_and_offsets(weight, group, _ROW_BLOCK),
            "codes": weight.codes,
            "scale": weight.scale,
        }
        return packed if weight.zero is None else {**packed, "zero": weight.zero}

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        return packed["codes"]

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        out, columns = spec.shape
        rows, token_scale = x.reshape(-1, columns), None
        if spec.activations is not None:
            rows, token_scale = split_levels(rows, spec.activations, packed)
        rows = rows.to(torch.bfloat16)
        if rows.shape[0] >= _MANY_ROWS:
            weight = Quantized(
                format=spec.format, codes=packed["codes"], scale=packed["scale"], zero=packed.get("zero")
            )
            y = functional.linear(rows, weight.dequantize(torch.bfloat16))
        else:
            scales = packed["scales"]
            group = kernel_group(spec.format.scaling.group_size, columns)
            width = scales.shape[0] * group
            rows = functional.pad(rows, (0, width - columns)).contiguous()
            y = torch.ops.aten._weight_int4pack_mm(rows, packed["weight"], group, scales)[:, :out]
        if token_scale is not None:
            y = y * token_scale
        return y.to(x.dtype).reshape(*x.shape[:-1], out)


KERNEL = CudaInt4()
