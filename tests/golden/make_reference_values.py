"""How reference_values.safetensors was made: what other packages decode after quantizing the same matrix.

    pip install torch==2.13.0 bitsandbytes==0.50.2 compressed-tensors==0.20.0 torchao==0.18.0 ml_dtypes==0.6.0
    python tests/golden/make_reference_values.py tests/golden/reference_values.safetensors

Entries are named "package/our format name" and hold float32; the metadata has the versions.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 8, 256
PACKAGES = ("bitsandbytes", "compressed-tensors", "torchao", "ml_dtypes", "torch")
ML_DTYPES = {
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp6_e2m3": "float6_e2m3fn",
    "fp6_e3m2": "float6_e3m2fn",
    "fp4_e2m1": "float4_e2m1fn",
}


def matrix() -> torch.Tensor:
    """[8, 256]: rows of different size, an outlier, a block of zeros, ties."""
    rng = np.random.default_rng(7)
    w = rng.standard_normal((ROWS, COLUMNS)) * np.logspace(-3, 1, ROWS)[:, None]
    w[1, 5] = 3.0
    w[2, 64:128] = 0
    w[3] = np.round(w[3] * 4) / 4
    return torch.from_numpy(w.astype(np.float32))


def scalars(top: float, smallest: float) -> torch.Tensor:
    """Numbers within the range of a minifloat: all magnitudes down to below its smallest, and exact ties."""
    rng = np.random.default_rng(8)
    spread = top * 2.0 ** -rng.uniform(0, np.log2(top / smallest) + 3, 1500)
    ties = smallest * rng.integers(0, 200, 300) / 2
    x = np.concatenate([spread, ties[ties <= top], [0.0, top, 1e-40, 1e-30]])
    return torch.from_numpy(np.concatenate([x, -x]).astype(np.float32))


def of_ml_dtypes() -> Iterator[tuple[str, torch.Tensor]]:
    import ml_dtypes

    for ours, theirs in ML_DTYPES.items():
        kind = getattr(ml_dtypes, theirs)
        info = ml_dtypes.finfo(kind)
        x = scalars(float(info.max), float(info.smallest_subnormal))
        yield f"inputs/{ours}", x
        yield f"ml_dtypes/{ours}", torch.from_numpy(x.numpy().astype(kind).astype(np.float32))


def of_bitsandbytes(w: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from bitsandbytes import functional

    for ours, theirs in (("nf4", "nf4"), ("fp4_bnb", "fp4")):
        packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=theirs)
        yield f"bitsandbytes/{ours}-g64", functional.dequantize_4bit(packed, state).float()
    _, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    yield "scales/nf4-g64-dq", scales.float().view(ROWS, -1)
    codes, state = functional.quantize_blockwise(w, blocksize=256)
    yield "bitsandbytes/dynamic8-g256", functional.dequantize_blockwise(codes, state).float()


def of_compressed_tensors(w: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    kinds = {
        "int4-g128": {"num_bits": 4, "strategy": "group", "group_size": 128},
        "int4-asym-g64": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
        "int3-g64": {"num_bits": 3, "strategy": "group", "group_size": 64},
        "int8-channel": {"num_bits": 8, "strategy": "channel"},
        "int8-asym-channel": {"num_bits": 8, "strategy": "channel", "symmetric": False},
        "fp8_e4m3-channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    }
    for ours, options in kinds.items():
        arguments = QuantizationArgs(**options)
        blocks = w.view(ROWS, -1, arguments.group_size or COLUMNS)
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
        yield f"compressed-tensors/{ours}", fake_quantize(w, scale, zero, arguments).float()


def of_torchao(w: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    for ours, element in (("mxfp8", torch.float8_e4m3fn), ("mxfp8_e5m2", torch.float8_e5m2), ("mxfp4", None)):
        element = torch.float4_e2m1fn_x2 if element is None else element
        packed = MXTensor.to_mx(w, element, block_size=32, scaling_mode=ScaleCalculationMode.FLOOR)
        yield f"torchao/{ours}", packed.dequantize(torch.float32)
    outer = per_tensor_amax_to_scale(w.abs().max())
    yield "torchao/nvfp4", NVFP4Tensor.to_nvfp4(w, per_tensor_scale=outer).dequantize(torch.float32)


def main() -> None:
    w = matrix()
    found = {"inputs/matrix": w}
    for entries in (of_ml_dtypes(), of_bitsandbytes(w), of_compressed_tensors(w), of_torchao(w)):
        found.update({name: values.contiguous() for name, values in entries})
    save_file(found, sys.argv[1], {name: importlib.metadata.version(name) for name in PACKAGES})


if __name__ == "__main__":
    main()
