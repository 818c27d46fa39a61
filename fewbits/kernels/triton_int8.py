"""INT8 times INT8 on a GPU by an own product (triton_product.py): scales fused, tokens rounded in one pass.

The formula is that of `int8_mm` (see there), and so are the sums, to the bit. torch's product there reaches half of
what Hopper's tensor cores do, and writes int32 sums that are read again to be scaled.

LLM.int8() (formats/outliers.py) with fixed columns costs no further launch: `prepack_outliers` keeps their weights as
the sum of two 16-bit numbers (a float16 weight has 11 bits, bfloat16 8, two of them 16: nothing is lost), and the
product adds them up in its registers. Other outliers are multiplied apart by the caller.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.formats import Quantized
from fewbits.formats.outliers import Outliers
from fewbits.kernels.base import LinearSpec, No, Packed, Yes, multiplies_outliers, outliers_name, split_levels
from fewbits.kernels.cpu_int8 import by_row, pack_levels
from fewbits.kernels.int8_mm import Int8Mm, one_scale_a_row

_BLOCK = 16  # columns: rows of memory begin at whole 16 bytes
_MOST_COLUMNS = 32  # apart, taken twice
_SUM_BOUND = 1 << 17  # products of -128 and -128 that an int32 holds


def no_triton(device: torch.device) -> No | None:
    """None on an NVIDIA or AMD GPU with triton and integer matrix instructions, else No."""
    if device.type != "cuda":
        return No(f"runs on cuda, not on {device.type}")
    if find_spec("triton") is None:
        return No("triton is not installed: pip install fewbits[triton]")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return No("it wants an NVIDIA GPU of compute capability 8.0 or more")
    return None


class TritonInt8(Int8Mm):
    name = "triton_int8"
    floor_db = 110.0
    input_dtype: torch.dtype | None = None
    recovers_codes = True

    def accepts(self, spec: LinearSpec) -> Yes | No:
        for no in (no_triton(spec.device), one_scale_a_row(spec)):
            if no is not None:
                return no
        if spec.shape[1] >= _SUM_BOUND:
            return No(f"sums of {spec.shape[1]} products may leave int32")
        return Yes("INT8 products with int32 sums and fused scales, 8 bits per weight in memory")

    def prepack(self, weight: Quantized) -> Packed:
        return {"weight": pack_levels(weight, 1, _BLOCK), "scale": by_row(weight.scale, weight)}

    def prepack_outliers(self, outliers: Outliers, spec: LinearSpec) -> Packed:
        """What `linear` needs to multiply fixed columns in 16 bits as well; empty where the caller has to do it."""
        columns, weight = outliers.columns, outliers.weight
        if not _by_token(spec) or columns is None or weight is None or len(columns) > _MOST_COLUMNS:
            return {}
        mask = torch.zeros(spec.shape[1], dtype=torch.int8, device=columns.device)
        mask[columns.long()] = 1
        packed: Packed = {"outlier_columns": columns.int(), "outlier_mask": mask}
        width = next(r for r in (16, 32, 64) if r >= 2 * len(columns))
        for dtype in (torch.bfloat16, torch.float16):
            high = weight.to(dtype)
            low = (weight.float() - high.float()).to(dtype)
            packed[outliers_name(dtype)] = functional.pad(
                torch.cat((high, low), 1), (0, width - 2 * len(columns))
            ).contiguous()
        return packed

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        from fewbits.kernels import triton_product, triton_quantize  # noqa: F401 (they register the operators)

        inputs = spec.activations
        if inputs is None:
            return self._unrounded(x, packed, spec)
        columns, weight = spec.shape[1], packed["weight"]
        out_dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float32
        rows = x.reshape(-1, columns).to(out_dtype)
        apart = None
        if _by_token(spec):
            low, high = inputs.grid.levels[0], inputs.grid.levels[-1]
            beside: tuple[Tensor | None, Tensor | None, int] = None, None, 0
            if multiplies_outliers(packed, x.dtype):
                apart = packed[outliers_name(x.dtype)]
                beside = packed["outlier_mask"], packed["outlier_columns"], apart.shape[1]
            levels, scale, taken = torch.ops.fewbits.quantize_tokens(
                rows, torch.int8, inputs.grid.top, low, high, "none", None, 0.0, *beside
            )
        else:
            found, scale = split_levels(rows, inputs, packed)
            levels = functional.pad(found.to(torch.int8), (0, weight.shape[1] - columns))
            scale = scale.reshape(-1).contiguous()
        sides = (None, None) if apart is None else (taken, apart)
        y = torch.ops.fewbits.scaled_product(levels, weight, scale, packed["scale"], out_dtype, *sides)
        return y[:, : spec.shape[0]].to(x.dtype).reshape(*x.shape[:-1], spec.shape[0])


def _by_token(spec: LinearSpec) -> bool:
    """Whether each token of x has a scale of its own, found as it comes."""
    return spec.activations is not None and spec.activations.scaling.block == "token"


KERNEL = TritonInt8()
