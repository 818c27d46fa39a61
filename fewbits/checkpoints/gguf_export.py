"""Any `Source`, dense or with quantized modules, as one GGUF file that llama.cpp runs.

Each tensor gets llama.cpp's name and, where it wants them otherwise, its values: rows of q and k interleaved (llama),
norms plus one (Gemma), the experts of a block in one tensor. What has one dimension, and routers, are float32 there.

Quantized modules keep their values wherever a GGUF type can say them (gguf_exact.py). For the rest, and for dense
matrices, `weights` names a type to quantize to, with llama.cpp's fallback where its blocks of 256 do not fit a row;
without it a module that has no type is refused and dense matrices stay dense. `write_gguf` returns what was done to
each tensor, with the relative error it added. One tensor is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.gguf_exact import exact_type, restate
from fewbits.checkpoints.gguf_keys import FILE_TYPES, model_keys, rope_tensors
from fewbits.checkpoints.gguf_pack import from_blocks, to_blocks
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.checkpoints.gguf_vocab import tokenizer_keys
from fewbits.checkpoints.gguf_write import KINDS, Entry, write_gguf_file
from fewbits.core.errors import BadInput, Unsupported, unknown
from fewbits.formats import Format, Quantized, parse_format
from fewbits.models.topology import GGUFLayout, Topology, find_topology

QUANTIZATION_VERSION = 2
FILE = "model.gguf"  # in a directory of its own
DENSE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_OUTSIDE = {"embeddings": "token_embd", "final_norm": "output_norm", "head": "output"}
OnTensor = Callable[[int, int, str], None]  # tensors done, all, name


def dense_kind(dtype: torch.dtype) -> str:
    """What `dtype` is called in `DENSE`; F32 for what is not there."""
    return next((kind for kind, known in DENSE.items() if known == dtype), "F32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A quantized module of the source: its format and shape, known before its codes are read.

    format: None for one that is decoded; `read` then gives the dense weight.  target: the type to round to where none
    says `format` exactly (default: the `weights` of `write_gguf`).
    """

    format: Format | None
    shape: tuple[int, int]
    read: Callable[[], Quantized | Tensor]
    target: str | None = None


@dataclasses.dataclass(kw_only=True)
class Written:
    """What became of one tensor (of one expert, where a block's experts are one tensor)."""

    name: str  # in the source
    stored: str  # in the file
    kind: str
    quantized: bool  # in the source
    lossless: bool = True
    error: float = 0.0  # |w' - w| / |w|, of what was written against what the source stands for
    note: str = ""


@dataclasses.dataclass(kw_only=True)
class _Part:
    """One matrix or vector on its way into a tensor of the file."""

    name: str  # the tensor in the source, with .weight or .bias
    shape: tuple[int, ...]
    packed: Packed | None
    written: Written


def write_gguf(
    source: Source,
    path: str | os.PathLike[str],
    modules: Mapping[str, Packed] | None = None,
    *,
    weights: str | None = None,
    dense: str | None = None,
    name: str | None = None,
    on_tensor: OnTensor | None = None,
) -> list[Written]:
    """Writes `source` to `path` (one .gguf file) and returns what became of each tensor.

    modules: quantized linears by their name on disk (no ".weight"); their weights are not asked of the source.
    weights: format of the blocks' other matrices, a name that has a GGUF type ("q4_k"); also of modules no type says
    exactly. dense: "F16", "BF16" or "F32" for what stays dense; default as the source, its float64 as F32.
    Raises Unsupported, before anything is written, for a model or tokenizer llama.cpp has no counterpart for.
    """
    export = _Export(source, modules or {}, weights, dense)
    metadata = export.metadata(name or Path(source.path).stem)
    entries = export.entries(on_tensor)
    write_gguf_file(path, metadata, entries)
    return export.written


def check_model(source: Source) -> None:
    """Unsupported, with the reason, for a model whose configuration or tokenizer llama.cpp could not follow."""
    _Export(source, {}, None, None).metadata("")


