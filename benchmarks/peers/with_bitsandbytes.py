"""bitsandbytes NF4: blocks along the flattened weight, scale by absmax; optionally the scales quantized again.

`double_quant` is what its documentation recommends: absmax minus its mean in 8 bits, blocks of 256.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
from contract import finish, job, linears, load


def main() -> None:
    with job() as work:
        double = bool(work.options.get("double_quant"))
        decoded, parts = {}, {"codes": 0.0, "scales": 0.0}
        for name, module in linears(load(work)).items():
            weight = module.weight.detach()
            codes, state = bnb.quantize_4bit(
                weight, blocksize=work.group_size, compress_statistics=double, quant_type="nf4"
            )
            decoded[f"{name}.weight"] = bnb.dequantize_4bit(codes, state)
            parts["codes"] += 8 * codes.numel() * codes.element_size()
            stored = [state.absmax, *([state.state2.absmax, state.offset] if double else [])]
            parts["scales"] += sum(8 * tensor.numel() * tensor.element_size() for tensor in stored)
    scales = "scales quantized again (double_quant)" if double else "float32 scales"
    finish(work, decoded, parts, ["bitsandbytes"], f"NF4, blocks of {work.group_size}, {scales}")


if __name__ == "__main__":
    main()
