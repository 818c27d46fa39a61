"""One safetensors file: a checked header, tensors read one by one, a writer that streams.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``, then the data, to
which the offsets are relative. The format is safe because it can be checked completely before a byte of
data is believed: the ranges must tile the data exactly, each as long as its shape and type say. A file that
overlaps, leaves holes, repeats a name or ends early is refused here, by name, and not by a crash later.

Tensors are read into fresh memory rather than mapped: a mapped file that is cut short while we run kills the
process with SIGBUS, and mapped pages count as resident memory, which would spoil the bound we state.

The writer needs every dtype and shape in advance (the header comes first) but the data only one tensor at a
time. It orders tensors by descending item size, so that all of them lie aligned without padding, which the
format forbids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from fewbits.checkpoints.base import TensorInfo, no_such_tensor, parse_json, sample_windows
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.core.record import atomic_path

MAX_HEADER = 100_000_000  # the reference implementation's bound
MAX_NAME = 4096
MAX_DIMS = 32

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Provider = Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor(TensorInfo):
    """A tensor's description with its place: bytes [start, end) of the file."""

    start: int
    end: int


def read_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """The checked descriptions of all tensors in `path`, in file order. BadInput for anything malformed."""
    return _read(Path(path))[0]


class SafetensorsFile:
    """A safetensors file whose header has been checked; reads one tensor at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.tensors, self.metadata, self.nbytes = _read(self.path)

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def info(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise no_such_tensor(name, str(self.path), self.tensors)
        return self.tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in fresh, aligned, writable memory."""
        info = self.info(name)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        with open(self.path, "rb") as handle:
            read_into(handle, info.start, raw, f"{self.path}: tensor {name!r}")
        return raw.view(info.dtype).reshape(info.shape)

    def sample(self, name: str) -> Iterator[bytes]:
        """The pieces of `name` that enter the identity of its model."""
        info = self.info(name)
        with open(self.path, "rb") as handle:
            for offset, length in sample_windows(info.nbytes):
                handle.seek(info.start + offset)
                yield handle.read(length)


def read_into(handle: BinaryIO, start: int, raw: torch.Tensor, what: str) -> None:
    """Fills the uint8 tensor `raw` from byte `start` on; BadInput when the file ends early."""
    handle.seek(start)
    target = raw.numpy().data
    filled = 0
    while filled < len(target):
        count = handle.readinto(target[filled:])  # type: ignore[attr-defined]
        if not count:
            raise BadInput(f"{what}: the file ends {len(target) - filled} bytes early")
        filled += count


def _read(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str], int]:
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            text = _header_text(handle, size, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    header = parse_json(text, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"{path}: __metadata__ must map strings to strings")
    base = 8 + len(text)
    entries = [_entry(path, name, entry, base) for name, entry in header.items()]
    entries.sort(key=lambda item: (item[1].start, item[1].end))
    _check_tiling(path, entries, base, size)
    return dict(entries), metadata, size


def _header_text(handle: BinaryIO, size: int, path: Path) -> bytes:
    if size < 8:
        raise BadInput(f"{path}: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(handle.read(8), "little")
    if length > MAX_HEADER:
        raise BadInput(f"{path}: header of {length} bytes; at most {MAX_HEADER} are allowed")
    if length > size - 8:
        raise BadInput(f"{path}: truncated: the header takes {length} bytes, the file has {size - 8} after it starts")
    text = handle.read(length)
    if not text.startswith(b"{"):
        raise BadInput(f"{path}: not a safetensors file (the header is not a JSON object)")
    return text


def _entry(path: Path, name: str, entry: object, base: int) -> tuple[str, StoredTensor]:
    where = f"{path}: tensor {name[:80]!r}"
    if not 0 < len(name) <= MAX_NAME:
        raise BadInput(f"{where}: a name takes 1 to {MAX_NAME} characters, not {len(name)}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadInput(f"{where}: dtype, shape and data_offsets are expected, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadInput(f"{where}: dtype {str(dtype)[:40]!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(dim) for dim in shape):
        raise BadInput(f"{where}: shape must be a list of at most {MAX_DIMS} sizes below 2**63")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise BadInput(f"{where}: data_offsets must be two integers")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    begin, end = offsets
    if nbytes != end - begin:
        raise BadInput(f"{where}: shape and dtype take {nbytes} bytes, the offsets {end - begin}")
    if math.prod(dim for dim in shape if dim) >= 2**63:
        raise BadInput(f"{where}: shape overflows")
    return name, StoredTensor(
        shape=tuple(shape),
        dtype=DTYPES[dtype],
        nbytes=nbytes,
        stored=dtype,
        start=base + begin,
        end=base + end,
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_tiling(path: Path, entries: list[tuple[str, StoredTensor]], base: int, size: int) -> None:
    """The ranges must cover the data exactly: no overlap, no hole, nothing after the last one."""
    position = base
    for name, info in entries:
        if info.end > size:
            raise BadInput(f"{path}: truncated: tensor {name[:80]!r} ends at byte {info.end}, the file at {size}")
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise BadInput(f"{path}: tensor {name[:80]!r} {what}")
        position = info.end
    if position != size:
        raise BadInput(f"{path}: {size - position} bytes belong to no tensor")


def write_stream(
    path: str | os.PathLike[str],
    items: Iterable[tuple[str, torch.dtype, tuple[int, ...], Provider]],
    metadata: dict[str, str] | None = None,
) -> int:
    """Writes a safetensors file with one tensor in memory at a time; returns its size in bytes.

    Each item is (name, dtype, shape, provider); a provider is called once, when its tensor's turn comes, and
    must return that dtype and shape. The file appears under its name only when complete.
    Raises BadInput for a repeated name or a dtype safetensors lacks, FewbitsError when space runs out.
    """
    ordered = sorted(items, key=lambda item: -item[1].itemsize)
    header = _header_bytes(ordered, metadata)
    total = 8 + len(header)
    with explain_full_disk(path), atomic_path(path) as temporary, open(temporary, "wb") as handle:
        handle.write(len(header).to_bytes(8, "little"))
        handle.write(header)
        for name, dtype, shape, provider in ordered:
            total += handle.write(_raw_bytes(name, dtype, shape, provider()))
    return total


def _header_bytes(
    items: list[tuple[str, torch.dtype, tuple[int, ...], Provider]], metadata: dict[str, str] | None
) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, _ in items:
        if name in header or name == "__metadata__":
            raise BadInput(f"tensor name {name!r} is taken")
        if dtype not in NAMES:
            raise BadInput(f"tensor {name!r}: safetensors has no {dtype}; it has {', '.join(DTYPES)}")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)  # so that the data starts at a multiple of eight


def _raw_bytes(name: str, dtype: torch.dtype, shape: tuple[int, ...], tensor: torch.Tensor) -> memoryview:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise FewbitsError(
            f"tensor {name!r}: {tensor.dtype} {tuple(tensor.shape)} was produced, {dtype} {tuple(shape)} was announced"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@contextlib.contextmanager
def explain_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns "no space left" while `path` is written into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FewbitsError(f"no space left while writing {path}; free some or choose another directory") from error