def packed_modules(source: GGUFSource) -> dict[str, Packed]:
    """The quantized matrices of a GGUF file by module, with their codes as they are in the file."""
    found = {}
    for name in source.names():
        info = source.info(name)
        format = KINDS[info.stored].format
        if name.endswith(".weight") and len(info.shape) == 2 and format is not None:
            module, shape = name.removesuffix(".weight"), (info.shape[0], info.shape[1])

            def read(name: str = name, format: str = format) -> Quantized:
                return from_blocks(parse_format(format), source.rows(name))

            found[module] = Packed(format=parse_format(format), shape=shape, read=read)
    return found


def gguf_topology_of(config: dict[str, Any], where: str) -> tuple[Topology, GGUFLayout]:
    """The family's table, if it says what llama.cpp calls things."""
    topology = find_topology(config)
    if topology is None or topology.gguf is None:
        raise Unsupported(
            f"{where}: model_type {config.get('model_type')!r} has no GGUF table here; write safetensors instead"
        )
    return topology, topology.gguf


class _Export:
    def __init__(self, source: Source, modules: Mapping[str, Packed], weights: str | None, dense: str | None) -> None:
        self.source, self.modules, self.config = source, modules, source.config()
        self.topology, self.layout = gguf_topology_of(self.config, source.path)
        self.weights = None if weights is None else _typed(weights)
        if dense is not None and dense not in DENSE:
            raise unknown("dense GGUF type", dense, DENSE)
        self.dense = dense or dense_kind(source.dtype)
        self.written: list[Written] = []
        self.tensors = self._plan()

    def metadata(self, name: str) -> dict[str, Any]:
        where = self.source.path
        rows = self.source.info(f"{self.topology.embeddings}.weight").shape[0]
        carried = getattr(self.source, "tokenizer_metadata", None)
        tokenizer = carried() if carried else tokenizer_keys(self.source.load_tokenizer(), rows, where)
        return {
            "general.architecture": self.layout.architecture,
            "general.type": "model",
            "general.name": name,
            "general.file_type": self._file_type(),
            "general.quantization_version": QUANTIZATION_VERSION,
            **model_keys(self.config, self.topology, where),
            **tokenizer,
        }

    def entries(self, on_tensor: OnTensor | None) -> list[Entry]:
        made = []
        for number, (stored, parts) in enumerate(self.tensors.items(), 1):
            kind = KINDS[parts[0].written.kind]
            shape = parts[0].shape if len(parts) == 1 and not self._stacked(stored) else (len(parts), *parts[0].shape)
            if any(parts[0].name.endswith(f".{self._disk(part)}.weight") for part in self.layout.vectors):
                shape = shape[1:]

            def provide(stored: str = stored, parts: list[_Part] = parts, number: int = number) -> Tensor:
                if on_tensor is not None:
                    on_tensor(number - 1, len(self.tensors), stored)
                return torch.cat([self._bytes(part).reshape(-1) for part in parts])

            made.append(Entry(name=stored, kind=kind, shape=shape, provider=provide))
        for name, value in rope_tensors(self.config, self.topology, self.source.path).items():
            made.append(Entry(name=name, kind=KINDS["F32"], shape=tuple(value.shape), provider=partial(_raw, value)))
        return made

    def _plan(self) -> dict[str, list[_Part]]:
        """Name in the file -> its parts, in order of experts. Refuses what has no place or cannot be said."""
        shapes = {name: self.source.info(name).shape for name in self._dense_names()}
        shapes |= {f"{module}.weight": packed.shape for module, packed in self.modules.items()}
        found: dict[str, dict[int, _Part]] = {}
        for name, shape in shapes.items():
            stored, expert = self._place(name)
            packed = self.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            part = self._part(name, stored, shape, packed)
            found.setdefault(stored, {})[-1 if expert is None else expert] = part
        for stored, parts in found.items():
            if len({(part.written.kind, part.shape) for part in parts.values()}) > 1:
                raise Unsupported(f"{self.source.path}: experts of {stored!r} differ in format or shape; GGUF has one")
        ordered = {stored: [parts[index] for index in sorted(parts)] for stored, parts in found.items()}
        self.written = [part.written for parts in ordered.values() for part in parts]
        return dict(sorted(ordered.items(), key=lambda item: _order(item[0])))

    def _dense_names(self) -> list[str]:
        inside = {f"{module}." for module in self.modules}
        tied = set(self.source.tied())
        if self.config.get("tie_word_embeddings"):
            tied.add(f"{self.topology.head}.weight")
        names = []
        for name in self.source.names():
            module, _, leaf = name.rpartition(".")
            packed = f"{module}." in inside and leaf != "bias"
            if not packed and name not in tied and not name.endswith("rotary_emb.inv_freq"):
                names.append(name)
        return names

    def _place(self, name: str) -> tuple[str, int | None]:
        """(name in the file, expert) of a source tensor."""
        module, _, leaf = name.rpartition(".")
        for attribute, stored in _OUTSIDE.items():
            if module == getattr(self.topology, attribute) and leaf in ("weight", "bias"):
                return f"{stored}.{leaf}", None
        number, _, rest = module.removeprefix(f"{self.topology.blocks}.").partition(".")
        if module.startswith(f"{self.topology.blocks}.") and number.isdecimal() and leaf in ("weight", "bias"):
            for stored, ours in self.layout.names:
                if self.topology.disk_name(f".{ours}.").strip(".") == rest:
                    return f"blk.{int(number)}.{stored}.{leaf}", None
            place = self._expert_place(rest)
            if place is not None:
                return f"blk.{int(number)}.{place[0]}.{leaf}", place[1]
        raise Unsupported(f"{self.source.path}: llama.cpp has no place for {name!r} in a {self.topology.name} model")

    def _expert_place(self, rest: str) -> tuple[str, int] | None:
        experts = self.topology.experts
        index = next((int(piece) for piece in rest.split(".") if piece.isdecimal()), None)
        if experts is None or index is None:
            return None
        for stored, part in self.layout.experts:
            if experts.disk_name(index, part) == rest:
                return stored, index
        return None

    def _part(self, name: str, stored: str, shape: tuple[int, ...], packed: Packed | None) -> _Part:
        written = Written(name=name, stored=stored, kind="", quantized=packed is not None)
        written.kind = self._kind(name, stored, shape, packed, written)
        return _Part(name=name, shape=shape, packed=packed, written=written)

    def _kind(self, name: str, stored: str, shape: tuple[int, ...], packed: Packed | None, written: Written) -> str:
        module = name.rpartition(".")[0]
        if packed is not None:
            exact = packed.format and exact_type(packed.format, packed.shape)
            if exact:
                return exact.upper()
            target = self.weights if packed.target is None else _typed(packed.target)
            if target is None:
                said = "dense" if packed.format is None else packed.format.name
                raise Unsupported(
                    f"{self.source.path}: {module} is in {said}, whose values no GGUF type holds; "
                    f"quantize them again to one that has a type, such as q4_k"
                )
            return self._fitting(target, shape, written)
        router = any(module.endswith(f".{disk}") for disk in map(self._disk, self.topology.routers))
        if len(shape) < 2 or router:
            return "F32"
        if self.weights is None or not stored.startswith("blk."):
            return self.dense
        return self._fitting(self.weights, shape, written)

    def _disk(self, name: str) -> str:
        return self.topology.disk_name(f".{name}.").strip(".")

    def _fitting(self, asked: Format, shape: tuple[int, ...], written: Written) -> str:
        """The type asked for, or the one llama.cpp falls back to where blocks are no divisor of the row."""
        format = asked.fitting(shape[-1])
        block = KINDS[format.name.upper()].values
        if format is not asked or shape[-1] % block:
            written.note = f"rows of {shape[-1]} are not whole {asked.name} blocks"
        return format.name.upper() if shape[-1] % block == 0 else self.dense

    def _stacked(self, stored: str) -> bool:
        return any(stored.endswith(f".{name}.weight") for name, _ in self.layout.experts)

    def _file_type(self) -> int:
        sizes: dict[str, int] = {}
        for parts in self.tensors.values():
            for part in parts:
                if len(part.shape) > 1:
                    count = part.shape[0] * part.shape[1]
                    sizes[part.written.kind] = sizes.get(part.written.kind, 0) + count
        return FILE_TYPES.get(max(sizes, key=sizes.__getitem__, default="F32"), 0)

    def _bytes(self, part: _Part) -> Tensor:
        """The bytes of one part in the file's order; fills in what was lost."""
        written, module = part.written, part.name.rpartition(".")[0]
        kind = written.kind
        if kind not in DENSE:
            raw = to_blocks(self._quantized(part, kind.lower(), module))
            return self._ordered(part.name, raw)
        value = self.source.tensor(part.name) if part.packed is None else _dense(part.packed.read())
        if not bool(torch.isfinite(value.float()).all()):
            raise BadInput(f"{part.name}: holds NaN or infinite values; repair the source tensor")
        if self.layout.norm_offset and module.endswith("norm"):
            value = value.float() + self.layout.norm_offset
        cast = value.to(DENSE[kind])
        if not bool(torch.isfinite(cast.float()).all()):
            raise BadInput(f"{part.name}: values overflow {kind}; choose BF16 or F32 for what stays dense")
        _note_loss(written, value, cast)
        return _raw(self._ordered(part.name, cast))

    def _quantized(self, part: _Part, name: str, module: str) -> Quantized:
        packed = part.packed
        if packed is None:
            value = self.source.tensor(part.name).float()
        else:
            weight = packed.read()
            if isinstance(weight, Quantized) and exact_type(weight.format, packed.shape) == name:
                try:
                    return restate(weight, name, module)
                except Unsupported:
                    if self.weights is None and packed.target is None:
                        raise
            value = _dense(weight)
        found = parse_format(name).quantize(value, part.name)
        _note_loss(part.written, value, found.dequantize())
        return found

    def _ordered(self, name: str, value: Tensor) -> Tensor:
        """Rows of q and k (or entries of their biases) in the order llama.cpp rotates them."""
        module = name.rpartition(".")[0]
        kind = next((part for part in self.layout.permuted if module.endswith(f".{part}")), None)
        if kind is None:
            return value
        heads = self.config["num_attention_heads"]
        if kind.endswith("k_proj"):
            heads = self.config.get("num_key_value_heads") or heads
        return rotary_order(value, heads)


def rotary_order(value: Tensor, heads: int) -> Tensor:
    """Rows of q or k from transformers' order, halves of a head, to llama.cpp's, adjacent pairs."""
    halves = value.reshape(heads, 2, -1, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def _dense(weight: Quantized | Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, Quantized) else weight


def _typed(name: str) -> Format:
    """The format called `name`, which must have a GGUF type."""
    format = parse_format(name.lower())
    if format.name.upper() not in KINDS or KINDS[format.name.upper()].format is None:
        known = [kind.format for kind in KINDS.values() if kind.format]
        raise BadInput(f"format {name!r} has no GGUF type; those that have: {', '.join(known)}")
    return format


def _note_loss(written: Written, before: Tensor, after: Tensor) -> None:
    before, after = before.float(), after.float()
    if torch.equal(before, after):
        return
    written.lossless = False
    size = float(before.norm())
    written.error = float((after - before).norm()) / size if size else 0.0


def _raw(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _order(stored: str) -> tuple[int, int, str]:
    """Embeddings first, then block by block, then norm and head: the order a model is read in."""
    if not stored.startswith("blk."):
        return (0 if stored.startswith("token_embd") else 2), 0, stored
    return 1, int(stored.split(".")[1]), stored
