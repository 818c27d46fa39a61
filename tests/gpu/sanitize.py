"""Launches every kernel of fewbits/kernels/cuda, on small ragged shapes, for NVIDIA's compute-sanitizer:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --report-api-errors no python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py

Without torch's cache of memory every tensor ends where its allocation ends. Failed calls of the host are left out:
Python's bindings of CUDA ask the driver for functions that it may not have; those of ours that fail are raised.
"""

from __future__ import annotations

import torch

from fewbits.formats import parse_format
from fewbits.kernels import KERNELS, LinearSpec
from fewbits.kernels.decode_attention import decode_attention
from fewbits.kernels.kv_tiles import KVTiles
from fewbits.kernels.triton_quantize import quantize_tokens

DEVICE = torch.device("cuda", 0)
FORMATS = (
    "int4-g128", "int4-asym-g64", "int4-g16", "int3-g64", "int3-asym-g16", "int2-g64", "int2-asym-g32",
    "int8-channel", "nf4-g64", "lloyd3-g64",
)  # fmt: skip
TOKENS = (1, 3, 16, 40, 1100)  # few, many, and the weight decoded once


def products() -> None:
    """Weights times tokens in 16 bits, and in E4M3 where a kernel takes them."""
    kernel = KERNELS.get("cuda_fragments")
    for name in FORMATS:
        weight = parse_format(name).quantize(torch.randn(200, 1032, device=DEVICE))
        packed = kernel.prepack(weight)
        for activations in (None, parse_format("fp8_e4m3-token")):
            spec = LinearSpec(
                format=weight.format, shape=weight.shape, device=DEVICE, dtype=torch.bfloat16, activations=activations
            )
            if not kernel.accepts(spec):
                continue
            for dtype in (torch.bfloat16, torch.float16):
                for tokens in TOKENS:
                    kernel.linear(torch.randn(tokens, 1032, device=DEVICE, dtype=dtype), packed, spec)


def rounding() -> None:
    """Tokens to 8 bits, by CUDA C++ where rows are wide or nothing comes before."""
    for columns in (1000, 9000):
        x, weight = torch.randn(5, columns, device=DEVICE).bfloat16(), torch.rand(columns, device=DEVICE).bfloat16()
        for dtype, low, high in ((torch.float8_e4m3fn, -448.0, 448.0), (torch.int8, -128.0, 127.0)):
            quantize_tokens(x, dtype, high, low, high)
            quantize_tokens(x, dtype, high, low, high, "rms_norm", weight, 1e-5)
            quantize_tokens(torch.cat((x, x), 1), dtype, high, low, high, "silu")


def attention() -> None:
    """One new token over a cache in tiles."""
    lengths = torch.tensor([700, 1, 300], dtype=torch.int32, device=DEVICE)
    for bits in (4, 8):
        for group in (32, 128):
            held = KVTiles.empty(3, 2, 700, 128, bits, group, DEVICE)
            for dtype in (torch.bfloat16, torch.float32):
                q = torch.randn(3, 8, 128, device=DEVICE, dtype=dtype)
                decode_attention(q, held.keys, held.key_params, held.values, held.value_params, lengths, 0.09)


if __name__ == "__main__":
    for launch in (products, rounding, attention):
        launch()
        torch.cuda.synchronize()
        print(launch.__name__, "launched")
