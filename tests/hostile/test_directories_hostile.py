"""Model directories with a broken config.json, index or tokenizer: loaded, or refused at once and cheaply."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import attempt, first_fast, refused
from tiny_runtime_models import saved, tiny_llama
from tiny_tokenizers import sentencepiece

from fewbits.checkpoints.source import open_source
from fewbits.models.skeleton import load_model
from fewbits.runtime.load import load_all

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 16},
    "phi3": {"model_type": "phi3", "pad_token_id": None},
}
VALUES: list[Any] = [
    None, -1, 0, 7, 2**20, 2**31, 2**62, 2**64, 1e308, "x" * 10_000, "../../etc/passwd", [], [1, "a"], {},
]  # fmt: skip


@pytest.fixture(scope="module", params=first_fast(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sound directory of each family, loaded once so that imports are not counted."""
    directory = tmp_path_factory.mktemp(request.param)
    saved(tiny_llama(layers=1, **FAMILIES[request.param]), directory)
    load_all(directory)
    yield directory
    shutil.rmtree(directory)


def run(directory: Path) -> None:
    source = open_source(directory, allow_quantized=True)
    built = load_model(source)
    with torch.no_grad():
        for parameter in built.parameters():
            assert parameter.device.type == "cpu"


@pytest.mark.parametrize("value", VALUES, ids=[f"{index}-{str(value)[:12]}" for index, value in enumerate(VALUES)])
def test_broken_configurations(model: Path, value: Any) -> None:
    path = model / "config.json"
    text = path.read_text()
    try:
        for key in json.loads(text):
            path.write_text(json.dumps({**json.loads(text), key: value}))
            attempt(lambda: run(model))
    finally:
        path.write_text(text)


@pytest.mark.parametrize("value", [None, -1, 0, 2**62, 1e308, "linear", [], {}])
def test_broken_rotary_parameters(model: Path, value: Any) -> None:
    path = model / "config.json"
    text = path.read_text()
    rope = json.loads(text)["rope_parameters"]
    keys = ["rope_type", "rope_theta", "factor", "long_factor", "original_max_position_embeddings", "full_attention"]
    try:
        for key in keys:
            path.write_text(json.dumps({**json.loads(text), "rope_parameters": {**rope, key: value}}))
            attempt(lambda: run(model))
    finally:
        path.write_text(text)


HUGE = b'{"a":' * 200_000
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"1",
    "cut": b'{"model_type": "llama", ',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NUL bytes": bytes(1000),
    "a million brackets": b"[" * 1_000_000,
    "deep objects": HUGE,
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "NaN": b'{"hidden_size": NaN}',
    "duplicate": b'{"model_type": "llama", "model_type": "gpt2"}',
    "60 MB of blanks": b"{" + b" " * 60_000_000 + b"}",
    "70 MB": b"{" + b" " * 70_000_000 + b"}",
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    directory = tmp_path / "m"
    return saved(tiny_llama(layers=1), directory)


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(plain: Path, name: str, case: str) -> None:
    if name.startswith("model"):
        (plain / "model.safetensors").rename(plain / "model-00001-of-00001.safetensors")
    (plain / name).write_bytes(TEXTS[case])
    refused(lambda: run(plain))


def test_a_class_from_the_file_is_never_loaded(plain: Path) -> None:
    (plain / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    config = json.loads((plain / "config.json").read_text())
    config |= {"auto_map": {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}}
    config |= {"trust_remote_code": True, "custom_pipelines": {"x": {"impl": "evil.Evil"}}}
    (plain / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((plain / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "trust_remote_code": True}
    (plain / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    attempt(lambda: load_all(plain))
    config["model_type"] = "evil"
    (plain / "config.json").write_text(json.dumps(config))
    refused(lambda: load_all(plain))


SHARDS: dict[str, Any] = {
    "..": "../model.safetensors",
    "absolute": "/etc/passwd.safetensors",
    "a folder": "sub/model.safetensors",
    "backslash": "..\\model.safetensors",
    "NUL": "a\0.safetensors",
    "hidden": ".model.safetensors",
    "a pickle": "model.bin",
    "the index itself": "model.safetensors.index.json",
    "empty": "",
    "a number": 7,
    "a list": ["model.safetensors"],
    "very long": "m" * 5000 + ".safetensors",
    "absent": "other.safetensors",
    "a URL": "https://example.org/model.safetensors",
}


@pytest.mark.parametrize("case", SHARDS)
def test_shard_names(plain: Path, case: str) -> None:
    (plain / "model.safetensors").rename(plain / "model-00001-of-00001.safetensors")
    weight_map = {"lm_head.weight": SHARDS[case]}
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(lambda: run(plain))


@pytest.mark.parametrize("kind", ["loop", "folder", "dangling", "fifo"])
def test_shards_that_are_no_files(plain: Path, kind: str) -> None:
    import os

    shard = plain / "model.safetensors"
    shard.unlink()
    if kind == "loop":
        shard.symlink_to(shard.name)
    elif kind == "folder":
        shard.mkdir()
    elif kind == "fifo":
        os.mkfifo(shard)
    else:
        shard.symlink_to("nowhere")
    refused(lambda: run(plain))


TOKENIZERS: dict[str, Any] = {
    **{f"text: {name}": text for name, text in TEXTS.items() if not name.endswith("blanks")},
    "no model": {"model": None},
    "unknown model": {"model": {"type": "Evil", "vocab": {}, "merges": []}},
    "vocabulary of numbers": {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
    "negative id": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "huge id": {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}},
    "id 2^64": {"model": {"type": "BPE", "vocab": {"a": 2**64}, "merges": []}},
    "a merge of three": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b a"]}},
    "a merge of unknown tokens": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}},
    "merges are numbers": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1, 2]}},
    "a regular expression that is none": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    },
    "unknown normalizer": {"normalizer": {"type": "Exec", "code": "1"}},
    "a map of characters that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "added token without text": {"added_tokens": [{"id": 5}]},
    "added token of id 2^31": {
        "added_tokens": [
            {"id": 2**31, "content": "<x>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_broken_tokenizers(plain: Path, case: str) -> None:
    path = plain / "tokenizer.json"
    change = TOKENIZERS[case]
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    attempt(lambda: open_source(plain).load_tokenizer())


@pytest.mark.parametrize("value", [None, 0, -1, 2**62, [], {}, "x" * 10_000, {"__type": "AddedToken"}, "../../x"])
def test_broken_tokenizer_settings(tmp_path: Path, value: Any) -> None:
    tiny_llama(layers=1, vocab_size=500).save_pretrained(tmp_path)
    sentencepiece().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    text = path.read_text()
    for key in [*json.loads(text), "chat_template", "added_tokens_decoder", "auto_map", "model_max_length"]:
        path.write_text(json.dumps({**json.loads(text), key: value}))
        attempt(lambda: open_source(tmp_path).load_tokenizer())
