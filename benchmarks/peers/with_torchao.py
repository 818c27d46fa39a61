"""torchao: IntxWeightOnlyConfig, integers of 1 to 8 bits in groups, no calibration text.

`Int4WeightOnlyConfig` rounds to the same integers but wants a package with GPU kernels; this one runs anywhere.
`algorithm` "hqq_scale_only" searches the scale of a symmetric grid, "affine" takes minimum and maximum.
"""

from __future__ import annotations

import torch
from contract import finish, group_parts, job, linears, load
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType


def main() -> None:
    with job() as work:
        model = load(work)
        modules = linears(model)
        algorithm = work.options.get("algorithm", "affine")
        asymmetric = algorithm == "affine"
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{work.bits}"),
            granularity=PerGroup(work.group_size),
            mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
            scale_dtype=torch.bfloat16,
            intx_choose_qparams_algorithm=algorithm,
        )
        quantize_(model, config, filter_fn=lambda module, name: name in modules)
        decoded = {f"{name}.weight": module.weight.dequantize() for name, module in modules.items()}
    shapes = [tuple(tensor.shape) for tensor in decoded.values()]
    parts = group_parts(shapes, work.bits, work.group_size, 16, work.bits if asymmetric else 0)
    work.notes.append(f"codes and zero points kept one a byte; counted as {work.bits} bits each")
    kind = "asymmetric" if asymmetric else "symmetric"
    settings = f"IntxWeightOnlyConfig int{work.bits}, PerGroup({work.group_size}), {kind}, {algorithm}, bfloat16 scales"
    finish(work, decoded, parts, ["torchao", "transformers"], settings)


if __name__ == "__main__":
    main()
