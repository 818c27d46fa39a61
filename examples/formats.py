"""What each format costs on one matrix: bits per weight against the error of rounding to nearest.

python examples/formats.py
"""

from __future__ import annotations

import torch

import fewbits

NAMES = (
    "int8-channel",
    "int4-g64",
    "int4-asym-g64",
    "nf4-g64",
    "fp8_e4m3-channel",
    "fp4_e2m1-g16",
    "int3-g64",
    "int2-g64",
)


def main() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    print(f"{'format':18} {'bits/weight':>11} {'SQNR, dB':>9}")
    for name in NAMES:
        format = fewbits.format(name).with_scale_dtype(torch.bfloat16)
        error = weight - format.quantize(weight).dequantize()
        sqnr = 10 * torch.log10(weight.square().sum() / error.square().sum())
        print(f"{name:18} {format.bits_per_weight((512, 1024)):11.2f} {float(sqnr):9.1f}")


if __name__ == "__main__":
    main()
