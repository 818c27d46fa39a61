"""`verify`: sound checkpoints pass, and each kind of damage fails its own check with a way to mend it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runtime_models import quantized_weights, saved, tiny_llama, write_quantized
from typer.testing import CliRunner

from fewbits import quantize
from fewbits.checkpoints.gguf_export import write_gguf
from fewbits.checkpoints.source import open_source
from fewbits.cli.main import app
from fewbits.core.errors import BadInput
from fewbits.evaluation.verification.checks import FAILED, NOT_CHECKED, OK, WARNING, Check
from fewbits.evaluation.verification.verify import verify
from fewbits.formats import parse_format

EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def dense(directory: Path, **changes: Any) -> Path:
    return saved(tiny_llama(**changes), directory)


def packed(directory: Path, scheme: str = "W4A16", kind: str = "auto", **changes: Any) -> tuple[Path, Path]:
    """(the original, its quantized checkpoint)."""
    original = dense(directory / "original", **changes)
    out = quantize(
        original, scheme, out=directory / "packed", group_size=32, method="rtn", checkpoint_format=kind, eval_samples=0
    )
    return original, out


def verdicts(found: Any) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks}


def check(found: Any, name: str) -> Check:
    return next(each for each in found.checks if each.name == name)


@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
def test_a_sound_checkpoint_passes(tmp_path: Path, runtime: str) -> None:
    original, out = packed(tmp_path)
    found = verify(out, runtime, source=original)
    said = verdicts(found)
    assert found.passed, [each for each in found.checks if each.verdict == FAILED]
    assert found.format == "compressed-tensors"
    for name in ("files", "format", "dtype", "tokenizer", "tensors", "ignore names", "tied head", "scales", "logits"):
        assert said[name] == OK, check(found, name)
    assert said["fused shards"] == said["decoded weights"] == OK
    if runtime == "transformers":
        assert said["runs in transformers"] == OK, check(found, "runs in transformers")
        assert said["tensor parallel"] == NOT_CHECKED
    else:
        assert said["tensor parallel"] == WARNING  # two key-value heads and rows of 64 do not go into eight
        assert check(found, "tensor parallel").mend == "serve on 1 device"


def test_what_is_not_there_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither a directory nor a file"):
        verify(tmp_path / "nodir")


def test_dense_native_and_gguf(tmp_path: Path) -> None:
    original, out = packed(tmp_path, "nf4-g32", "native")
    assert verify(original).passed
    assert verify(out, source=original).passed
    wrong = verify(out, "vllm")
    assert not wrong.passed and "compressed-tensors" in check(wrong, "format").mend
    write_gguf(open_source(original), tmp_path / "m.gguf", weights="q8_0")
    found = verify(tmp_path / "m.gguf", "llama.cpp", source=original)
    assert found.passed, found.checks
    assert verdicts(found)["vectors"] == verdicts(found)["vocabulary"] == verdicts(found)["keys"] == OK
    installed = importlib.util.find_spec("xllamacpp") is not None
    assert check(found, "runs in llama.cpp").verdict == (OK if installed else NOT_CHECKED)


def test_experts(tmp_path: Path) -> None:
    original, out = packed(tmp_path, **EXPERTS)
    found = verify(out, "vllm", source=original)
    assert found.passed, [each for each in found.checks if each.verdict == FAILED]
    assert check(found, "experts").detail == "4 a block, all alike"


def edit_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(out: Path) -> None:
        config = json.loads((out / "config.json").read_text())
        change(config)
        (out / "config.json").write_text(json.dumps(config))

    return act


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def act(out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    return act


def set_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].fill_(value)


UP = "model.layers.1.mlp.up_proj"
DAMAGE: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "no tokenizer": (lambda out: [p.unlink() for p in out.glob("tok*")], "tokenizer", FAILED, "tokenizer"),
    "no weights": (lambda out: (out / "model.safetensors").unlink(), "files", FAILED, "neither"),
    "NaN scale": (edit_tensors(set_value(f"{UP}.weight_scale", float("nan"))), "scales", FAILED, "up_proj"),
    "zero scales": (edit_tensors(set_value(f"{UP}.weight_scale", 0.0)), "scales", FAILED, "all scales are zero"),
    "one zero scale": (
        edit_tensors(lambda tensors: tensors[f"{UP}.weight_scale"][0].fill_(0)), "scales", WARNING, "scale 0",
    ),
    "NaN norm": (edit_tensors(set_value("model.norm.weight", float("nan"))), "scales", FAILED, "model.norm"),
    "a missing norm": (
        edit_tensors(lambda tensors: tensors.pop("model.norm.weight")), "tensors", FAILED, "model.norm",
    ),
    "a wrong shape": (
        edit_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)})), "tensors", FAILED, "shapes",
    ),
    "a stray tensor": (
        edit_tensors(lambda tensors: tensors.update({"mtp.0.weight": torch.ones(3)})), "tensors", WARNING, "mtp",
    ),
    "a stored tied head": (
        edit_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.ones(264, 64)})), "tied head", WARNING,
        "stored although",
    ),
    "untied without a head": (
        edit_config(lambda config: config.update(tie_word_embeddings=False)), "tied head", FAILED, "no lm_head",
    ),
    "ignored and quantized": (
        edit_config(lambda config: config["quantization_config"]["ignore"].append(UP)), "ignore names", FAILED,
        "up_proj",
    ),
    "a misspelt name": (
        edit_config(lambda config: config["quantization_config"]["ignore"].append("lm_haed")), "ignore names", WARNING,
        "lm_haed",
    ),
    "an integer dtype": (edit_config(lambda config: config.update(dtype="int8")), "files", FAILED, "int8"),
    "other weights": (
        edit_tensors(lambda tensors: [tensors[name].random_() for name in tensors if name.endswith("weight_packed")]),
        "decoded weights", FAILED, "unlike",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return packed(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damage: str, sound: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    act, name, verdict, message = DAMAGE[damage]
    original, out = sound
    copy = shutil.copytree(out, tmp_path / "copy")
    act(copy)
    found = verify(copy, "vllm", source=original)
    said = check(found, name)
    assert (said.verdict, message in said.detail) == (verdict, True), said
    assert said.mend
    assert found.passed == (verdict != FAILED)


def mixed(directory: Path, formats: dict[str, str]) -> Path:
    """A native checkpoint whose modules have the formats named by the ends of their names."""
    model = tiny_llama(layers=1)
    weights = quantized_weights(model, parse_format("int4-g32"))
    for name, weight in weights.items():
        for end, format in formats.items():
            if name.endswith(end):
                weights[name] = parse_format(format).quantize(model.get_submodule(name).weight.detach())
        assert weight
    return write_quantized(directory, model, weights)


def test_fused_shards_that_differ(tmp_path: Path) -> None:
    out = mixed(tmp_path / "a", {"q_proj": "int8-g32"})
    assert check(verify(out, "vllm"), "fused shards").verdict == FAILED
    assert check(verify(out), "fused shards").verdict == OK
    out = mixed(tmp_path / "b", {"_proj": "nvfp4"})
    found = check(verify(out, "vllm"), "fused shards")
    assert found.verdict == WARNING and "outer scales" in found.detail


def test_the_command(sound: tuple[Path, Path], tmp_path: Path) -> None:
    original, out = sound
    done = CliRunner().invoke(app, ["verify", str(out), "--source", str(original), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["passed"] and said["verdicts"]["ok"] >= 10
    failed = CliRunner().invoke(app, ["verify", str(out), "--runtime", "llama.cpp"])
    assert failed.exit_code == 1 and "reads no compressed-tensors" in failed.stdout
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "absent")]).exit_code == 2
    with pytest.raises(BadInput, match=r"runtime 'tgi'.*vllm"):
        verify(out, "tgi")
