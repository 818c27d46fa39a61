"""fewbits convert: lossless where the formats agree, refused or accounted for where they do not, never half done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runtime_models import block_linears, quantized_weights, tiny_llama, write_quantized
from typer.testing import CliRunner

from fewbits.checkpoints.codecs import quantized_modules
from fewbits.checkpoints.source import open_source
from fewbits.cli.main import app
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import parse_format
from fewbits.pipeline.convert import RECORD, convert, targets


def checkpoint(folder: Path, kind: str, name: str, dtype: torch.dtype = torch.float16) -> Path:
    model = tiny_llama(intermediate_size=192)
    weights = quantized_weights(model, parse_format(name).with_scale_dtype(dtype))
    return write_quantized(folder, model, weights, kind=kind)


def values(directory: Path) -> dict[str, torch.Tensor]:
    modules = quantized_modules(open_source(directory, allow_quantized=True))
    return {name: modules.dense(name) for name in modules.entries}


def stored_bytes(directory: Path) -> dict[str, torch.Tensor]:
    source = open_source(directory, allow_quantized=True)
    return {name: source.tensor(name) for name in source.names()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "name", "to"),
    [
        ("gptq", "int4-g32", "compressed-tensors"),
        ("gptq", "int4-g32", "awq"),
        ("gptq_v2", "int4-asym-g32", "awq"),
        ("awq", "int4-asym-g32", "compressed-tensors"),
        ("compressed-tensors", "int8-g32", "gptq"),
        ("bitsandbytes", "nf4-g64-dq", "native"),
        ("native", "fp4_bnb-g64", "bitsandbytes"),
        ("gptq", "int3-g32", "native"),
    ],
)
def test_lossless_there_and_back(tmp_path: Path, kind: str, name: str, to: str) -> None:
    first = checkpoint(tmp_path / "first", kind, name)
    done = convert(first, to, tmp_path / "second", shard_bytes=20_000)
    assert set(done.actions) == {"lossless"} and len(done.layers) == len(block_linears(tiny_llama()))
    assert equal(values(first), values(tmp_path / "second"))
    assert (tmp_path / "second" / "model.safetensors.index.json").exists() and (tmp_path / "second" / RECORD).exists()
    convert(tmp_path / "second", kind, tmp_path / "third")
    assert equal(stored_bytes(first), stored_bytes(tmp_path / "third"))


def test_refused_without_a_trace_then_requantized(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", "gptq", "int4-g32")
    with pytest.raises(Unsupported, match=r"down_proj.*bitsandbytes cannot hold it.*--requantize"):
        convert(first, "bitsandbytes", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    done = convert(first, "bitsandbytes", tmp_path / "out", requantize=True)
    assert set(done.actions) == {"requantized"}
    before, after = values(first), values(tmp_path / "out")
    for layer in done.layers:
        error = (after[layer.name] - before[layer.name]).square().sum() / before[layer.name].square().sum()
        assert layer.sqnr_db is not None and layer.sqnr_db == pytest.approx(-10 * float(error.log10()), abs=0.1)
        assert 10 < layer.sqnr_db < 40


def test_scales_of_another_dtype_keep_their_codes(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", "compressed-tensors", "int4-g32", torch.float32)
    done = convert(first, "gptq", tmp_path / "out", requantize=True)
    assert set(done.actions) == {"rescaled"} and all(layer.sqnr_db and layer.sqnr_db > 60 for layer in done.layers)


def test_bfloat16_scales_that_float16_can_say_are_lossless(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", "compressed-tensors", "int4-g32", torch.bfloat16)
    done = convert(first, "awq", tmp_path / "out")
    assert set(done.actions) == {"lossless"} and equal(values(first), values(tmp_path / "out"))


def test_dense(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", "awq", "int4-asym-g32")
    done = convert(first, "dense", tmp_path / "out", dtype=torch.float32)
    assert set(done.actions) == {"decoded"} and all(layer.sqnr_db is None for layer in done.layers)
    dense = open_source(tmp_path / "out")
    assert all(torch.equal(dense.tensor(f"{name}.weight"), value) for name, value in values(first).items())


def test_what_it_does_not_start(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", "awq", "int4-asym-g32")
    with pytest.raises(BadInput, match="exists and holds something else"):
        convert(first, "gptq", first)
    with pytest.raises(BadInput, match="gptq"):
        convert(first, "gtpq", tmp_path / "out")
    shutil.copytree(first, tmp_path / "mute", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(BadInput, match="tokenizer cannot be loaded"):
        convert(tmp_path / "mute", "gptq", tmp_path / "out", progress=lambda event: pytest.fail(str(event)))
    tiny_llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(BadInput, match="nothing in it is quantized"):
        convert(tmp_path / "plain", "gptq", tmp_path / "out")
    assert "dense" in targets() and not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", "gptq", "int4-g32")
    result = CliRunner().invoke(app, ["convert", str(first), "--to", "awq", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and "lossless" in result.output, result.output
    again = ["convert", str(first), "--to", "bitsandbytes", "-o", str(tmp_path / "bnb")]
    assert CliRunner().invoke(app, again).exit_code == 2
    result = CliRunner().invoke(app, [*again, "--requantize", "--json"])
    assert json.loads(result.stdout)["actions"] == {"requantized": 14}
