"""INT8 times INT8 with int32 sums, where the hardware multiplies so: torch._int_mm.

    y[m, n] = (sum_k q_x[m, k] q_w[n, k]) * scale_x[m] * scale_w[n]

q_x are the levels x is rounded to, with one scale a token or one for all (W8A8), q_w the weight's codes less that of
level 0. The sums are exact, so this equals the reference to the rounding of the two scales. A GPU does it in its tensor
cores, a CPU with AVX-512 VNNI or AMX instructions. Without them torch's product is a plain loop, tens of times slower
than float32 (cpu_int8.py), and this kernel says no: cpu_int8 then multiplies the same levels in float32, just as
exactly up to sums of 2**24.

cuBLASLt wants more than 16 rows and whole blocks of 16 columns, so x is padded with rows and the weight with columns
of zeros. Zero points are refused: INT8 levels less a zero point do not fit 8 bits. Columns of x that are not rounded
(formats/outliers.py) meet the same weight in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    joined_rows,
    split_levels,
    whole_rows,
    whole_tokens,
)
from fewbits.kernels.cpu_int8 import by_row, codes_of_levels, pack_levels

_BLOCK = 16
_LEAST_ROWS = 32  # cuBLASLt: more than 16


@lru_cache(maxsize=16)
def multiplies_int8(device: torch.device) -> bool:
    """Whether `device` has INT8 products that torch uses and that are right; tried once."""
    able = device.type == "cuda" or torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    if not able or device.type not in ("cpu", "cuda"):
        return False
    x = (torch.arange(_LEAST_ROWS * 32, device=device).reshape(_LEAST_ROWS, 32) * 37 % 255 - 127).to(torch.int8)
    w = (torch.arange(16 * 32, device=device).reshape(16, 32) * 91 % 255 - 127).to(torch.int8)
    try:
        y = torch._int_mm(x, w.t())
    except (RuntimeError, NotImplementedError):  # the GPU is too old, or torch is built without it
        return False
    return torch.equal(y.double(), x.double() @ w.double().t())


def one_scale_a_row(spec: LinearSpec) -> No | None:
    """None where both sides are integers of 5 to 8 bits with one scale a row and no zero point; else No."""
    inputs = spec.activations
    if inputs is None or inputs.grid.kind != "integer" or inputs.scaling.zero_point:
        return No("it multiplies by INT8 inputs without a zero point")
    for no in (affine(spec.format), whole_tokens(spec), whole_rows(spec)):
        if no is not None:
            return no
    if spec.format.scaling.zero_point:
        return No("its weights have no zero point")
    if spec.format.bits < 5:
        return No("it would keep 8 bits for a weight of fewer than 5")
    return None


class Int8Mm(Plain):
    name = "int8_mm"
    floor_db = 110.0
    input_dtype: torch.dtype | None = torch.float32
    recovers_codes = True

    def accepts(self, spec: LinearSpec) -> Yes | No:
        no = one_scale_a_row(spec)
        if no is not None:
            return no
        if not multiplies_int8(spec.device):
            what = "CPU (no AVX-512 VNNI, no AMX)" if spec.device.type == "cpu" else spec.device.type
            return No(f"this {what} multiplies no INT8 that torch knows of")
        return Yes("INT8 products with int32 sums, 8 bits per weight in memory")

    def prepack(self, weight: Quantized) -> Packed:
        return {"weight": pack_levels(weight, _BLOCK, _BLOCK), "scale": by_row(weight.scale, weight)}

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        return codes_of_levels(packed["weight"], spec)

    def join(self, parts: Sequence[Packed], specs: Sequence[LinearSpec]) -> tuple[Packed, list[Packed]] | None:
        return joined_rows(parts, specs, {"weight": 0, "scale": 0})

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        if spec.activations is None:
            return self._unrounded(x, packed, spec)
        out, columns = spec.shape
        weight = packed["weight"]
        levels, scale = split_levels(x.reshape(-1, columns), spec.activations, packed)
        count = levels.shape[0]
        more = max(0, _LEAST_ROWS - count) if x.device.type == "cuda" else 0
        whole = levels.to(torch.int8)
        if more or weight.shape[1] != columns:  # to pad by nothing would copy
            whole = functional.pad(whole, (0, weight.shape[1] - columns, 0, more))
        y = torch._int_mm(whole, weight.t())[:count, :out].float()
        # In place: on a CPU each new float32 matrix costs as much as a third of the product.
        return y.mul_(scale).mul_(packed["scale"]).to(x.dtype).reshape(*x.shape[:-1], out)

    def _unrounded(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        """The float32 product, in the columns where x is not zero: for LLM.int8(), few."""
        out, columns = spec.shape
        rows = x.reshape(-1, columns).float()
        used = rows.any(0).nonzero().flatten()
        y = rows[:, used] @ packed["weight"][:out, used].float().t() * packed["scale"]
        return y.to(x.dtype).reshape(*x.shape[:-1], out)


KERNEL = Int8Mm()
