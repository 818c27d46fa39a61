"""A GGUF file, read by a parser that believes nothing.

Layout (version 2 and 3, little-endian): magic ``GGUF``, u32 version, u64 tensor count, u64 key count; then
that many (string key, u32 type, value), then that many tensor descriptions (name, u32 rank, u64 dims with
the contiguous one first, u32 ggml type, u64 offset), then, aligned to ``general.alignment`` (default 32),
the data. Strings are a u64 length and UTF-8 bytes; arrays a u32 element type, a u64 count and the elements.

Every count in such a file is an invitation: lengths of 2**62 that make a reader loop for hours, dimension
products that wrap around, offsets into other tensors. So each count is checked against the bytes that are
left before anything is read or allocated, products are computed in Python's unbounded integers, keys and
names must be distinct, and ranges must lie in the file without overlapping. The checks are cheap; the file
either passes all of them or is refused with what is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fewbits.checkpoints.base import TensorInfo, no_such_tensor, sample_windows
from fewbits.checkpoints.gguf_blocks import TYPES, BlockType, decode
from fewbits.checkpoints.safetensors_file import read_into
from fewbits.core.errors import BadInput, Unsupported

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_KEY_BYTES = 1 << 16
MAX_STRING = 1 << 26
MAX_ARRAY = 1 << 24
MAX_ALIGNMENT = 1 << 16
MAX_NAME_BYTES = 63  # llama.cpp keeps names in 64 bytes with a terminating zero
MAX_DIMS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALLEST_KEY = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor(TensorInfo):
    """A tensor's description with its block type and its place in the file; `shape` has the rows first."""

    kind: BlockType
    start: int


