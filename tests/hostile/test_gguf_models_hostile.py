"""GGUF files whose layout is sound and whose keys lie: about sizes, rotary embeddings, tokens."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import attempt, first_fast, refused
from test_gguf_hostile import ARRAY, F32, STRING, U32, array, key, text
from tiny_runtime_models import saved, tiny_llama
from tiny_tokenizers import byte_level, sentencepiece, unigram

from fewbits.checkpoints import gguf_write
from fewbits.checkpoints.gguf import GGUFFile
from fewbits.checkpoints.gguf_export import write_gguf
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.checkpoints.gguf_write import Entry, write_gguf_file
from fewbits.checkpoints.source import open_source
from fewbits.models.skeleton import load_model

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "phi3": {"model_type": "phi3", "pad_token_id": None},
}
I32, U64, F64 = 5, 10, 12


def number(kind: int, code: str, value: float) -> tuple[int, bytes]:
    return kind, struct.pack("<" + code, value)


VALUES: dict[str, tuple[int, bytes]] = {
    "0": number(U32, "I", 0),
    "1": number(U32, "I", 1),
    "2^20": number(U32, "I", 2**20),
    "2^31-1": number(U32, "I", 2**31 - 1),
    "2^32-1": number(U32, "I", 2**32 - 1),
    "2^63": number(U64, "Q", 2**63),
    "-1": number(I32, "i", -1),
    "NaN": number(F32, "f", float("nan")),
    "inf": number(F64, "d", float("inf")),
    "-1.0": number(F32, "f", -1.0),
    "no text": (STRING, text("")),
    "text": (STRING, text("../../etc/passwd")),
    "a template": (STRING, text("{{ ''.__class__.__mro__ }}{% for i in range(10**9) %}{% endfor %}")),
    "no list": (ARRAY, array(STRING, 0)),
    "a list of text": (ARRAY, array(STRING, 2, text("a") + text("b"))),
    "a list of numbers": (ARRAY, array(I32, 3, struct.pack("<iii", -1, 0, 2**31 - 1))),
    "a list of floats": (ARRAY, array(F32, 2, struct.pack("<ff", float("nan"), 1.0))),
}


@pytest.fixture(scope="module", params=first_fast(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFSource]:
    folder = tmp_path_factory.mktemp(request.param)
    saved(tiny_llama(layers=1, **FAMILIES[request.param]), folder / "m")
    write_gguf(open_source(folder / "m"), folder / "m.gguf")
    source = GGUFSource(str(folder / "m.gguf"))
    run(folder / "m.gguf")
    yield source


def run(path: Path) -> None:
    source = open_source(path)
    source.load_tokenizer()
    load_model(source)


def rewritten(source: GGUFSource, path: Path, changed: dict[str, tuple[int, bytes]], monkeypatch: Any) -> Path:
    """The file with some keys replaced by raw values."""
    file = GGUFFile(source.path)
    plain = gguf_write._value

    def value(name: str, given: Any) -> bytes:
        if name in changed:
            kind, raw = changed[name]
            return struct.pack("<I", kind) + raw
        if isinstance(given, list) and given and isinstance(given[0], int):
            return struct.pack("<IIQ", ARRAY, I32, len(given)) + struct.pack(f"<{len(given)}i", *given)
        return plain(name, given)

    monkeypatch.setattr(gguf_write, "_value", value)
    entries = [
        Entry(name=name, kind=info.kind, shape=info.shape, provider=lambda name=name: file._raw(name, None)[0])
        for name, info in file.tensors.items()
    ]
    write_gguf_file(path, {**file.metadata, **dict.fromkeys(changed, 0)}, entries)
    return path


@pytest.mark.parametrize("value", VALUES)
def test_keys_that_lie(model: GGUFSource, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [*model.file.metadata, *(f"{model.topology.gguf.architecture}.{name}" for name in ROPE)]
    for name in keys:
        with monkeypatch.context() as patch:
            path = rewritten(model, tmp_path / "m.gguf", {name: VALUES[value]}, patch)
        attempt(lambda path=path: run(path))


ROPE = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "expert_count")


TOKENIZERS = {"bytes": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}
LISTS = ("tokens", "scores", "token_type", "merges")
BROKEN_LISTS: dict[str, tuple[int, bytes]] = {
    "short": (ARRAY, array(STRING, 1, text("a"))),
    "duplicates": (ARRAY, array(STRING, 400, text("a") * 400)),
    "empty texts": (ARRAY, array(STRING, 400, text("") * 400)),
    "long texts": (ARRAY, array(STRING, 400, b"".join(text(f"{n}" * 3000) for n in range(400)))),
    "blanks": (ARRAY, array(STRING, 400, text("a b c") * 400)),
    "all NaN": (ARRAY, array(F32, 400, struct.pack("<f", float("nan")) * 400)),
    "all the same": (ARRAY, array(F32, 400, struct.pack("<f", 0.0) * 400)),
    "odd kinds": (ARRAY, array(I32, 400, struct.pack("<i", 99) * 400)),
    "all control": (ARRAY, array(I32, 400, struct.pack("<i", 3) * 400)),
    "all unknown": (ARRAY, array(I32, 400, struct.pack("<i", 2) * 400)),
    "negative": (ARRAY, array(I32, 400, struct.pack("<i", -1) * 400)),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GGUFSource:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = TOKENIZERS[request.param]()
    tiny_llama(layers=1, vocab_size=400).save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    write_gguf(open_source(folder / "m"), folder / "m.gguf")
    return GGUFSource(str(folder / "m.gguf"))


@pytest.mark.parametrize("case", BROKEN_LISTS)
def test_lists_of_tokens_that_lie(
    tokenized: GGUFSource, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LISTS:
        changed = {f"tokenizer.ggml.{name}": BROKEN_LISTS[case]}
        with monkeypatch.context() as patch:
            path = rewritten(tokenized, tmp_path / "m.gguf", changed, patch)
        attempt(lambda path=path: open_source(path).load_tokenizer()("some text é"))


@pytest.mark.parametrize("kind", ["bert", "rwkv", "none", "llama", "t5", "gpt2", "plamo2"])
def test_kinds_of_tokenizers(tokenized: GGUFSource, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {"tokenizer.ggml.model": (STRING, text(kind)), "tokenizer.ggml.pre": (STRING, text("nobody"))}
    path = rewritten(tokenized, tmp_path / "m.gguf", changed, monkeypatch)
    attempt(lambda: open_source(path).load_tokenizer())


def test_more_blocks_than_tensors(model: GGUFSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.topology.gguf is not None
    changed = {f"{model.topology.gguf.architecture}.block_count": number(U32, "I", 2**30)}
    path = rewritten(model, tmp_path / "m.gguf", changed, monkeypatch)
    refused(lambda: run(path))


def test_a_stack_of_too_many_experts(tmp_path: Path) -> None:
    head = key("general.architecture", STRING, text("qwen3moe"))
    assert head
    entries = [
        Entry(name=name, kind=gguf_write.KINDS["F32"], shape=shape, provider=lambda shape=shape: raw(shape))
        for name, shape in {"token_embd.weight": (300, 64), "blk.0.ffn_up_exps.weight": (20_000, 1, 1)}.items()
    ]
    metadata = {"general.architecture": "qwen3moe", "qwen3moe.expert_count": 20_000}
    write_gguf_file(tmp_path / "m.gguf", metadata, entries)
    assert "experts" in str(refused(lambda: open_source(tmp_path / "m.gguf")))


def raw(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape).flatten().view(torch.uint8)
