"""What vLLM and mlx have a kernel for, of layers that fewbits can write; and mlx-lm itself, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runtime_models import quantized_weights, tiny_llama, write_quantized

from fewbits.checkpoints.codecs import Layer
from fewbits.evaluation.verification.admission import mlx, vllm
from fewbits.evaluation.verification.checks import FAILED, NOT_CHECKED, OK, WARNING, Check
from fewbits.evaluation.verification.verify import verify
from fewbits.formats import parse_format
from fewbits.pipeline.convert import convert


def layer(weights: str, activations: str | None = None, shape: tuple[int, int] = (64, 768), **more: Any) -> Layer:
    inputs = None if activations is None else parse_format(activations)
    return Layer(format=parse_format(weights), shape=shape, activations=inputs, **more)


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
def test_gptq_in_vllm_is_symmetric_in_order_and_of_marlins_groups(kind: str) -> None:
    for name in ("int4-g128", "int4-g32", "int8-g64", "int4-channel"):
        assert vllm(kind, {}, layer(name)) is None, name
    refused = {"int3-g128": "3 bits", "int4-asym-g128": "zero points", "int4-g16": "groups of 16"}
    for name, told in refused.items():
        found = vllm(kind, {}, layer(name))
        assert found is not None and told in found.what and not found.unless
    for settings, ordered in (({"desc_act": True}, False), ({}, True)):
        found = vllm(kind, settings, layer("int4-g128", ordered=ordered))
        assert found is not None and "desc_act" in found.what
        assert vllm(kind, settings, layer("int4-channel", ordered=ordered)) is None  # one group a row: no order
    found = vllm(kind, {"sym": False}, layer("int4-g128"))
    assert found is not None and "zero points" in found.what


@pytest.mark.parametrize(
    ("weights", "activations", "unless"),
    [
        ("int4-g128", None, None), ("int4-asym-g32", None, None), ("int8-channel", None, None),
        ("int4-g256", None, None), ("fp8_e4m3-channel", None, None), ("mxfp4", None, None), ("nvfp4_ct", None, None),
        ("int8-channel", "int8-token", None), ("fp8_e4m3-channel", "fp8_e4m3-token", None), ("mxfp8", "mxfp8", None),
        ("fp8_block", "fp8_e4m3-g128", None), ("int8-asym-g64", None, "Hopper"), ("int4-g16", None, "float16"),
        ("int4-asym-g16", None, "humming"), ("int3-g64", None, "humming"), ("int4-g128", "int8-token", "humming"),
        ("int4-g128", "fp8_e4m3-token", "Hopper"), ("int4-tensor", None, ""), ("int8-g128", "int8-token", ""),
        ("int4-g48", None, None), ("int4-g100", None, ""),
    ],
)  # fmt: skip
def test_compressed_tensors_in_vllm(weights: str, activations: str | None, unless: str | None) -> None:
    found = vllm("compressed-tensors", {}, layer(weights, activations))
    if weights == "int4-g48":  # divides 768, and Exllama takes it
        assert found is not None and "float16" in found.unless
    elif unless is None:
        assert found is None
    else:
        assert found is not None and (unless in found.unless if unless else not found.unless)


def test_other_formats() -> None:
    assert vllm("awq", {}, layer("int4-asym-g128")) is None
    assert vllm("awq", {}, layer("int4-asym-g128", shape=(60, 768))) is not None
    assert vllm("modelopt", {"quant_algo": "NVFP4"}, layer("nvfp4")) is None
    assert vllm("modelopt", {"quant_algo": "W8A8_SQ_PER_CHANNEL"}, layer("int8-channel")) is not None
    assert mlx("awq", {}, layer("int4-asym-g64")) is None and mlx("awq", {}, layer("int4-asym-g16")) is not None


def written(folder: Path, kind: str, name: str) -> Path:
    model = tiny_llama(intermediate_size=192)
    weights = quantized_weights(model, parse_format(name).with_scale_dtype(torch.float16))
    return write_quantized(folder, model, weights, kind=kind)


def checked(folder: Path, runtime: str) -> dict[str, Check]:
    return {check.name: check for check in verify(folder, runtime).checks}


def test_the_check(tmp_path: Path) -> None:
    good = checked(written(tmp_path / "good", "gptq", "int4-g32"), "vllm")
    assert good["kernels"].verdict == OK and "14 modules" in good["kernels"].detail
    bad = checked(written(tmp_path / "bad", "gptq", "int4-asym-g32"), "vllm")
    assert bad["kernels"].verdict == FAILED and "zero points in GPTQ" in bad["kernels"].detail
    some = checked(written(tmp_path / "some", "compressed-tensors", "int3-g32"), "vllm")
    assert some["kernels"].verdict == WARNING and "only with the package humming" in some["kernels"].detail
    assert checked(tmp_path / "some", "transformers")["kernels"].verdict == NOT_CHECKED


@pytest.mark.parametrize(
    ("kind", "name", "reads"),
    [("mlx", "int4-min-g32", True), ("mlx", "mxfp4", True), ("awq", "int4-asym-g32", True), ("gptq", "int4-g32", False),
     ("compressed-tensors", "int4-g32", False), ("modelopt", "nvfp4", False)],
)  # fmt: skip
def test_mlx(tmp_path: Path, kind: str, name: str, reads: bool) -> None:
    found = checked(written(tmp_path / "out", kind, name), "mlx")
    assert found["format"].verdict == (OK if reads else FAILED)
    if not reads:
        return
    installed = importlib.util.find_spec("mlx_lm") is not None
    assert found["runs in mlx"].verdict == (OK if installed else NOT_CHECKED), found["runs in mlx"].detail


def test_mlx_finds_the_base_of_rotary_embeddings(tmp_path: Path) -> None:
    model = tiny_llama(intermediate_size=192, rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    weights = quantized_weights(model, parse_format("int4-asym-g32").with_scale_dtype(torch.float16))
    first = write_quantized(tmp_path / "awq", model, weights, kind="awq")
    warned = checked(first, "mlx")["rope"]
    assert warned.verdict == WARNING and "300.0" in warned.detail
    assert checked(first, "transformers")["rope"].verdict == OK
    convert(first, "mlx", tmp_path / "mlx")
    found = checked(tmp_path / "mlx", "mlx")
    assert found["rope"].verdict == OK and checked(tmp_path / "mlx", "transformers")["tensors"].verdict == OK
    if found["runs in mlx"].verdict != NOT_CHECKED:
        assert float(found["runs in mlx"].detail.split()[1]) < 1e-9
