"""E4M3 times E4M3 in the tensor cores of Hopper and Ada: torch._scaled_mm with a scale a row, or the own product.

    y[m, n] = (sum_k x[m, k] w[n, k]) * scale_x[m] * scale_w[n]

x is rounded in one pass (triton_quantize.py). cuBLASLt takes whole blocks of 16 rows of the weight and writes
bfloat16; what it does not take, and other dtypes, the own product multiplies (triton_product.py). Tensor cores add
8-bit floats with about 14 bits, so sums are good to 2**-12 or so: finer than what E4M3 and bfloat16 round away.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.formats import Quantized
from fewbits.kernels.base import LinearSpec, No, Packed, Plain, Yes, split_levels, whole_tokens
from fewbits.kernels.triton_int8 import no_triton

_NAME = "fp8_e4m3"
_BLOCK = 16


class Fp8Mm(Plain):
    name = "fp8_mm"
    floor_db = 45.0
    input_dtype: torch.dtype | None = torch.bfloat16
    recovers_codes = True

    def accepts(self, spec: LinearSpec) -> Yes | No:
        inputs, scaling = spec.activations, spec.format.scaling
        if inputs is None or inputs.grid.name != _NAME or spec.format.grid.name != _NAME:
            return No("it multiplies E4M3 weights by E4M3 inputs")
        for no in (no_triton(spec.device), whole_tokens(spec)):
            if no is not None:
                return no
        if scaling.block not in ("channel", "tensor") or scaling.zero_point or scaling.minimum:
            return No(f"it has one scale per row, {spec.format.name} has others")
        if torch.version.hip is not None or torch.cuda.get_device_capability(spec.device) < (8, 9):
            return No("it wants an NVIDIA GPU that multiplies E4M3: compute capability 8.9 or more")
        return Yes("E4M3 products, 8 bits per weight in memory")

    def prepack(self, weight: Quantized) -> Packed:
        rows, columns = weight.shape
        levels = weight.format.grid.value(weight.codes)
        return {
            "weight": functional.pad(levels, (0, -columns % _BLOCK)).to(torch.float8_e4m3fn),
            "scale": weight.scale.float().expand(rows, 1).reshape(rows).contiguous(),
        }

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        return spec.format.grid.nearest(packed["weight"][:, : spec.shape[1]].float())

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        from fewbits.kernels import triton_product, triton_quantize  # noqa: F401 (they register the operators)

        inputs, (out, columns), weight = spec.activations, spec.shape, packed["weight"]
        if inputs is None:
            decoded = weight[:, :columns].float() * packed["scale"][:, None]
            return functional.linear(x, decoded.to(x.dtype))
        out_dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float32
        rows = x.reshape(-1, columns).to(out_dtype)
        if inputs.scaling.block == "token":
            top = inputs.grid.top
            levels, scale, _ = torch.ops.fewbits.quantize_tokens(rows, torch.float8_e4m3fn, top, -top, top)
        else:
            found, scale = split_levels(rows, inputs, packed)
            levels = functional.pad(found, (0, weight.shape[1] - columns)).to(torch.float8_e4m3fn)
            scale = scale.reshape(-1).contiguous()
        if rowwise(rows, out):
            y = torch._scaled_mm(
                levels, weight.t(), scale[:, None], packed["scale"][None, :], out_dtype=out_dtype, use_fast_accum=True
            )
        else:
            y = torch.ops.fewbits.scaled_product(levels, weight, scale, packed["scale"], out_dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], out)


def rowwise(rows: Tensor, out: int) -> bool:
    """Whether torch._scaled_mm takes the product with a scale a row."""
    hopper = torch.cuda.get_device_capability(rows.device) >= (9, 0)
    return hopper and bool(rows.shape[0]) and rows.dtype == torch.bfloat16 and out % _BLOCK == 0


KERNEL = Fp8Mm()
