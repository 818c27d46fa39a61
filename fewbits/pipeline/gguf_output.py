"""A quantized model as ``model.gguf``: what `--checkpoint-format gguf` writes in place of shards and config.json.

The journal holds codes and scales of quantized linears and the tensors that a transform changed; the rest comes from
the source, in the dtype of what is kept. The directory then holds one file that llama.cpp runs, and the certificate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source, TensorInfo
from fewbits.checkpoints.gguf_exact import exact_type
from fewbits.checkpoints.gguf_export import FILE, Packed, check_model, dense_kind, write_gguf
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, Quantized
from fewbits.formats.mix import Mix, Weights
from fewbits.pipeline.job import Job
from fewbits.pipeline.output import Item

KIND = "gguf"


def check(job: Job, modules: dict[str, tuple[tuple[int, int], Weights]], beside: Sequence[str]) -> None:
    """Refuses, before any work, what GGUF cannot say: formats, activations, models, tokenizers.

    beside: what the method adds to codes that other checkpoints, too, have no entry for.
    """
    if job.scheme.activations is not None:
        raise Unsupported(
            f"GGUF says nothing of activations, which {job.scheme.name} rounds to {job.scheme.activations.name}: "
            f"choose a scheme for weights alone, such as q4_k or W4A16"
        )
    if beside:
        raise Unsupported(f"GGUF cannot say {job.recipe.name}: {beside[0]}; choose another method")
    for module, (shape, format) in modules.items():
        if isinstance(format, Mix):
            raise Unsupported(
                f"{module}: GGUF has one type for all input channels of a linear, and {format.name} is several: plan "
                "without --within, or write the native checkpoint format"
            )
        if exact_type(format, shape) is None:
            raise Unsupported(
                f"{module}: no GGUF type holds the values of {format.name} in rows of {shape[1]}; choose a GGUF format "
                f"(q4_k, q4_0, iq4_nl, ...) or integers in groups of a multiple of 32"
            )
    check_model(job.source)


def write(directory: Path, job: Job, items: Iterable[Item], modules: dict[str, tuple[tuple[int, int], Weights]]) -> int:
    """Writes the file and returns its size in bytes."""
    found = {item.name: item for item in items}
    packed = {}
    for module, (shape, format) in modules.items():
        assert isinstance(format, Format)  # `check` let no other pass
        parts = {name: found.pop(f"{module}.{name}") for name in format.layout(shape)}

        def read(parts: dict[str, Item] = parts, shape: tuple[int, int] = shape, format: Format = format) -> Quantized:
            return Quantized.from_state(format, shape, {name: item.provider() for name, item in parts.items()})

        packed[module] = Packed(format=format, shape=shape, read=read)
    source = _Items(job.source, job.dtype, found)
    try:
        write_gguf(source, directory / FILE, packed, dense=dense_kind(job.dtype), name=job.out.name)
    except Unsupported as error:  # of a tensor: it would fail again
        raise BadInput(str(error)) from error
    return (directory / FILE).stat().st_size


class _Items:
    """The job's source with the tensors that go out, some of them changed, in place of its own."""

    def __init__(self, source: Source, dtype: torch.dtype, items: dict[str, Item]) -> None:
        self.path, self.dtype, self.nbytes, self.identity = source.path, dtype, source.nbytes, source.identity
        self._source, self._items = source, items
        carried = getattr(source, "tokenizer_metadata", None)
        if carried is not None:
            self.tokenizer_metadata = carried

    def names(self) -> list[str]:
        return sorted(self._items)

    def info(self, name: str) -> TensorInfo:
        item = self._items[name]
        return TensorInfo(shape=item.shape, dtype=item.dtype, nbytes=item.nbytes, stored=str(item.dtype))

    def tensor(self, name: str) -> Tensor:
        return self._items[name].provider()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
