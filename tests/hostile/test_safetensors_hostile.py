"""Broken and hostile safetensors files and model directories: each refused, with what is wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits.checkpoints.safetensors_file import SafetensorsFile
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: bytes, data: bytes = bytes(24), length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def file(header: dict[str, Any], data: bytes = bytes(24)) -> bytes:
    return raw(json.dumps(header).encode(), data)


GOOD = file({"a": entry(), "b": entry("I8", [3], [24, 27]), "__metadata__": {"format": "pt"}}, bytes(27))

HOSTILE = {
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "header of 2^63 bytes": (raw(b"{}", length=2**63), "at most 100000000"),
    "header of 100 MB and one": (raw(b"{}", length=100_000_001), "at most"),
    "header longer than the file": (raw(b"{}", length=5000), "truncated"),
    "empty header": (raw(b""), "not a safetensors"),
    "header is a list": (raw(b"[]"), "not a safetensors"),
    "header starts with a blank": (raw(b" {}"), "not a safetensors"),
    "header is cut": (raw(b'{"a":'), "not valid JSON"),
    "header is not UTF-8": (raw(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "ten thousand brackets": (raw(b'{"a":' + b"[" * 10_000), "not valid JSON"),
    "a number of 5000 digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "duplicate tensor": (raw(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}'), "duplicate key 'a'"),
    "duplicate field": (
        raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}'),
        "duplicate",
    ),
    "metadata is a list": (file({"__metadata__": []}, b""), "__metadata__"),
    "metadata holds a number": (file({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "entry is a number": (file({"a": 1}), "dtype, shape and data_offsets"),
    "entry without shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 24]}}), "dtype, shape"),
    "entry with more": (file({"a": entry() | {"code": "os.system"}}), "nothing else"),
    "unknown dtype": (file({"a": entry("F128")}), "F128.*BF16"),
    "dtype as expression": (file({"a": entry("__import__('os')")}), "is not one of"),
    "dtype is a number": (file({"a": entry(3)}), "is not one of"),
    "negative size": (file({"a": entry(shape=[-2, -3])}), "shape"),
    "size is a float": (file({"a": entry(shape=[2.0, 3])}), "shape"),
    "size is a truth value": (file({"a": entry(shape=[True, 6])}), "shape"),
    "size 2^64": (file({"a": entry(shape=[2**64])}), "shape"),
    "product wraps to 6": (file({"a": entry(shape=[2**62, 2**2, 6])}), "the offsets 24"),
    "zero times 2^62 twice": (file({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, b""), "overflows"),
    "33 dimensions": (file({"a": entry(shape=[1] * 33, offsets=[0, 4])}, bytes(4)), "at most 32"),
    "shape is text": (file({"a": entry(shape="23")}), "shape"),
    "three offsets": (file({"a": entry(offsets=[0, 24, 25])}), "two integers"),
    "offset is a float": (file({"a": entry(offsets=[0, 24.0])}), "two integers"),
    "negative offset": (file({"a": entry(offsets=[-24, 0])}), "two integers"),
    "offsets reversed": (file({"a": entry(offsets=[24, 0])}), "the offsets -24"),
    "offsets too short": (file({"a": entry(offsets=[0, 20])}), "take 24 bytes, the offsets 20"),
    "past the end": (file({"a": entry()}, bytes(20)), "truncated"),
    "past the end, shifted": (file({"a": entry(offsets=[24, 48])}), "truncated"),
    "overlap": (file({"a": entry(), "b": entry("I8", [4], [20, 24])}), "overlaps"),
    "same place": (file({"a": entry(), "b": entry()}), "overlaps"),
    "hole at the start": (file({"a": entry(offsets=[4, 28])}, bytes(28)), "hole"),
    "hole in the middle": (file({"a": entry(), "b": entry("I8", [1], [28, 29])}, bytes(29)), "hole"),
    "bytes at the end": (file({"a": entry()}, bytes(30)), "6 bytes belong to no tensor"),
    "empty name": (file({"": entry()}), "a name takes"),
    "name of 5000 characters": (file({"n" * 5000: entry()}), "a name takes"),
}


def test_the_file_they_are_made_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(GOOD)
    opened = SafetensorsFile(tmp_path / "m.safetensors")
    assert opened.metadata == {"format": "pt"}
    assert torch.equal(opened.tensor("a"), torch.zeros(2, 3))
    assert opened.tensor("b").dtype is torch.int8


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(BadInput):
            SafetensorsFile(path)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("byte"), st.integers(0, len(GOOD) - 1), st.integers(0, 255)),
            st.tuples(st.just("digit"), st.integers(0, len(GOOD) - 1), st.integers(48, 57)),
            st.tuples(st.just("cut"), st.integers(0, len(GOOD)), st.just(0)),
            st.tuples(st.just("drop"), st.integers(0, len(GOOD) - 1), st.integers(1, 16)),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_load_or_are_refused(tmp_path: Path, mutations: list[tuple[str, int, int]]) -> None:
    content = bytearray(GOOD)
    for kind, place, value in mutations:
        if kind in ("byte", "digit") and place < len(content):
            content[place] = value
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + value]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        opened = SafetensorsFile(path)
        for name in opened.names():
            assert opened.tensor(name).shape == opened.info(name).shape
    except BadInput as error:
        assert str(error)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A directory with two shards, a and b, and an index."""
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    (tmp_path / "one.safetensors").write_bytes(file({"a": entry()}))
    (tmp_path / "two.safetensors").write_bytes(file({"b": entry()}))
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_directory_they_are_made_from_is_good(sharded: Path) -> None:
    assert open_source(sharded).names() == ["a", "b"]


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "/etc/one.safetensors",
        "../one.safetensors",
        "..\\one.safetensors",
        "sub/one.safetensors",
        "C:\\one.safetensors",
        ".one.safetensors",
        "..safetensors",
        "one.safetensors\0",
        "one.bin",
        "",
        7,
        None,
        ["one.safetensors"],
    ],
)
def test_an_index_cannot_reach_out_of_its_directory(sharded: Path, shard: object) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": shard})
    with pytest.raises(BadInput, match=r"tensor 'b'.*same directory"):
        open_source(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "one.safetensors"])