class _Cursor:
    """Reads forward through the header; every read is checked against the end of the file first."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self.handle, self.path = handle, path
        self.size = os.fstat(handle.fileno()).st_size
        self.position = 0

    def bad(self, message: str) -> BadInput:
        return BadInput(f"{self.path}: {message} (at byte {self.position})")

    def remaining(self) -> int:
        return self.size - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.remaining():
            raise self.bad(f"truncated: {what} takes {count} bytes, {self.remaining()} are left")
        self.position += count
        return self.handle.read(count)

    def number(self, code: str, what: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))
        return value

    def count(self, limit: int, smallest: int, what: str) -> int:
        """A u64 count of things that take at least `smallest` bytes each."""
        value = int(self.number("Q", what))
        if value > limit:
            raise self.bad(f"{what} is {value}; at most {limit} are allowed")
        if value * smallest > self.remaining():
            raise self.bad(f"truncated: {what} is {value}, but {self.remaining()} bytes are left")
        return value

    def string(self, limit: int, what: str) -> str:
        length = self.count(limit, 1, f"the length of {what}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error


class GGUFFile:
    """A GGUF file whose header has been checked: `metadata`, `tensors`, and `tensor(name)`.

    Raises BadInput for anything malformed, Unsupported for other versions, big-endian and split files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as handle:
                cursor = _Cursor(handle, self.path)
                self.nbytes = cursor.size
                self.metadata, self.tensors = _parse(cursor)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def info(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise no_such_tensor(name, str(self.path), self.tensors)
        return self.tensors[name]

    def tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """The dense tensor, or slice `index` along its slowest dimension; reads only those bytes."""
        raw, shape = self._raw(name, index)
        try:
            return decode(raw, self.info(name).kind, shape)
        except BadInput as error:
            raise BadInput(f"{self.path}: tensor {name!r}: {error}") from error

    def rows(self, name: str, index: int | None = None) -> torch.Tensor:
        """The bytes of a matrix, or of slice `index` of a stack of them: uint8 [rows, bytes of a row]."""
        raw, shape = self._raw(name, index)
        return raw.view(shape[0], -1)

    def _raw(self, name: str, index: int | None) -> tuple[torch.Tensor, tuple[int, ...]]:
        info = self.info(name)
        start, nbytes, shape = info.start, info.nbytes, info.shape
        if index is not None:
            if not 0 <= index < shape[0]:
                raise BadInput(f"{self.path}: tensor {name!r} has {shape[0]} slices; there is no slice {index}")
            nbytes //= shape[0]
            start, shape = start + index * nbytes, shape[1:]
        raw = torch.empty(nbytes, dtype=torch.uint8)
        with open(self.path, "rb") as handle:
            read_into(handle, start, raw, f"{self.path}: tensor {name!r}")
        return raw, shape

    def sample(self, name: str) -> Iterator[bytes]:
        """The pieces of `name` that enter the identity of its model."""
        info = self.info(name)
        with open(self.path, "rb") as handle:
            for offset, length in sample_windows(info.nbytes):
                handle.seek(info.start + offset)
                yield handle.read(length)


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    if cursor.size < 4 or cursor.take(4, "the magic") != b"GGUF":
        raise BadInput(f"{cursor.path}: not a GGUF file (it does not start with 'GGUF')")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version:
            raise Unsupported(f"{cursor.path}: a big-endian GGUF file; convert it with gguf-convert-endian")
        raise Unsupported(f"{cursor.path}: GGUF version {version}; fewbits reads 2 and 3: convert the model again")
    tensor_count = cursor.count(MAX_TENSORS, _SMALLEST_TENSOR, "the number of tensors")
    key_count = cursor.count(MAX_KEYS, _SMALLEST_KEY, "the number of keys")
    metadata = _metadata(cursor, key_count)
    if metadata.get("split.count", 0) not in (0, 1):
        raise Unsupported(f"{cursor.path}: one part of a split model; join it with llama-gguf-split --merge")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.bad(f"general.alignment is {alignment!r}; a power of two up to {MAX_ALIGNMENT} is allowed")
    described = [_describe(cursor) for _ in range(tensor_count)]
    data = -(-cursor.position // alignment) * alignment
    return metadata, _place(cursor, described, data, alignment)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string(MAX_KEY_BYTES, "a key")
        if not key or key in metadata:
            raise cursor.bad(f"duplicate or empty key {key[:80]!r}")
        metadata[key] = _value(cursor, cursor.number("I", "a value type"), key[:80])
    return metadata


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    what = f"the value of {key!r}"
    if kind == _STRING:
        return cursor.string(MAX_STRING, what)
    if kind in _SCALARS:
        return _scalars(cursor, kind, 1, what)[0]
    if kind != _ARRAY:
        raise cursor.bad(f"{what} has the unknown type {kind}")
    element = cursor.number("I", f"the element type of {key!r}")
    if element == _STRING:
        count = cursor.count(MAX_ARRAY, 8, f"the number of elements of {key!r}")
        return [cursor.string(MAX_STRING, f"an element of {key!r}") for _ in range(count)]
    if element not in _SCALARS:
        raise cursor.bad(f"{what} is an array of the unknown or nested type {element}")
    count = cursor.count(MAX_ARRAY, struct.calcsize("<" + _SCALARS[element]), f"the number of elements of {key!r}")
    return _scalars(cursor, element, count, what)


def _scalars(cursor: _Cursor, kind: int, count: int, what: str) -> list[Any]:
    code = _SCALARS[kind]
    raw = cursor.take(count * struct.calcsize("<" + code), what)
    if code == "?" and raw.strip(b"\0\1"):
        raise cursor.bad(f"{what} is a truth value other than 0 and 1")
    return list(struct.unpack(f"<{count}{code}", raw))


def _describe(cursor: _Cursor) -> tuple[str, tuple[int, ...], BlockType, int]:
    """One tensor description: name, shape with the rows first, type, offset into the data."""
    name = cursor.string(MAX_NAME_BYTES, "a tensor name")
    where = f"tensor {name!r}"
    rank = cursor.number("I", f"the rank of {where}")
    if not 1 <= rank <= MAX_DIMS:
        raise cursor.bad(f"{where} has {rank} dimensions; 1 to {MAX_DIMS} are allowed")
    dims = [cursor.number("Q", f"a dimension of {where}") for _ in range(rank)]
    if not all(0 < dim < 2**63 for dim in dims):
        raise cursor.bad(f"{where} has the impossible shape {dims}")
    number = cursor.number("I", f"the type of {where}")
    if number not in TYPES:
        known = ", ".join(kind.name for kind in TYPES.values())
        raise cursor.bad(f"{where} has the unknown type {number}; known: {known}")
    kind = TYPES[number]
    if dims[0] % kind.values:
        raise cursor.bad(f"{where}: rows of {dims[0]} are not whole {kind.name} blocks of {kind.values}")
    return name, tuple(reversed(dims)), kind, cursor.number("Q", f"the offset of {where}")


def _place(
    cursor: _Cursor, described: list[tuple[str, tuple[int, ...], BlockType, int]], data: int, alignment: int
) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in described:
        nbytes = math.prod(shape) // kind.values * kind.nbytes
        if name in tensors:
            raise cursor.bad(f"duplicate tensor {name!r}")
        if offset % alignment:
            raise cursor.bad(f"tensor {name!r} lies at offset {offset}, not a multiple of {alignment}")
        if data + offset + nbytes > cursor.size:
            raise cursor.bad(
                f"truncated: tensor {name!r} ends at byte {data + offset + nbytes}, the file at {cursor.size}"
            )
        tensors[name] = GGUFTensor(
            shape=shape, dtype=kind.dtype, nbytes=nbytes, stored=kind.name, kind=kind, start=data + offset
        )
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise cursor.bad(f"tensors {before!r} and {name!r} overlap")
        end, before = info.start + info.nbytes, name
    return tensors
