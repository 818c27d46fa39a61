"""Broken and hostile GGUF files: each refused at once, in little memory, with what is wrong."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits.checkpoints.gguf import GGUFFile
from fewbits.core.errors import BadInput, Unsupported

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: str | bytes = "w",
    dims: tuple[int, ...] = (32, 2),
    kind: int = 0,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return (
        text(name) + struct.pack("<I", len(dims) if rank is None else rank) + shape + struct.pack("<IQ", kind, offset)
    )


def gguf(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head = magic + counts + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


DATA = bytes(256)  # one float32 tensor of 2 x 32
GOOD = gguf((key("a", U32, struct.pack("<I", 7)), key("s", STRING, text("x"))), (tensor(),), DATA)


def array(element: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + content


HOSTILE = {
    "empty": (b"", "not a GGUF"),
    "too short": (b"GG", "not a GGUF"),
    "wrong magic": (gguf(magic=b"GGML"), "not a GGUF"),
    "only magic": (b"GGUF", "truncated"),
    "no counts": (b"GGUF\3\0\0\0", "truncated"),
    "version 1": (gguf(version=1), "version 1"),
    "version 0": (gguf(version=0), "version 0"),
    "big endian": (gguf(version=3 << 24), "big-endian"),
    "2^62 tensors": (gguf(tensor_count=2**62), "number of tensors"),
    "2^64-1 tensors": (gguf(tensor_count=2**64 - 1), "number of tensors"),
    "2^62 keys": (gguf(key_count=2**62), "number of keys"),
    "more tensors than bytes": (gguf(tensor_count=1000), "number of tensors"),
    "more keys than bytes": (gguf(key_count=1000), "number of keys"),
    "key of 2^62 bytes": (gguf((struct.pack("<Q", 2**62),), key_count=1, data=DATA), "length of a key"),
    "string past the end": (gguf((key("a", STRING, struct.pack("<Q", 5000)),), data=DATA), "truncated"),
    "string of 2^63": (gguf((key("a", STRING, struct.pack("<Q", 2**63)),), data=DATA), "length of"),
    "key not UTF-8": (gguf((key(b"\xff\xfe", U32, b"\0" * 4),)), "not UTF-8"),
    "value not UTF-8": (gguf((key("a", STRING, text(b"\xc3\x28")),)), "not UTF-8"),
    "empty key": (gguf((key("", U32, b"\0" * 4),)), "empty key"),
    "duplicate key": (gguf((key("a", U32, b"\0" * 4), key("a", U32, b"\0" * 4))), "duplicate"),
    "unknown value type": (gguf((key("a", 13, b"\0" * 8),)), "unknown type 13"),
    "truth value 2": (gguf((key("a", BOOL, b"\2"),)), "truth value"),
    "array of 2^62 strings": (
        gguf((key("a", ARRAY, array(STRING, 2**62)),), data=DATA),
        "number of elements",
    ),
    "array of 2^62 bytes": (gguf((key("a", ARRAY, array(0, 2**62)),), data=DATA), "number of elements"),
    "array of 2^61 doubles": (gguf((key("a", ARRAY, array(12, 2**61)),), data=DATA), "number of elements"),
    "array longer than the file": (gguf((key("a", ARRAY, array(U32, 10_000)),), data=DATA), "truncated"),
    "array of arrays": (gguf((key("a", ARRAY, array(ARRAY, 1)),), data=DATA), "nested"),
    "array of unknown type": (gguf((key("a", ARRAY, array(99, 1)),), data=DATA), "unknown or nested type 99"),
    "array of truth values 3": (gguf((key("a", ARRAY, array(BOOL, 3, b"\0\3\1")),)), "truth value"),
    "alignment 0": (gguf((key("general.alignment", U32, struct.pack("<I", 0)),)), "alignment"),
    "alignment 48": (gguf((key("general.alignment", U32, struct.pack("<I", 48)),)), "alignment"),
    "alignment 2^31": (gguf((key("general.alignment", U32, struct.pack("<I", 2**31)),)), "alignment"),
    "alignment as text": (gguf((key("general.alignment", STRING, text("32")),)), "alignment"),
    "alignment as float": (gguf((key("general.alignment", F32, struct.pack("<f", 32)),)), "alignment"),
    "split": (gguf((key("split.count", U32, struct.pack("<I", 3)),)), "split"),
    "no dimensions": (gguf(tensors=(tensor(dims=()),), data=DATA), "0 dimensions"),
    "five dimensions": (gguf(tensors=(tensor(dims=(1,) * 5),), data=DATA), "5 dimensions"),
    "2^32-1 dimensions": (gguf(tensors=(tensor(rank=2**32 - 1),), data=DATA), "dimensions"),
    "dimension 0": (gguf(tensors=(tensor(dims=(32, 0)),), data=DATA), "impossible shape"),
    "negative dimension": (gguf(tensors=(tensor(dims=(2**64 - 1,)),), data=DATA), "impossible shape"),
    "product wraps to 0": (gguf(tensors=(tensor(dims=(2**32, 2**32)),), data=DATA), "truncated: tensor"),
    "product wraps to 64": (gguf(tensors=(tensor(dims=(64, 2**62, 4, 1)),), data=DATA), "truncated: tensor"),
    "size wraps": (gguf(tensors=(tensor(dims=(2**62,)),), data=DATA), "truncated: tensor"),
    "unknown tensor type": (gguf(tensors=(tensor(kind=99),), data=DATA), "unknown type 99"),
    "removed tensor type": (gguf(tensors=(tensor(kind=4),), data=DATA), "unknown type 4"),
    "row is half a block": (gguf(tensors=(tensor(dims=(16, 2), kind=2),), data=DATA), "whole Q4_0 blocks"),
    "name of 64 bytes": (gguf(tensors=(tensor("n" * 64),), data=DATA), "length of a tensor name"),
    "name not UTF-8": (gguf(tensors=(tensor(b"\x80w"),), data=DATA), "not UTF-8"),
    "duplicate tensor": (gguf(tensors=(tensor(), tensor(offset=256)), data=DATA * 2), "duplicate tensor"),
    "overlap": (gguf(tensors=(tensor("a"), tensor("b", offset=128)), data=DATA * 2), "overlap"),
    "same place": (gguf(tensors=(tensor("a"), tensor("b")), data=DATA * 2), "overlap"),
    "unaligned offset": (gguf(tensors=(tensor(offset=4),), data=DATA * 2), "multiple of 32"),
    "offset past the end": (gguf(tensors=(tensor(offset=512),), data=DATA), "truncated: tensor"),
    "offset wraps": (gguf(tensors=(tensor(offset=2**64 - 32),), data=DATA), "truncated: tensor"),
    "data cut short": (GOOD[:-1], "truncated: tensor"),
    "no data": (GOOD[: len(GOOD) - len(DATA)], "truncated: tensor"),
}


def test_the_file_they_are_made_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(GOOD)
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.metadata == {"a": 7, "s": "x"}
    assert torch.equal(file.tensor("w"), torch.zeros(2, 32))


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_at_once_and_cheaply(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(BadInput, match=message) as caught:
        GGUFFile(path)
    assert time.process_time() - begin < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(BadInput):
            GGUFFile(path)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GOOD)
    file = GGUFFile(path)
    path.write_bytes(GOOD[:-100])
    with pytest.raises(BadInput, match="ends 100 bytes early"):
        file.tensor("w")


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(BadInput, match="cannot be read"):
            GGUFFile(path)


RICH = gguf(
    (
        key("general.architecture", STRING, text("llama")),
        key("general.alignment", U32, struct.pack("<I", 32)),
        key("list", ARRAY, array(STRING, 2, text("one") + text("two"))),
        key("numbers", ARRAY, array(U64, 2, struct.pack("<QQ", 1, 2))),
        key("flag", BOOL, b"\1"),
        key("real", F32, struct.pack("<f", 0.5)),
    ),
    (tensor("a", (32, 2), 0, 0), tensor("b", (32, 4), 2, 256), tensor("c", (256,), 12, 352)),
    bytes(512),
)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("byte"), st.integers(0, len(RICH) - 1), st.integers(0, 255)),
            st.tuples(
                st.just("word"),
                st.integers(0, len(RICH) - 8),
                st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 2**64 - 32]),
            ),
            st.tuples(st.just("cut"), st.integers(0, len(RICH)), st.just(0)),
            st.tuples(st.just("drop"), st.integers(0, len(RICH) - 1), st.integers(1, 16)),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_load_or_are_refused(tmp_path: Path, mutations: list[tuple[str, int, int]]) -> None:
    content = bytearray(RICH)
    for kind, place, value in mutations:
        if kind == "byte" and place < len(content):
            content[place] = value
        elif kind == "word" and place + 8 <= len(content):
            content[place : place + 8] = struct.pack("<Q", value)
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + value]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
        for name, info in file.tensors.items():
            assert file.tensor(name).shape == info.shape
    except BadInput as error:  # Unsupported is one, too
        assert str(error)
        assert isinstance(error, Unsupported | BadInput)
