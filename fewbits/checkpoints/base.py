"""What every reader offers: a `Source` of named dense tensors, one in memory at a time.

A source answers in the names of transformers (``model.layers.0.self_attn.q_proj.weight``), whatever the
file calls them, and in the numbers of the model, whatever the file packs them into. The rest of fewbits
never learns which kind of file a model came from.

The identity of a source is a SHA-256 over what makes two models the same model: configuration, tensor
names, shapes, stored types, file sizes, and a sample of every tensor's bytes (small tensors whole, large
ones in windows spread over their length). It does not depend on where the files lie, and reading it costs
tens of megabytes, not the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch

from fewbits.core.errors import BadInput, FewbitsError, nearest_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

SAMPLE_WHOLE = 1 << 16  # tensors up to this many bytes enter the identity whole
SAMPLE_WINDOWS = 16
SAMPLE_WINDOW = 1 << 12
MAX_JSON = 1 << 26  # no configuration or index file comes near 64 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known about a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # of the tensor that `Source.tensor` returns
    nbytes: int  # as stored
    stored: str  # the file's own name of the storage type: "BF16", "Q4_K", ...
    note: str = ""  # what was done to it on the way, where it is not what the file holds


@runtime_checkable
class Source(Protocol):
    """A model that can be read tensor by tensor.

    `path` is what the user named; `identity` the SHA-256 described above; `dtype` the floating-point type
    the model is meant to run in; `nbytes` the size on disk.
    """

    path: str
    dtype: torch.dtype
    nbytes: int

    @property
    def identity(self) -> str: ...

    def config(self) -> dict[str, Any]:
        """The content of the model's ``config.json``: a fresh copy."""
        ...

    def generation_config(self) -> dict[str, Any] | None:
        """The content of ``generation_config.json``, or None when the model has none."""
        ...

    def names(self) -> list[str]:
        """Names of the stored tensors, sorted."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and types of `name`; BadInput when there is no such tensor."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The dense tensor, in fresh memory; nothing else is read. A tied name gives what it is tied to."""
        ...

    def tied(self) -> dict[str, str]:
        """Names the model has but the file does not, with the stored name each shares its tensor with."""
        ...

    def companion_files(self) -> list[Path]:
        """Files to copy beside a rewritten checkpoint: tokenizer, chat template, licence, ..."""
        ...

    def load_tokenizer(self) -> PreTrainedTokenizerBase: ...


def sample_windows(size: int) -> list[tuple[int, int]]:
    """(offset, length) pieces of a tensor of `size` bytes that enter the identity."""
    if size <= SAMPLE_WHOLE:
        return [(0, size)]
    step = (size - SAMPLE_WINDOW) / (SAMPLE_WINDOWS - 1)
    return [(round(index * step), SAMPLE_WINDOW) for index in range(SAMPLE_WINDOWS)]


def identity(
    config: dict[str, Any],
    tensors: Iterable[tuple[str, TensorInfo]],
    sample: Callable[[str], Iterable[bytes]],
    sizes: Iterable[tuple[str, int]],
) -> str:
    """SHA-256 over configuration, file names with sizes, and every tensor's description and sampled bytes."""
    digest = hashlib.sha256()
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(json.dumps(sorted(sizes)).encode())
    for name, info in sorted(tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, list(info.shape), info.stored, info.nbytes]).encode())
        for piece in sample(name):
            digest.update(piece)
    return digest.hexdigest()


def no_such_tensor(name: str, path: str, names: Iterable[str]) -> BadInput:
    near = ", ".join(nearest_first(name, names)[:3])
    return BadInput(f"{path}: no tensor named {name!r}; nearest: {near or 'the file holds none'}")


def by_library(what: str, make: Callable[[], T]) -> T:
    """`make()`, by a library that raises whatever it likes on a damaged file: BadInput starting with `what` instead.

    A panic of the Rust below `tokenizers` is no Exception in Python; it is caught by its name.
    """
    try:
        return make()
    except FewbitsError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise BadInput(f"{what}: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; BadInput names the file and what is wrong with it."""
    try:
        with open(path, "rb") as handle:
            text = handle.read(MAX_JSON + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(text) > MAX_JSON:
        raise BadInput(f"{path}: larger than {MAX_JSON} bytes, which no JSON file of a model is")
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """`text` as a JSON object without duplicate keys; `where` starts the error message."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except _Duplicate as error:
        raise BadInput(f"{where}: duplicate key {str(error)!r}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadInput(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{where}: a JSON object is expected, not {type(value).__name__}")
    return value


class _Duplicate(Exception):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Duplicate(key[:80])
        found[key] = value
    return found
