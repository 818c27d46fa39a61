"""gpt-oss's experts in MXFP4 (quant_method "mxfp4").

    experts.gate_up_proj_blocks  uint8 [E, rows, in/32, 16]   two E2M1 codes a byte, the even column low
    experts.gate_up_proj_scales  uint8 [E, rows, in/32]       E8M0: 2**(s - 127)

and `down_proj` likewise. The model holds all experts of a block in one parameter [E, in, rows], transposed, which has
no linear to stand in for: it is decoded. bfloat16 holds every value exactly (a sign, two bits, and an exponent) unless
its scale is below 2**-125.

Source: transformers 5.23 (integrations/mxfp4.py), OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from typing import Any

import torch

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Codec, Dense, Entry, tensor_named
from fewbits.checkpoints.words import E2M1
from fewbits.core.errors import BadInput
from fewbits.formats.elements import ELEMENTS

_BIAS = 127


class MXFP4(Codec):
    holds = "gpt-oss's fused experts, decoded to dense; loads in transformers, vLLM, SGLang"

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == "mxfp4")

    def entries(self, source: Source) -> dict[str, Entry]:
        names = source.names()
        modules = [name.removesuffix("_blocks") for name in names if name.endswith("_blocks")]
        return {
            module: Entry(tensor=module, parts=(f"{module}_blocks", f"{module}_scales"))
            for module in modules
            if f"{module}_scales" in names
        }

    def read(self, source: Source, module: str, entry: Entry) -> Dense:
        blocks = tensor_named(source, f"{module}_blocks", 4, torch.uint8)
        scales = tensor_named(source, f"{module}_scales", 3, torch.uint8)
        experts, rows, groups, width = blocks.shape
        if scales.shape != blocks.shape[:3] or width != 16:
            raise BadInput(f"{module}: blocks {tuple(blocks.shape)} with scales {tuple(scales.shape)} are no MXFP4")
        if bool((scales == 255).any()):
            raise BadInput(f"{module}_scales holds NaN (255): the checkpoint is damaged")
        levels = ELEMENTS["fp4_e2m1"].value(torch.tensor(E2M1)).bfloat16()
        value = torch.empty((experts, 2 * width * groups, rows), dtype=torch.bfloat16)
        for index in range(experts):  # one expert's temporaries at a time
            pair = torch.stack([levels[(blocks[index] & 15).int()], levels[(blocks[index] >> 4).int()]], dim=-1)
            scaled = torch.ldexp(pair.flatten(2).float(), (scales[index].int() - _BIAS)[..., None])
            value[index] = scaled.flatten(1).t()
        return Dense(value=value, note="experts in one parameter: decoded in bfloat16, which is exact")


CODEC = MXFP4()
