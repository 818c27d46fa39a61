"""Writing GGUF version 3: the header that gguf.py reads, then the tensors, one in memory at a time.

The header holds every tensor's type and place, so types and shapes must be known before the first weight is read;
the weights come from providers, called once, in the order of the file. Keys carry types: an integer is a u32 unless
said otherwise, since llama.cpp refuses a key of another type than it expects. Whoever needs one says so with `Typed`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.gguf import MAX_DIMS, MAX_NAME_BYTES
from fewbits.checkpoints.gguf_blocks import TYPES, BlockType
from fewbits.checkpoints.safetensors_file import explain_full_disk
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.core.record import atomic_path

VERSION = 3
ALIGNMENT = 32
KINDS = {kind.name: kind for kind in TYPES.values()}
_NUMBERS = {kind.name: number for number, kind in TYPES.items()}
_U8, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 0, 4, 5, 6, 7, 8, 9
_CODES = {_U8: "B", _U32: "I", _I32: "i", _F32: "f", _BOOL: "?"}
_TYPED = {"u8": _U8, "i32": _I32}


@dataclasses.dataclass(frozen=True)
class Typed:
    """A list whose GGUF type is not the one its Python type stands for: `kind` is "u8" or "i32"."""

    value: Sequence[int]
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor to write: `shape` has the rows first, `provider` gives its bytes (uint8, any shape)."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    provider: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.nbytes


def write_gguf_file(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], entries: Iterable[Entry], alignment: int = ALIGNMENT
) -> int:
    """Writes the file under a temporary name and renames it; returns its size in bytes.

    Raises BadInput for a name, shape or value that GGUF cannot hold, FewbitsError when space runs out.
    """
    listed = list(entries)
    head = _header(metadata, listed, alignment)
    total = len(head)
    with explain_full_disk(path), atomic_path(path) as temporary, open(temporary, "wb") as handle:
        handle.write(head)
        for entry in listed:
            raw = entry.provider()
            if raw.dtype != torch.uint8 or raw.numel() != entry.nbytes:
                raise FewbitsError(
                    f"tensor {entry.name!r}: {raw.numel()} bytes were produced, {entry.nbytes} were announced"
                )
            total += handle.write(raw.contiguous().reshape(-1).numpy().data)
            total += handle.write(bytes(-entry.nbytes % alignment))
    return total


def _header(metadata: Mapping[str, Any], entries: list[Entry], alignment: int) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(key, value)]
    offset = 0
    seen: set[str] = set()
    for entry in entries:
        _check(entry, seen)
        dims = tuple(reversed(entry.shape))
        number = _NUMBERS[entry.kind.name]
        parts += [_text(entry.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)]
        offset += -(-entry.nbytes // alignment) * alignment
    head = b"".join(parts)
    return head + bytes(-len(head) % alignment)


def _check(entry: Entry, seen: set[str]) -> None:
    if entry.name in seen:
        raise BadInput(f"tensor name {entry.name!r} is taken")
    seen.add(entry.name)
    if not 0 < len(entry.name.encode()) <= MAX_NAME_BYTES:
        raise BadInput(f"tensor name {entry.name!r}: GGUF names have 1 to {MAX_NAME_BYTES} bytes")
    if not 1 <= len(entry.shape) <= MAX_DIMS or not all(entry.shape):
        raise BadInput(f"tensor {entry.name!r}: shape {entry.shape}; GGUF takes 1 to {MAX_DIMS} dimensions above 0")
    if entry.shape[-1] % entry.kind.values:
        raise BadInput(
            f"tensor {entry.name!r}: rows of {entry.shape[-1]} are not whole {entry.kind.name} blocks of "
            f"{entry.kind.values}"
        )


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """Type and content of a key's value."""
    if isinstance(value, Typed):
        return struct.pack("<I", _ARRAY) + _array(value.value, _TYPED[value.kind])
    if isinstance(value, (list, tuple)):
        return struct.pack("<I", _ARRAY) + _array(value, _kind(key, value[0] if value else ""))
    kind = _kind(key, value)
    return struct.pack("<I", kind) + (_text(value) if kind == _STRING else struct.pack("<" + _CODES[kind], value))


def _array(values: Any, kind: int) -> bytes:
    head = struct.pack("<IQ", kind, len(values))
    if kind == _STRING:
        return head + b"".join(map(_text, values))
    return head + struct.pack(f"<{len(values)}{_CODES[kind]}", *values)


def _kind(key: str, value: Any) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int) and 0 <= value < 2**32:
        return _U32
    if isinstance(value, float) and math.isfinite(value):
        return _F32
    if isinstance(value, str):
        return _STRING
    raise BadInput(f"GGUF key {key!r} cannot hold {value!r}: text, truth values, u32 and finite floats are written")
