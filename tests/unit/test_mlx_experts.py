"""Mixtures of experts in MLX: stacked as mlx-lm has them, and back without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import equal, stored_bytes, values
from tiny_runtime_models import saved, tiny_llama

from fewbits import quantize
from fewbits.checkpoints.codecs import quantized_modules
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput
from fewbits.evaluation.verification.checks import NOT_CHECKED, OK
from fewbits.evaluation.verification.verify import verify
from fewbits.pipeline.convert import convert
from fewbits.runtime.load import load_all

EXPERTS = 4
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 64},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": 64},
}


def quantized(folder: Path, family: str, scheme: str = "int4-asym-g32") -> Path:
    model = tiny_llama(model_type=family, num_experts_per_tok=2, tied=False, **FAMILIES[family]).half()
    original = saved(model, folder / "original")
    return quantize(
        original, scheme, out=folder / "native", method="rtn", checkpoint_format="native", eval_samples=0
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(tmp_path: Path, family: str) -> None:
    first = quantized(tmp_path, family)
    done = convert(first, "mlx", tmp_path / "mlx", shard_bytes=20_000)
    assert set(done.actions) == {"lossless"}
    names = open_source(tmp_path / "mlx", allow_quantized=True).names()
    stacks = [name for name in names if ".switch_mlp." in name and name.endswith(".weight")]
    assert len(stacks) == 2 * 3 and not any(".experts." in name for name in names)
    assert equal(values(first), values(tmp_path / "mlx"))
    convert(tmp_path / "mlx", "native", tmp_path / "back")
    before, after = stored_bytes(first), stored_bytes(tmp_path / "back")
    assert before.keys() == after.keys() and equal(values(first), values(tmp_path / "back"))
    ours, theirs = (load_all(tmp_path / name, dtype=torch.float32).model for name in ("native", "mlx"))
    ids = torch.arange(12)[None]
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_runs_them(tmp_path: Path, family: str) -> None:
    convert(quantized(tmp_path, family, "mxfp4"), "mlx", tmp_path / "mlx")
    found = {check.name: check for check in verify(tmp_path / "mlx", "mlx").checks}
    assert found["format"].verdict == found["tensors"].verdict == found["kernels"].verdict == OK
    assert found["experts"].detail == f"{EXPERTS} a block, all alike"
    ran = found["runs in mlx"]
    if ran.verdict != NOT_CHECKED:
        assert ran.verdict == OK and float(ran.detail.split()[1]) < 1e-6, ran.detail


def test_damage_is_named(tmp_path: Path) -> None:
    convert(quantized(tmp_path, "qwen3_moe", "mxfp4"), "mlx", tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    stack = "model.layers.0.mlp.switch_mlp.up_proj"
    for change, told in (
        ({f"{stack}.weight": tensors[f"{stack}.weight"][:2].contiguous()}, "no stack of experts"),
        ({f"{stack}.weight": tensors[f"{stack}.weight"].float()}, "no stack of experts"),
        ({f"{stack}.scales": tensors[f"{stack}.scales"][0].contiguous()}, r"\[experts, rows, groups\]"),
    ):
        save_file({**tensors, **change}, tmp_path / "mlx" / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadInput, match=told):
            modules = quantized_modules(open_source(tmp_path / "mlx", allow_quantized=True))
            modules.read("model.layers.0.mlp.experts.3.up_proj")


def test_settings_are_those_of_stacks(tmp_path: Path) -> None:
    convert(quantized(tmp_path, "qwen3_moe", "mxfp4"), "mlx", tmp_path / "mlx")
    said = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert said == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
