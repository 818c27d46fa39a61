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
    "modelopt": ["nvidia-modelopt==0.47.0", TORCH],
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


def compressed_tensors() -> Iterator[tuple[str, Case]]:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    formats = {"W4A16": "pack-quantized", "W3A16": "pack-quantized", "W4A16_ASYM": "pack-quantized",
               "W8A8": "int-quantized",
               "FP8_DYNAMIC": "float-quantized", "FP8_BLOCK": "float-quantized", "NVFP4A16": "nvfp4-pack-quantized",
               "MXFP4A16": "mxfp4-pack-quantized", "MXFP8A16": "mxfp8-quantized"}  # fmt: skip
    for preset, kind in formats.items():
        scheme = preset_name_to_scheme(preset, ["Linear"])
        scheme.format = kind
        args, w = scheme.weights, matrix(128 if preset == "FP8_BLOCK" else 32, 128)
        strategy, size = str(args.strategy), args.group_size or w.shape[1]
        blocks = (
            w.view(1, 128, 1, 128).transpose(1, 2).flatten(2) if strategy == "block" else w.unflatten(1, (-1, size))
        )
        state = {"weight": w}
        if preset == "NVFP4A16":
            state["weight_global_scale"] = (448 * 6 / w.abs().max()).float().reshape(1)
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args,
                                        global_scale=state.get("weight_global_scale"))  # fmt: skip
        state["weight_scale"] = scale
        if not args.symmetric:
            state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(kind)
        held = compressor.compress(dict(state), scheme)
        decoded = dict(held)
        if not kind.startswith(("nvfp4", "mx")) and "weight_scale" in decoded:
            decoded["weight_scale"] = decoded["weight_scale"].float()
        expected = compressor.decompress(decoded, scheme)["weight"]
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=kind, ignore=["lm_head"])
        yield preset, (json.loads(config.model_dump_json()), held, expected)


def old_compressed_tensors() -> Iterator[tuple[str, Case]]:
    import torch
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32, unpack_from_int32

    for bits in (3, 5, 6, 7):
        w = matrix(32, 128)
        scale, _ = grouped(w, bits, 32, True, torch.arange(128) // 32)
        spread = scale.float().repeat_interleave(32, 1)
        codes = (w / spread).round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1).to(torch.int8)
        held = {
            "weight_packed": pack_to_int32(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([32, 128]),
        }
        assert torch.equal(unpack_from_int32(held["weight_packed"], bits, torch.Size([32, 128])), codes)
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                  "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
        yield f"{bits}-bits", (config, held, codes.float() * spread)


def fp8() -> Iterator[tuple[str, Case]]:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for block, shape, scales in ((32, (64, 96), torch.float32), (32, (64, 96), torch.float8_e8m0fnu)):
        w = matrix(*shape)
        tiles = w.view(shape[0] // block, block, shape[1] // block, block)
        scale = tiles.abs().amax((1, 3)) / 448
        scale = scale.to(scales)
        codes = (tiles / scale.float()[:, None, :, None]).reshape(shape).to(torch.float8_e4m3fn)
        expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
        config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
        yield f"tile{block}-{str(scales)[6:]}", (config, {"weight": codes, "weight_scale_inv": scale}, expected)


def mxfp4() -> Iterator[tuple[str, Case]]:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw = torch.Generator().manual_seed(0)
    for name, rows in (("down_proj", 24), ("gate_up_proj", 16)):
        blocks = torch.randint(0, 256, (2, rows, 2, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(110, 135, (2, rows, 2), generator=draw, dtype=torch.uint8)
        held = {f"experts.{name}_blocks": blocks, f"experts.{name}_scales": scales}
        yield name, ({"quant_method": "mxfp4"}, held, convert_moe_packed_tensors(blocks, scales))


def hqq() -> Iterator[tuple[str, Case]]:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    for bits in (8, 6, 5, 4, 3, 2, 1):
        for axis, as_float in ((1, False), (0, False), (1, True)):
            if (axis == 0 or as_float) and bits != 4:
                continue
            linear = torch.nn.Linear(128, 40, bias=False)
            linear.weight.data = matrix(40, 128)
            settings = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis, view_as_float=as_float)
            layer = HQQLinear(linear, settings, compute_dtype=torch.float16, device="cpu")
            held = {name: torch.as_tensor(tensor).clone() for name, tensor in layer.state_dict().items()}
            meta = {**layer.meta, "compute_dtype": torch.float32, "scale": layer.meta["scale"].float(),
                    "zero": layer.meta["zero"].float()}  # fmt: skip
            expected = Quantizer.dequantize(layer.W_q, meta)
            yield f"{bits}-axis{axis}{'-float' if as_float else ''}", ({"quant_method": "hqq"}, held, expected)


def mlx() -> Iterator[tuple[str, Case]]:
    import mlx.core as mx
    import numpy as np
    import torch

    w = mx.array(matrix(32, 128).numpy())
    settings = [("affine", bits, size) for bits, size in ((2, 64), (3, 32), (4, 64), (5, 64), (6, 128), (8, 32))]
    for mode, bits, size in [*settings, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]:
        for half in (False, True) if mode == "affine" and bits == 4 else (False,):
            source = w.astype(mx.float16) if half else w
            parts = mx.quantize(source, group_size=size, bits=bits, mode=mode)
            held = dict(zip(("weight", "scales", "biases"), (torch.from_numpy(np.array(part)) for part in parts),
                            strict=False))  # fmt: skip
            wide = [part if part.dtype in (mx.uint32, mx.uint8) else part.astype(mx.float32) for part in parts]
            expected = mx.dequantize(*wide, group_size=size, bits=bits, mode=mode).astype(mx.float32)
            about = {"group_size": size, "bits": bits, "mode": mode}
            name = f"{mode}-{bits}-{size}{'-half' if half else ''}"
            yield (
                name,
                ({"quantization": about, "quantization_config": about}, held, torch.from_numpy(np.array(expected))),
            )
    for mode, size in (("affine", 64), ("mxfp4", 32)):  # the experts of a block, as mlx-lm stacks them
        about = {"group_size": size, "bits": 4, "mode": mode}
        parts = mx.quantize(mx.array(matrix(64, 128, seed=1).numpy().reshape(2, 32, 128)), **about)
        held = {f"switch_mlp.up_proj.{name}": torch.from_numpy(np.array(part))
                for name, part in zip(("weight", "scales", "biases"), parts, strict=False)}  # fmt: skip
        expected = torch.from_numpy(np.array(mx.dequantize(*parts, **about).astype(mx.float32)))
        yield f"stack-{mode}", ({"quantization": about, "quantization_config": about}, held, expected)


def modelopt() -> Iterator[tuple[str, Case]]:
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    w = matrix(32, 128)
    packed, scale, outer = NVFP4QTensor.quantize(w, 16)
    expected = packed.dequantize(torch.float32, scale=scale, double_scale=outer, block_sizes={-1: 16})
    held = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": outer}
    yield "nvfp4", ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, held, expected)


FIXTURES: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed_tensors": compressed_tensors,
    "old_compressed_tensors": old_compressed_tensors,
    "fp8": fp8,
    "mxfp4": mxfp4,
    "hqq": hqq,
    "mlx": mlx,
    "modelopt": modelopt,
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
