"""The definition: decode the weight, then multiply.

    y = x' @ ((level[code] - zero) * scale).T

x' is x, or x snapped per token where activations are quantized.
Everything every other kernel computes is tested against this. It decodes the whole weight on each call, so it
is slow for a few rows; on a GPU, where decoding runs at memory speed, it serves formats that have no kernel
of their own. The product is in float32 on a CPU and in x's dtype on other devices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.formats import Quantized
from fewbits.kernels.base import LinearSpec, Packed, Plain, Yes, split_levels


class Reference(Plain):
    name = "reference"
    floor_db = 120.0
    input_dtype: torch.dtype | None = None
    recovers_codes = True

    def accepts(self, spec: LinearSpec) -> Yes:
        return Yes("decodes the weight on each call")

    def prepack(self, weight: Quantized) -> Packed:
        packed = {"codes": weight.codes, "scale": weight.scale}
        return packed if weight.zero is None else {**packed, "zero": weight.zero}

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        return packed["codes"]

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        weight = Quantized(format=spec.format, codes=packed["codes"], scale=packed["scale"], zero=packed.get("zero"))
        working = torch.float32 if x.device.type == "cpu" else x.dtype
        rows = x.reshape(-1, spec.shape[1])
        if spec.activations is None:
            y = functional.linear(rows.to(working), weight.dequantize(working))
        else:
            levels, scale = split_levels(rows, spec.activations, packed)
            y = functional.linear(levels, weight.dequantize()) * scale
        return y.to(x.dtype).reshape(*x.shape[:-1], spec.shape[0])


KERNEL = Reference()
