"""Any format on a CPU: decoded once, kept as float16, multiplied by FBGEMM's half-precision product.

Tables (NF4), minifloats (FP8, E2M1) and group-scaled 8-bit integers have no integer kernel in torch. Decoding
them on every call would cost many times the product, so the weight is decoded once, at prepack, into 16 bits:

    W[n, k] = 2**e[n] * h[n, k]        h float16, max |h[n]| in [1, 2)

The power of two per row keeps float16 from overflowing and from running into its subnormals. x stays float32,
sums are float32, and only h is rounded: 11 bits of mantissa, about 72 dB.

Trade-off: memory is that of a 16-bit model plus the canonical codes, which are kept because float16 cannot
give them back exactly. What is small on disk is not small in memory here.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fewbits.formats import Quantized
from fewbits.kernels.base import LinearSpec, No, Packed, Plain, Yes, on_cpu, operator_exists, split_levels


def pack_half(weight: Tensor) -> Packed:
    """A dense weight [out, in] as rows of float16 times powers of two, in FBGEMM's order."""
    weight = weight.float()
    top = weight.abs().amax(dim=1, keepdim=True)
    exponent = torch.where(top > 0, torch.floor(torch.log2(top)), torch.zeros_like(top))
    power = torch.exp2(exponent)
    packed = torch.ops.quantized.linear_prepack_fp16(weight / power, None)
    return {"weight": packed, "power": power.squeeze(1)}


def half_linear(x: Tensor, packed: Packed) -> Tensor:
    """x float32 [M, in] times what `pack_half` packed -> float32 [M, out]."""
    return torch.ops.quantized.linear_dynamic_fp16(x, packed["weight"]).mul_(packed["power"])


@lru_cache(maxsize=1)
def half_works() -> bool:
    """Whether this build of torch has the product and it is right; tried once on a small matrix."""
    if not operator_exists("quantized", "linear_dynamic_fp16"):
        return False
    weight = torch.linspace(-1, 1, 15).reshape(3, 5)
    x = torch.linspace(-2, 3, 10).reshape(2, 5)
    try:
        return torch.allclose(half_linear(x, pack_half(weight)), x @ weight.t(), atol=0.01)
    except (RuntimeError, NotImplementedError):  # no FBGEMM in this build
        return False


class CpuFp16(Plain):
    name = "cpu_fp16"
    floor_db = 65.0
    input_dtype: torch.dtype | None = torch.float32
    recovers_codes = False

    def accepts(self, spec: LinearSpec) -> Yes | No:
        no = on_cpu(spec)
        if no is not None:
            return no
        if not half_works():
            return No("this torch is built without FBGEMM's float16 product")
        return Yes("decoded once to float16: 16 bits per weight in memory besides the codes")

    def prepack(self, weight: Quantized) -> Packed:
        return pack_half(weight.dequantize())

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        raise AssertionError("float16 does not give codes back; see recovers_codes")

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        rows = x.reshape(-1, spec.shape[1])
        if spec.activations is None:
            y = half_linear(rows.float().contiguous(), packed)
        else:
            levels, scale = split_levels(rows, spec.activations, packed)
            y = half_linear(levels, packed).mul_(scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], spec.shape[0])


KERNEL = CpuFp16()
