"""How tests/golden/checkpoints/*.safetensors were made: small linears in the layouts of other libraries.

Every library runs in an environment of its own, since they need different versions of the same things:

    python tests/golden/make_checkpoints.py                       # makes the environments and all fixtures
    ENVIRONMENT/bin/python tests/golden/make_checkpoints.py gptq  # one fixture, where its library is installed

A file holds, for each case `c`, the tensors of one linear `c/m.*` exactly as the library wrote them, and `c/expected`,
the weight [out, in] that the library itself decodes (computed in float32 where it lets one). Metadata `cases`: case ->
what config.json says; `versions`: what made it.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "checkpoints"
TORCH = "torch==2.13.0"
# Fixture -> what its environment needs. `old_compressed_tensors` goes before the codes crossed word borders.
ENVIRONMENTS = {
    "gptq": ["gptqmodel==7.7.0", TORCH],
    "awq": ["gptqmodel==7.7.0", TORCH],
    "bitsandbytes": ["bitsandbytes==0.50.2", TORCH, "safetensors", "numpy"],
    "compressed_tensors": ["compressed-tensors==0.20.0", "transformers==5.23.0", TORCH],
    "old_compressed_tensors": ["compressed-tensors==0.12.2", "transformers==4.57.6", TORCH],
    "fp8": ["transformers==5.23.0", TORCH],
    "mxfp4": ["transformers==5.23.0", TORCH],
    "hqq": ["hqq==0.2.8.post1", TORCH],
    "mlx": ["mlx[cpu]==0.32.4", "numpy", "safetensors", TORCH],
}
Case = tuple[dict[str, Any], dict[str, Any], Any]  # configuration, tensors by name, expected weight


def matrix(rows: int = 32, columns: int = 128, seed: int = 0) -> Any:
    import torch

    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def grouped(w: Any, bits: int, size: int, symmetric: bool, index: Any) -> tuple[Any, Any]:
    """Scale and zero [out, G] by minimum and maximum of the groups that `index` [in] says, float16."""
    import torch

    groups = int(index.max()) + 1
    low = torch.stack([w[:, index == g].amin(1) for g in range(groups)], 1).clamp(max=0)
    high = torch.stack([w[:, index == g].amax(1) for g in range(groups)], 1).clamp(min=0)
    top = (1 << bits) - 1
    if symmetric:
        scale = (2 * torch.maximum(-low, high) / top).half()
        return scale, torch.full_like(scale, 1 << (bits - 1)).float()
    scale = ((high - low) / top).half()
    return scale, (-low / scale.float()).round().clamp(0, top)


def gptq() -> Iterator[tuple[str, Case]]:
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import FORMAT
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    settings = [(4, 32, True, False), (4, 32, False, False), (4, 32, True, True), (4, -1, True, False),
                (3, 32, True, False), (3, 64, False, False), (2, 32, False, False), (8, 32, False, False),
                (5, 32, True, False), (6, 32, False, False), (7, 32, True, False)]  # fmt: skip
    for version in ("gptq_v2", "gptq", "gptq_p"):
        for bits, size, symmetric, act_order in settings:
            planes = bits in (5, 6, 7)
            if planes != (version == "gptq_p") and not (version == "gptq_p" and bits == 3):
                continue
            w = matrix(32, 64)
            width = size if size > 0 else w.shape[1]
            index = torch.arange(w.shape[1]) // width
            if act_order:
                index = index[torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(1))]
            scale, zero = grouped(w, bits, width, symmetric, index)
            if version == "gptq":
                zero = zero.clamp(min=1)
            module = TorchLinear(
                bits=bits, group_size=size, sym=symmetric, desc_act=act_order, in_features=w.shape[1],
                out_features=w.shape[0], bias=False, register_buffers=True, format=FORMAT(version),
            )  # fmt: skip
            linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
            linear.weight.data = w
            module.pack(linear, scale, zero, index.int())
            module.post_init()
            held = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
            module.scales = module.scales.float()
            expected = module.dequantize_weight().t().contiguous()
            if version == "gptq":

                class Settings:
                    pass

                about: Any = Settings()
                about.bits, about.pack_dtype = bits, torch.int32
                convert_gptq_v2_to_v1_format_module(module, about)
                held["qzeros"] = module.qzeros.clone()
            config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order,
                      "sym": symmetric, "checkpoint_format": version}  # fmt: skip
            name = f"{version}-{bits}-{size}-{'sym' if symmetric else 'asym'}{'-order' if act_order else ''}"
            yield name, (config, held, expected)


def awq() -> Iterator[tuple[str, Case]]:
    import torch
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear, dequantize_gemm

    for size, symmetric in ((32, False), (64, True), (128, False)):
        w = matrix()
        scale, zero = grouped(w, 4, size, symmetric, torch.arange(w.shape[1]) // size)
        module = AwqTorchLinear(bits=4, group_size=size, sym=symmetric, desc_act=False, in_features=w.shape[1],
                                out_features=w.shape[0], register_buffers=True)  # fmt: skip
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        linear.weight.data = w
        module.pack(linear, scale, zero)
        held = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales")}
        expected = dequantize_gemm(qweight=module.qweight, qzeros=module.qzeros, scales=module.scales.float(), bits=4,
                                   group_size=size).t().contiguous()  # fmt: skip
        config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": not symmetric, "version": "gemm"}
        yield f"gemm-{size}-{'sym' if symmetric else 'asym'}", (config, held, expected)


def bitsandbytes() -> Iterator[tuple[str, Case]]:
    import bitsandbytes as bnb
    import torch

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for size, columns in ((64, 256), (128, 256), (64, 96)):
                rows = 72 if (kind, nested, columns // size) == ("nf4", True, 4) else 8  # more scales than one range
                w = matrix(rows, columns)
                held = bnb.nn.Params4bit(w, requires_grad=False, quant_type=kind, blocksize=size,
                                         compress_statistics=nested)  # fmt: skip
                linear = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compute_dtype=torch.float32)
                linear.weight = held.to("cpu")
                state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
                expected = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
                config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
                          "bnb_4bit_use_double_quant": nested}  # fmt: skip
                yield f"{kind}{'-nested' if nested else ''}-{size}-{columns}", (config, state, expected)
    w = matrix(32, 128)
    linear = bnb.nn.Linear8bitLt(128, 32, bias=False, has_fp16_weights=False)
    linear.weight = bnb.nn.Int8Params(w.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(w.half())
    state = {"weight": codes, "SCB": scale.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = bnb.functional.int8_vectorwise_dequant(codes, scale.float())
    yield "int8", ({"quant_method": "bitsandbytes", "load_in_8bit": True}, state, expected)


FIXTURES: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
}


def write(name: str) -> None:
    """Fixture `name`, with the library in this environment."""
    from safetensors.torch import save_file

    tensors, cases = {}, {}
    for case, (config, held, expected) in FIXTURES[name]():
        cases[case] = config
        tensors[f"{case}/expected"] = expected.float().contiguous()
        tensors |= {f"{case}/m.{part}": tensor.contiguous() for part, tensor in held.items()}
    packages = [need.split("=")[0].split("[")[0] for need in ENVIRONMENTS[name]]
    versions = {package: importlib.metadata.version(package) for package in packages}
    HERE.mkdir(exist_ok=True)
    save_file(tensors, HERE / f"{name}.safetensors", {"cases": json.dumps(cases), "versions": json.dumps(versions)})
    print(f"{name}: {len(cases)} cases, {(HERE / f'{name}.safetensors').stat().st_size} bytes, {versions}")


def main(names: list[str]) -> None:
    if names:
        for name in names:
            write(name)
        return
    for name, needs in ENVIRONMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            python = f"{folder}/bin/python"
            subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
            subprocess.run([python, __file__, name], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
