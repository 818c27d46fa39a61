"""Every parser on inputs that hypothesis makes up: near to what is valid, or far from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import attempt
from test_codecs_hostile import Broken, fixtures
from tiny_runtime_models import saved, tiny_llama

from fewbits.checkpoints.base import parse_json
from fewbits.checkpoints.codecs import CODECS
from fewbits.checkpoints.gguf_tokenizer import build_tokenizer
from fewbits.checkpoints.native import read_modules
from fewbits.checkpoints.safetensors_file import DTYPES, SafetensorsFile
from fewbits.checkpoints.source import open_source
from fewbits.formats import parse_format
from fewbits.models.skeleton import load_model
from fewbits.pipeline.journal import read_json
from fewbits.planner.plan import read_plan

FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
NUMBERS = st.one_of(
    st.integers(-2, 300), st.sampled_from([2**31, 2**32 - 1, 2**62, 2**63, 2**64]), st.floats(allow_nan=True)
)
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
ANYTHING = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@FUZZ
@given(st.binary(max_size=400))
def test_json_of_any_bytes(raw: bytes) -> None:
    attempt(lambda: parse_json(raw, "fuzz"))


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F128", "", None]) | ATOMS,
        "shape": st.lists(st.integers(-1, 5) | NUMBERS, max_size=3) | ANYTHING,
        "data_offsets": st.lists(st.integers(0, 64) | NUMBERS, min_size=2, max_size=2) | ANYTHING,
    }
)


@FUZZ
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRY | ANYTHING, max_size=3),
    st.binary(max_size=64),
)
def test_safetensors_headers(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    def read() -> None:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert tuple(file.tensor(name).shape) == info.shape

    attempt(read)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    saved(tiny_llama(layers=1), folder)
    load_model(open_source(folder)), open_source(folder).load_tokenizer()
    return folder


def changed(folder: Path, name: str, text: str, act: Any) -> None:
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    try:
        path.write_text(text)
        attempt(act)
    finally:
        path.unlink() if before is None else path.write_bytes(before)


CONFIG_KEYS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
               "rope_parameters", "layer_types", "quantization_config", "quantization", "dtype", "rms_norm_eps",
               "tie_word_embeddings", "architectures", "num_key_value_heads", "hidden_act")  # fmt: skip


@FUZZ
@given(st.dictionaries(st.sampled_from(CONFIG_KEYS), ANYTHING, min_size=1, max_size=3))
def test_configurations(directory: Path, change: dict[str, Any]) -> None:
    config = json.loads((directory / "config.json").read_text())

    def run() -> None:
        load_model(open_source(directory, allow_quantized=True))

    changed(directory, "config.json", json.dumps({**config, **change}), run)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["weight_map", "metadata"]), ANYTHING | st.dictionaries(st.text(), st.text(), max_size=3)
    )
)
def test_indices(directory: Path, index: dict[str, Any]) -> None:
    shard, kept = directory / "model.safetensors", directory / "kept"
    shard.rename(kept)
    try:
        changed(directory, "model.safetensors.index.json", json.dumps(index), lambda: open_source(directory))
    finally:
        kept.rename(shard)


@FUZZ
@given(st.data())
def test_tokenizers(directory: Path, data: st.DataObject) -> None:
    state = json.loads((directory / "tokenizer.json").read_text())
    part = data.draw(st.sampled_from([*state, "model.vocab", "model.merges", "model.type"]))
    value = data.draw(ANYTHING)
    if part.startswith("model."):
        state["model"][part.partition(".")[2]] = value
    else:
        state[part] = value
    changed(directory, "tokenizer.json", json.dumps(state), lambda: open_source(directory).load_tokenizer())


@FUZZ
@given(
    st.text(max_size=30) | st.from_regex(r"(int|fp|nf)[0-9_em]{0,4}(-(asym|g[0-9]{0,12}|channel|tile[0-9]+|dq|e8m0))*")
)
def test_format_names(name: str) -> None:
    attempt(lambda: parse_format(name))


MODULE = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["nf4-g64", "int4-g32", "q4_k", "int4-g0", "x", "int4-g8@25+int3-g8", "int4-g8@99+"])
        | ANYTHING,
        "shape": st.lists(NUMBERS, max_size=3) | ANYTHING,
        "scale_dtype": st.sampled_from(["float32", "bfloat16", "eval"]) | ANYTHING,
        "activations": st.sampled_from([None, "int8-token"]) | ANYTHING,
        "input_hadamard": st.lists(NUMBERS, max_size=3) | ANYTHING,
        "input_order": ANYTHING,
        "low_rank": ANYTHING,
        "outliers": ANYTHING,
    },
)


@FUZZ
@given(
    st.fixed_dictionaries(
        {
            "version": st.integers(0, 9) | ATOMS,
            "modules": st.dictionaries(st.text(max_size=4), MODULE, max_size=2) | ANYTHING,
        }
    )
)
def test_native_configurations(config: dict[str, Any]) -> None:
    attempt(lambda: read_modules(config))


@FUZZ
@given(st.data())
def test_quantization_settings_of_every_format(data: st.DataObject) -> None:
    file, case = data.draw(st.sampled_from([parameters.values for parameters in fixtures()]))
    source = Broken(file, case)
    about = source.settings.get("quantization_config") or source.settings["quantization"]
    name = data.draw(st.sampled_from([*about, "bits", "group_size", "modules", "config_groups", "dynamic"]))
    about[name] = data.draw(ANYTHING)
    attempt(source.decode)


@FUZZ
@given(st.data())
def test_tensors_of_every_format(data: st.DataObject) -> None:
    file, case = data.draw(st.sampled_from([parameters.values for parameters in fixtures()]))
    source = Broken(file, case)
    name = data.draw(st.sampled_from(source.names()))
    shape = data.draw(st.lists(st.integers(0, 70), max_size=3))
    dtype = data.draw(
        st.sampled_from([torch.int32, torch.int8, torch.uint8, torch.float16, torch.float32, torch.int64])
    )
    source.tensors[name] = torch.full(shape, data.draw(st.integers(0, 100)), dtype=dtype)
    attempt(source.decode)


@FUZZ
@given(st.sampled_from(CODECS.names()), ANYTHING)
def test_configurations_of_every_format(directory: Path, name: str, settings_: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    methods = {"native": "fewbits", "gptq_v2": "gptq"}
    quantization = {
        "quant_method": methods.get(name, name),
        **(settings_ if isinstance(settings_, dict) else {"x": settings_}),
    }

    def run() -> None:
        from fewbits.runtime.load import load_all

        load_all(directory)

    changed(directory, "config.json", json.dumps({**config, "quantization_config": quantization}), run)


WORDS = st.lists(st.text(max_size=6), max_size=20)


@FUZZ
@given(
    st.fixed_dictionaries(
        {"tokenizer.ggml.model": st.sampled_from(["gpt2", "llama", "t5", "bert", "x"]) | ATOMS},
        optional={
            "tokenizer.ggml.tokens": WORDS,
            "tokenizer.ggml.merges": WORDS | st.lists(st.just("a b")),
            "tokenizer.ggml.scores": st.lists(st.floats(), max_size=20),
            "tokenizer.ggml.token_type": st.lists(st.integers(-1, 8), max_size=20),
            "tokenizer.ggml.pre": st.sampled_from(["gpt-2", "llama-bpe", "x"]) | ATOMS,
            "tokenizer.ggml.unknown_token_id": NUMBERS,
            "tokenizer.ggml.bos_token_id": NUMBERS,
            "tokenizer.ggml.precompiled_charsmap": st.lists(st.integers(0, 255), max_size=20),
            "tokenizer.chat_template": ATOMS,
        },
    )
)
def test_tokenizers_in_gguf(metadata: dict[str, Any]) -> None:
    attempt(lambda: build_tokenizer(metadata, "fuzz", 128))


@FUZZ
@given(ANYTHING | st.fixed_dictionaries({"layers": ANYTHING, "version": ATOMS}))
def test_plans(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value))
    attempt(lambda: read_plan(path))
    attempt(lambda: read_json(path))
