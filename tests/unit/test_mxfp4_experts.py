"""gpt-oss in MXFP4: what is written loads in transformers with the same weights; no way there loses anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import checkpoint, stored_bytes, values
from tiny_runtime_models import saved, tiny_llama

from fewbits.checkpoints.codecs import CODECS, Stored, quantized_modules
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.evaluation.verification.checks import OK
from fewbits.evaluation.verification.verify import verify
from fewbits.formats import parse_format
from fewbits.pipeline.convert import convert
from fewbits.pipeline.quantize import quantize
from fewbits.runtime.load import load_all

EXPERTS, BLOCKS = 3, 2


def tiny_gpt_oss():
    return tiny_llama(
        model_type="gpt_oss", num_local_experts=EXPERTS, num_experts_per_tok=2, tied=False, hidden_size=64,
        intermediate_size=96, layers=BLOCKS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As OpenAI's: random codes, minus zero not among them, and scales of a random model."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    saved(tiny_gpt_oss().bfloat16(), folder)
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if tensors[name].dim() == 3]:
        count, columns, rows = tensors.pop(name).shape
        low, high = torch.randint(0, 15, (2, count, rows, columns // 32, 16), generator=draw).to(torch.uint8)
        low, high = low + (low >= 8), high + (high >= 8)
        tensors[f"{name}_blocks"] = low | high << 4
        tensors[f"{name}_scales"] = torch.randint(118, 125, (count, rows, columns // 32), generator=draw).to(
            torch.uint8
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = CODECS.get("mxfp4").quantization({}, [])["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_transformers(directory: Path):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()


def expert_weights(directory: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """As transformers holds them."""
    return {
        name: value for name, value in load_all(directory, dtype=dtype).model.named_parameters()
        if "experts" in name
    }  # fmt: skip


@pytest.mark.parametrize("through", ["native", "compressed-tensors", "mxfp4"])
def test_there_and_back(tmp_path: Path, original: Path, through: str) -> None:
    done = convert(original, through, tmp_path / "there", shard_bytes=20_000)
    assert set(done.actions) == {"lossless"} and len(done.layers) == BLOCKS * EXPERTS * 3
    back = convert(tmp_path / "there", "mxfp4", tmp_path / "back")
    assert set(back.actions) == {"lossless"}
    before, after = stored_bytes(original), stored_bytes(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", original))
    assert {key: config[key] for key in before} == before


def test_transformers_decodes_the_same_weights(tmp_path: Path, original: Path) -> None:
    convert(original, "native", tmp_path / "native")
    convert(tmp_path / "native", "mxfp4", tmp_path / "out")
    theirs = dict(by_transformers(tmp_path / "out").named_parameters())
    ours = expert_weights(tmp_path / "out")
    assert len(ours) == 4 * BLOCKS and all(torch.equal(theirs[name], value) for name, value in ours.items())
    assert all(torch.equal(value, ours[name]) for name, value in expert_weights(tmp_path / "native").items())


def test_dense_is_as_transformers_stores_it(tmp_path: Path, original: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert(original, "dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    theirs = dict(by_transformers(original).named_parameters())
    assert all(torch.equal(theirs[name], value) for name, value in dense.named_parameters())


def apart(directory: Path) -> None:
    """Gives each expert's linears biases of their own, as llm-compressor writes gpt-oss."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj_bias")]:
        owner, value = name.rpartition(".")[0], tensors.pop(name)
        pieces = {"gate_proj": value[:, ::2], "up_proj": value[:, 1::2]} if "gate_up" in name else {"down_proj": value}
        for piece, biases in pieces.items():
            for expert, bias in enumerate(biases):
                tensors[f"{owner}.{expert}.{piece}.bias"] = bias.contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_biases_of_experts_apart_are_put_together(tmp_path: Path, original: Path) -> None:
    convert(original, "compressed-tensors", tmp_path / "apart")
    apart(tmp_path / "apart")
    convert(tmp_path / "apart", "mxfp4", tmp_path / "back")
    before, after = stored_bytes(original), stored_bytes(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_quantized_attention_becomes_dense(tmp_path: Path, original: Path) -> None:
    """The layout is for experts alone: what else is quantized must be a number of the dense dtype."""
    convert(original, "native", tmp_path / "more")
    folder, name = tmp_path / "more", "model.layers.0.self_attn.q_proj"
    for format, exact in (("mxfp4", True), ("int4-g32", False)):
        tensors = load_file(tmp_path / "more" / "model.safetensors")
        value = stored_bytes(original)[f"{name}.weight"].float()
        weight = parse_format(format).with_scale_dtype(torch.bfloat16).quantize(value)
        layer = Stored(format=weight.format, shape=weight.shape, state=weight.to_state()).layer
        entry = CODECS.get("native").quantization({name: layer}, [])["quantization_config"]["modules"]
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.") or "bias" in key}
        tensors |= {f"{name}.{part}": tensor for part, tensor in weight.to_state().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["modules"] |= entry
        (folder / "config.json").write_text(json.dumps(config))
        if not exact:
            with pytest.raises(Unsupported, match=r"q_proj: mxfp4 has it dense.*--dtype float32"):
                convert(folder, "mxfp4", tmp_path / format)
        done = convert(folder, "mxfp4", tmp_path / format, dtype=torch.bfloat16 if exact else torch.float32)
        assert done.actions["decoded"] == 1 and done.actions["lossless"] == BLOCKS * EXPERTS * 3
        dense = open_source(tmp_path / format, allow_quantized=True).tensor(f"{name}.weight")
        assert torch.equal(dense.float(), weight.dequantize())


def test_what_is_not_on_its_grid_is_rounded_on_demand(tmp_path: Path, original: Path) -> None:
    convert(original, "gptq", tmp_path / "int4", requantize=True)
    with pytest.raises(Unsupported, match=r"experts\.0\.down_proj: mxfp4 cannot hold it.*are MXFP4.*--requantize"):
        convert(tmp_path / "int4", "mxfp4", tmp_path / "out")
    done = convert(tmp_path / "int4", "mxfp4", tmp_path / "out", requantize=True)
    assert done.actions == {"requantized": BLOCKS * EXPERTS * 3}
    assert all(layer.sqnr_db is not None and layer.sqnr_db > 10 for layer in done.layers)
    after = values(tmp_path / "out")
    layer = done.layers[-1]
    before = values(tmp_path / "int4")[layer.name]
    error = (after[layer.name] - before).square().sum() / before.square().sum()
    assert layer.sqnr_db == pytest.approx(-10 * float(error.log10()), abs=0.1)


def test_other_models_are_refused(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", "compressed-tensors", "mxfp4")
    with pytest.raises(
        Unsupported, match=r"cannot become mxfp4: it is the layout of gpt-oss's.* a llama model; choose"
    ):
        convert(first, "mxfp4", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_mlx_wants_gpt_oss_in_its_own_layout(tmp_path: Path, original: Path) -> None:
    with pytest.raises(Unsupported, match=r"cannot become mlx: mlx-lm reads gpt-oss's experts in .* mxfp4"):
        convert(original, "mlx", tmp_path / "out")


def test_an_expert_that_is_missing_is_named(tmp_path: Path, original: Path) -> None:
    convert(original, "native", tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    del config["quantization_config"]["modules"]["model.layers.1.mlp.experts.1.up_proj"]
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"1\.mlp\.experts\.1\.up_proj is not among the quantized layers"):
        convert(tmp_path / "native", "mxfp4", tmp_path / "out")


def test_damage_is_named(tmp_path: Path, original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    for change, told in (
        ({f"{name}_scales": torch.full_like(tensors[f"{name}_scales"], 255)}, "NaN"),
        ({f"{name}_scales": tensors[f"{name}_scales"][:, :-1].contiguous()}, "are no MXFP4"),
        ({f"{name}_blocks": tensors[f"{name}_blocks"][..., 0].contiguous()}, r"\[experts, rows, blocks, 16\]"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for path in original.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        save_file({**tensors, **change}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadInput, match=told):
            modules = quantized_modules(open_source(folder, allow_quantized=True))
            modules.read(f"{name.removesuffix('.down_proj')}.0.down_proj")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_gpt_oss().bfloat16(), tmp_path_factory.mktemp("dense"))


SMALL = {"samples": 4, "sequence_length": 32, "eval_samples": 1}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_writes_it(tmp_path: Path, dense: Path, method: str) -> None:
    quantize(dense, "mxfp4", method=method, checkpoint_format="mxfp4", out=tmp_path / "out", **SMALL)
    before, after = stored_bytes(dense), stored_bytes(tmp_path / "out")
    blocks = {name for name in after if name.endswith(("_blocks", "_scales"))}
    assert (
        len(blocks) == 2 * 2 * BLOCKS and {name.rpartition("_")[0] for name in blocks} == before.keys() - after.keys()
    )
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - blocks)
    theirs, ours = dict(by_transformers(tmp_path / "out").named_parameters()), expert_weights(tmp_path / "out")
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    for name in before.keys() - after.keys():
        error = (ours[name].float() - before[name].float()).square().sum() / before[name].float().square().sum()
        assert 0.003 < error < 0.06
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    actions = {entry["name"]: entry["action"] for entry in certificate["tensors"]}
    assert {name for name, action in actions.items() if action == "quantized"} == before.keys() - after.keys()


def test_quantizing_what_was_decoded_gives_the_same_weights(tmp_path: Path, original: Path) -> None:
    """Scales may differ where a block has no large code, values may not."""
    convert(original, "dense", tmp_path / "dense")
    quantize(tmp_path / "dense", "mxfp4", method="rtn", checkpoint_format="mxfp4", out=tmp_path / "out", **SMALL)
    before, after = expert_weights(original), expert_weights(tmp_path / "out")
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_experts_of_other_formats_go_to_native(tmp_path: Path, dense: Path) -> None:
    quantize(dense, "int4-g32", method="rtn", out=tmp_path / "out", **SMALL)
    loaded = load_all(tmp_path / "out")
    assert len(loaded.decoded) == BLOCKS * EXPERTS * 3 and len(loaded.quantized) == BLOCKS * 4
    convert(tmp_path / "out", "dense", tmp_path / "decoded", dtype=torch.float32)
    before, after = (expert_weights(tmp_path / name, torch.float32) for name in ("out", "decoded"))
    assert len(after) == 4 * BLOCKS and all(torch.equal(before[name], value) for name, value in after.items())


def test_what_quantize_does_not_write(tmp_path: Path, dense: Path) -> None:
    given = {"method": "rtn", "checkpoint_format": "mxfp4", "out": tmp_path / "out", **SMALL}
    with pytest.raises(Unsupported, match=r"int4-g32.*gpt-oss's experts are MXFP4.*--scheme mxfp4"):
        quantize(dense, "int4-g32", **given)
    with pytest.raises(Unsupported, match=r"no entry for .*--scheme mxfp4"):
        quantize(dense, "mxfp4/mxfp4", **given)
    with pytest.raises(Unsupported, match=r"layers\.1\.mlp\.experts\.\w+ stays dense"):
        quantize(dense, "mxfp4", ignore=["re:.*layers.1.*"], **given)
    with pytest.raises(BadInput, match=r"gate_up_proj holds 3 experts, and 2 are to be quantized"):
        quantize(dense, "mxfp4", ignore=["re:.*experts.2.(gate|up)_proj"], **given)
    saved(tiny_llama(), tmp_path / "llama")
    with pytest.raises(Unsupported, match="layout of gpt-oss's experts, and this is a llama model"):
        quantize(tmp_path / "llama", "mxfp4", **given)
    with pytest.raises(Unsupported, match="compressed-tensors cannot say experts that share a tensor"):
        quantize(dense, "mxfp4", **{**given, "checkpoint_format": "compressed-tensors"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_verify_passes_it_and_runs_it(original: Path) -> None:
    found = verify(original, "transformers")
    verdicts = {check.name: (check.verdict, check.detail) for check in found.checks}
    assert found.passed and verdicts["runs in transformers"][0] == OK
    assert verdicts["ignore names"] == (OK, "18 modules quantized, 4 patterns of what is not")
    assert verdicts["experts"] == (OK, f"{EXPERTS} a block, all alike")
