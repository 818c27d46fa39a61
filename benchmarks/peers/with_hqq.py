"""HQQ: scale and zero point by half-quadratic splitting, no calibration text.

The library's own configuration (`BaseQuantizeConfig`), scales and zero points in float16, its default; `axis` 1 is
the default and groups along the input, 0 groups along the output.
"""

from __future__ import annotations

import torch
from contract import finish, job, linears, load
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear


def main() -> None:
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    with job() as work:
        axis = int(work.options.get("axis", 1))
        config = BaseQuantizeConfig(nbits=work.bits, group_size=work.group_size, axis=axis)
        decoded, groups, weights = {}, 0, 0
        for name, module in linears(load(work)).items():
            layer = HQQLinear(module, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
            decoded[f"{name}.weight"] = layer.dequantize().float()
            groups += layer.meta["scale"].numel()
            weights += module.weight.numel()
    parts = {"codes": float(work.bits * weights), "scales": 16.0 * groups, "zero points": 16.0 * groups}
    if work.bits == 3:
        work.notes.append("packed as ten 3-bit codes in 32 bits; counted as 3 bits a code")
    settings = f"BaseQuantizeConfig(nbits={work.bits}, group_size={work.group_size}, axis={axis}), float16 scales"
    finish(work, decoded, parts, ["hqq", "transformers"], settings)


if __name__ == "__main__":
    main()
