"""GGUF files written here: read back by us and by gguf's own reader; what they cannot say is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_runtime_models import byte_tokenizer, quantized_weights, tiny_llama
from tiny_tokenizers import TEXTS, byte_level, sentencepiece, unigram
from tokenizers import normalizers

from fewbits import quantize
from fewbits.checkpoints.gguf import GGUFFile
from fewbits.checkpoints.gguf_exact import exact_type
from fewbits.checkpoints.gguf_export import Packed, packed_modules, rotary_order, write_gguf
from fewbits.checkpoints.gguf_pretokenizers import RULES, WHOLE_TOKENS_FIRST
from fewbits.checkpoints.gguf_source import GGUFSource, undo_rotary_order
from fewbits.checkpoints.gguf_write import KINDS, Entry, write_gguf_file
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import parse_format
from fewbits.models.skeleton import load_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0 + number / 4 for number in range(8)],
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {"tied": False, "rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "tied": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "phi3": {"model_type": "phi3", "pad_token_id": None, "tied": False},
    "phi3-long": {
        "model_type": "phi3",
        "pad_token_id": None,
        "tied": False,
        "rope_parameters": LONG,
        "original_max_position_embeddings": 64,
    },
    "gemma": {"model_type": "gemma"},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 16, "layers": 6},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.125,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "smollm3": {"model_type": "smollm3", "layers": 5, "pad_token_id": None},
    "olmo2": {"model_type": "olmo2", "tied": False},
    "olmoe": {
        "model_type": "olmoe",
        "tied": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "tied": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
    },
}
WIDE = {"intermediate_size": 256, "vocab_size": 258}
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
TABLES = ("iq4_nl", "tq1_0", "tq2_0", "mxfp4")


def saved(directory: Path, tokenizer: Any = None, **changes: Any) -> tuple[torch.nn.Module, Any]:
    model = tiny_llama(**changes)
    model.save_pretrained(directory)
    (tokenizer or byte_tokenizer()).save_pretrained(directory)
    return model, open_source(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    model, source = saved(tmp_path / "m", **FAMILIES[family])
    written = write_gguf(source, tmp_path / "m.gguf")
    assert all(entry.lossless for entry in written if not entry.stored.endswith("norm.weight"))
    again = open_source(tmp_path / "m.gguf")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.allclose(load_model(again)(ids).logits, model(ids).logits, atol=1e-5)
    assert again.config()["tie_word_embeddings"] == model.config.tie_word_embeddings
    assert again.load_tokenizer()("Hello wörld").input_ids == byte_tokenizer()("Hello wörld").input_ids


@pytest.mark.parametrize("name", [*TYPES, *TABLES])
def test_every_type_is_written_and_says_what_its_format_says(name: str, tmp_path: Path) -> None:
    _, source = saved(tmp_path / "m", hidden_size=256, head_dim=64, layers=1, **WIDE)
    written = write_gguf(source, tmp_path / "m.gguf", weights=name, dense="F32")
    again = open_source(tmp_path / "m.gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for entry in written:
        if entry.kind != name.upper():
            continue
        weight = source.tensor(entry.name)
        expected = parse_format(name).quantize(weight).dequantize()
        assert torch.equal(again.tensor(entry.name), expected)
        tensor = theirs[entry.stored]
        decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        ordered = "attn_q." in entry.stored or "attn_k." in entry.stored
        heads = 4 if "attn_q" in entry.stored else 2
        assert torch.equal(undo_rotary_order(decoded, heads) if ordered else decoded, expected)
        assert not entry.lossless and 0 < entry.error < 0.6
    assert sum(entry.kind == name.upper() for entry in written) == 7


EXACT = {
    "int4-g32": "q4_0",
    "int4-g128": "q4_0",
    "int4-channel": "q4_0",
    "int4-tensor": "q4_0",
    "int3-g64": "q4_0",
    "int5-g64": "q5_0",
    "int8-channel": "q8_0",
    "int4-asym-g64": "q5_0",
    "int3-asym-g64": "q4_0",
    "int7-asym-g64": "q8_0",
    "int4-min-g32": "q4_1",
    "int5-min-g64": "q5_1",
    "ternary-g256": "tq2_0",
    "ternary-g64": "q4_0",
    "mxfp4": "mxfp4",
    **{name: name for name in (*TYPES, *TABLES)},
}


@pytest.mark.parametrize("name", EXACT)
def test_codes_go_over_without_a_change(name: str, tmp_path: Path) -> None:
    model, source = saved(tmp_path / "m", hidden_size=256, head_dim=64, layers=1, **WIDE)
    format = parse_format(name).with_scale_dtype(torch.float16)
    weights = quantized_weights(model, format)
    modules = {
        module: Packed(format=weight.format, shape=weight.shape, read=lambda weight=weight: weight)
        for module, weight in weights.items()
    }
    written = write_gguf(source, tmp_path / "m.gguf", modules)
    assert {entry.kind for entry in written if entry.quantized} == {EXACT[name].upper()}
    assert all(entry.lossless and entry.error == 0 for entry in written)
    again = open_source(tmp_path / "m.gguf")
    for module, weight in weights.items():
        assert torch.equal(again.tensor(f"{module}.weight"), weight.dequantize())
    assert isinstance(again, GGUFSource)
    packed = packed_modules(again)
    assert packed.keys() == weights.keys()
    for module, found in packed.items():
        assert torch.equal(found.read().dequantize(), weights[module].dequantize())
        if EXACT[name] == name:
            assert torch.equal(found.read().codes, weights[module].codes)


@pytest.mark.parametrize("name", ["nf4-g64", "fp8_e4m3-channel", "int4-g16", "fp4_e2m1-g16", "int8-asym-g64", "nvfp4"])
def test_values_no_type_holds_are_refused_or_quantized_again(name: str, tmp_path: Path) -> None:
    model, source = saved(tmp_path / "m", layers=1)
    format = parse_format(name).with_scale_dtype(torch.float16)
    assert exact_type(format, (64, 64)) is None
    modules = {
        module: Packed(format=weight.format, shape=weight.shape, read=lambda weight=weight: weight)
        for module, weight in quantized_weights(model, format).items()
    }
    with pytest.raises(Unsupported, match=f"{name.split('-')[0]}.*no GGUF type.*q4_k"):
        write_gguf(source, tmp_path / "m.gguf", modules)
    assert not (tmp_path / "m.gguf").exists()
    written = write_gguf(source, tmp_path / "m.gguf", modules, weights="q8_0")
    again = [entry for entry in written if entry.quantized]
    assert all(not entry.lossless and 0 < entry.error < 0.01 for entry in again)


def test_a_scale_that_fp16_lacks_is_refused_by_name(tmp_path: Path) -> None:
    model, source = saved(tmp_path / "m", layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-7)
    weights = quantized_weights(model, parse_format("int4-g64").with_scale_dtype(torch.bfloat16))
    modules = {
        module: Packed(format=weight.format, shape=weight.shape, read=lambda weight=weight: weight)
        for module, weight in weights.items()
    }
    with pytest.raises(Unsupported, match=r"up_proj.*no fp16 numbers"):
        write_gguf(source, tmp_path / "m.gguf", modules)
    assert list(tmp_path.glob("*.gguf*")) == []


def test_fallback_types_are_llama_cpps_and_are_told(tmp_path: Path) -> None:
    _, source = saved(tmp_path / "m", hidden_size=64, intermediate_size=256, layers=1)
    written = {entry.name: entry for entry in write_gguf(source, tmp_path / "m.gguf", weights="q4_k")}
    down = written["model.layers.0.mlp.down_proj.weight"]
    up = written["model.layers.0.mlp.up_proj.weight"]
    assert (down.kind, down.note) == ("Q4_K", "")
    assert (up.kind, up.note) == ("Q5_0", "rows of 64 are not whole q4_k blocks")


TOKENIZERS = {
    "gpt-2": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece without a first blank": lambda: sentencepiece(prefix=False),
    "unigram": unigram,
    **{
        name: lambda name=name, rule=rule: byte_level(rule, whole=name in WHOLE_TOKENS_FIRST)
        for name, (rule, *more) in RULES.items()
        if not more and name != "gpt-2"
    },
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_come_back(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    _, source = saved(tmp_path / "m", tokenizer, layers=1, vocab_size=len(tokenizer) + 3)
    write_gguf(source, tmp_path / "m.gguf")
    again = open_source(tmp_path / "m.gguf").load_tokenizer()
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if kind != "unigram":
            assert again.decode(ids) == tokenizer.decode(ids)
    twice = GGUFSource(str(tmp_path / "m.gguf"))
    write_gguf(twice, tmp_path / "twice.gguf")
    assert GGUFFile(tmp_path / "twice.gguf").metadata == twice.file.metadata | {"general.name": "m"}


def test_tokenizers_llama_cpp_cannot_follow_are_refused(tmp_path: Path) -> None:
    odd = byte_level(r"[a-z]+|.")
    _, source = saved(tmp_path / "a", odd, layers=1, vocab_size=len(odd))
    with pytest.raises(Unsupported, match=r"\[a-z\]\+.*no name"):
        write_gguf(source, tmp_path / "m.gguf")
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    _, source = saved(tmp_path / "b", lower, layers=1, vocab_size=len(lower))
    with pytest.raises(Unsupported, match="Lowercase"):
        write_gguf(source, tmp_path / "m.gguf")
    whole = byte_level(RULES["qwen2"][0], whole=True)
    _, source = saved(tmp_path / "c", whole, layers=1, vocab_size=len(whole))
    with pytest.raises(Unsupported, match="whole words"):
        write_gguf(source, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "seed_oss"}, "seed_oss is not llama"),
        ({"model_type": "starcoder2"}, "no GGUF table"),
        ({"model_type": "olmo2", "tied": True}, "tie_word_embeddings"),
        ({"model_type": "smollm3", "pad_token_id": None, "no_rope_layer_interval": 2}, "no_rope_layer_interval"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 24}, "query_pre_attn_scalar"),
        ({"model_type": "qwen3", "rope_parameters": LLAMA3}, "llama3.* for llama, not qwen3|Llama 3"),
    ],
)
def test_models_llama_cpp_computes_otherwise_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, source = saved(tmp_path / "m", layers=1, **changes)
    with pytest.raises(Unsupported, match=message):
        write_gguf(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_rotary_order_is_undone() -> None:
    rows = torch.randn(16, 3)
    assert torch.equal(undo_rotary_order(rotary_order(rows, 2), 2), rows)


def entry(**changes: Any) -> Entry:
    fields = {
        "name": "w",
        "kind": KINDS["F32"],
        "shape": (2, 4),
        "provider": lambda: torch.zeros(32, dtype=torch.uint8),
    }
    return Entry(**{**fields, **changes})


@pytest.mark.parametrize(
    ("metadata", "entries", "message"),
    [
        ({}, [entry(), entry()], "taken"),
        ({}, [entry(name="n" * 64)], "63 bytes"),
        ({}, [entry(shape=(1, 1, 1, 1, 1))], "dimensions"),
        ({}, [entry(kind=KINDS["Q4_0"])], "whole Q4_0 blocks"),
        ({"a": -1}, [], "cannot hold -1"),
        ({"a": float("nan")}, [], "cannot hold nan"),
    ],
)
def test_what_a_file_cannot_hold(metadata: dict[str, Any], entries: list[Entry], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        write_gguf_file(tmp_path / "m.gguf", metadata, entries)
    assert list(tmp_path.iterdir()) == []


def test_quantize_writes_a_directory_with_one_file(tmp_path: Path) -> None:
    saved(tmp_path / "m", hidden_size=64, intermediate_size=256)
    out = quantize(
        tmp_path / "m", "q4_k", out=tmp_path / "q", checkpoint_format="gguf", method="awq,gptq", samples=4,
        sequence_length=32, eval_samples=0,
    )  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "certificate.json", "model.gguf"]
    source = open_source(out)
    kinds = {source.info(name).stored for name in source.names()}
    assert kinds == {"F32", "Q4_K", "Q5_0"}
    with torch.no_grad():
        assert load_model(source)(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("W8A8", "nothing of activations"), ("nf4-g64", "no GGUF type"), ("int4-g16", "multiple of 32")],
)
def test_quantize_refuses_what_gguf_cannot_say(scheme: str, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "m")
    with pytest.raises(Unsupported, match=message):
        quantize(tmp_path / "m", scheme, out=tmp_path / "q", checkpoint_format="gguf", method="rtn", eval_samples=0)
    assert not (tmp_path / "q").exists()
