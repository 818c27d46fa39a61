"""bitsandbytes NF4: blocks along the flattened weight, scale by absmax; optionally the scales quantized again.

`double_quant` is what its documentation recommends: absmax minus its mean in 8 bits, blocks of 256.

What is measured is decoded from its codes and scales by NF4's definition. Version 0.50.2 decodes rows that are no whole
number of blocks wrongly on processors with AVX-512, from codes and scales that are right; where the two differ a note
says so.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from contract import finish, job, linears, load


def decode(codes: torch.Tensor, state: Any, block: int, shape: torch.Size) -> torch.Tensor:
    """Levels times the absolute maxima of their blocks; two codes a byte, the first in the upper half."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    pairs = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=-1).flatten().long()
    levels = state.code.float()[pairs].view(-1, block)
    return (levels * absmax.float()[:, None]).view(shape)


def main() -> None:
    with job() as work:
        double = bool(work.options.get("double_quant"))
        decoded, parts, wrong = {}, {"codes": 0.0, "scales": 0.0}, 0
        for name, module in linears(load(work)).items():
            weight = module.weight.detach()
            codes, state = bnb.quantize_4bit(
                weight, blocksize=work.group_size, compress_statistics=double, quant_type="nf4"
            )
            decoded[f"{name}.weight"] = found = decode(codes, state, work.group_size, weight.shape)
            wrong += not torch.allclose(bnb.dequantize_4bit(codes, state), found, rtol=1e-3, atol=1e-6)
            parts["codes"] += 8 * codes.numel() * codes.element_size()
            stored = [state.absmax, *([state.state2.absmax, state.offset] if double else [])]
            parts["scales"] += sum(8 * tensor.numel() * tensor.element_size() for tensor in stored)
    if wrong:
        work.notes.append(
            f"it decodes {wrong} of {len(decoded)} tensors to other values here: taken from codes and scales"
        )
    scales = "scales quantized again (double_quant)" if double else "float32 scales"
    finish(work, decoded, parts, ["bitsandbytes"], f"NF4, blocks of {work.group_size}, {scales}")


if __name__ == "__main__":
    main()