def test_an_index_without_a_map(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(BadInput, match="weight_map"):
        open_source(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(BadInput, match=r"1 of 2 shards are missing: two\.safetensors"):
        open_source(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").write_bytes(file({"b": entry()})[:-1])
    with pytest.raises(BadInput, match=r"two\.safetensors: truncated"):
        open_source(sharded)


def test_a_tensor_the_shard_lacks_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(BadInput, match=r"two\.safetensors: tensor 'c' is not there"):
        open_source(sharded)


def test_tensors_the_index_forgets_are_found(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors"})
    assert open_source(sharded).names() == ["a"]  # a shard no entry names is no part of the model
    (sharded / "one.safetensors").write_bytes(file({"a": entry(), "c": entry(offsets=[24, 48])}, bytes(48)))
    assert open_source(sharded).names() == ["a", "c"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "a JSON object is expected"),
        (b"\xff", "not valid JSON"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b"[" * 100_000, "not valid JSON"),
        (b"{\"torch_dtype\": \"__import__('os').system('true')\"}", "dtype"),
        (b'{"dtype": "int4"}', "dtype"),
    ],
)
def test_bad_configurations(sharded: Path, config: bytes, message: str) -> None:
    (sharded / "config.json").write_bytes(config)
    with pytest.raises(BadInput, match=message):
        open_source(sharded)


def test_what_is_no_model_is_refused_with_the_way_out(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(BadInput, match=r"neither model\.safetensors nor"):
        open_source(sharded)
    (sharded / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(Unsupported, match=r"unpickling runs code.*save_pretrained"):
        open_source(sharded)
    with pytest.raises(Unsupported, match="unpickling runs code"):
        open_source(sharded / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pass its directory"):
        open_source(sharded / "one.safetensors")
    (sharded / "config.json").unlink()
    with pytest.raises(BadInput, match=r"no config\.json"):
        open_source(sharded)
    with pytest.raises(BadInput, match="neither a directory nor a file nor a hub id"):
        open_source(tmp_path / "absent")
    for number, name in enumerate(("notes.txt", "model.gguf")):
        (tmp_path / name).write_text("hello")
        with pytest.raises(BadInput, match=("neither a model directory", "not a GGUF file")[number]):
            open_source(tmp_path / name)
