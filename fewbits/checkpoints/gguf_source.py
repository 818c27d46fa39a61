"""The `Source` of a GGUF file: llama.cpp's names and orders turned back into transformers'.

llama.cpp computes rotary embeddings of architecture "llama" on adjacent pairs of a head's dimensions,
transformers on its two halves; llama.cpp's converter therefore interleaves the halves of the rows of q and
k, per head, and we take that back: row 2i of a head becomes row i, row 2i+1 becomes row width/2 + i.
Experts, which GGUF keeps in one 3-D tensor per projection, are given one by one.

A GGUF carries its tokenizer as lists; transformers turns them into a tokenizer (`convert_gguf_tokenizer`),
fed from our own parse of the file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewbits.checkpoints import base
from fewbits.checkpoints.base import TensorInfo, no_such_tensor
from fewbits.checkpoints.gguf import GGUFFile
from fewbits.checkpoints.gguf_blocks import readable
from fewbits.checkpoints.gguf_config import ROPE_TENSORS, Keys, build_config, token_ids
from fewbits.checkpoints.gguf_tokenizer import build_tokenizer
from fewbits.checkpoints.gguf_write import Typed
from fewbits.checkpoints.safetensors_source import check_tokenizer, count_blocks
from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.topology import Topology, gguf_topology, topologies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_EXPERTS = 1 << 14
_OUTSIDE = {"token_embd": "embeddings", "output_norm": "final_norm", "output": "head"}


class GGUFSource:
    """A GGUF file as a `Source`. `dropped` names its tensors without a counterpart, with the reason.

    Raises BadInput for a damaged file, Unsupported for an architecture no table lists or a tensor type
    without a decoder.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.nbytes = self.file.nbytes
        keys = Keys(self.file.metadata, path)
        self.topology = self._find_topology(keys)
        self._refuse_unreadable()
        self._places, self.dropped = self._map_names()
        self.dtype = self._dtype()
        self._config = build_config(keys, self.topology, self.dtype, self._shape, self.file.tensor)
        self._check_counts()

    def config(self) -> dict[str, Any]:
        return copy.deepcopy(self._config)

    def generation_config(self) -> dict[str, Any] | None:
        ids = token_ids(self.file.metadata)
        return {"_from_model_config": True, **ids} if ids else None

    def names(self) -> list[str]:
        return sorted(self._places)

    def tied(self) -> dict[str, str]:
        if not self._config["tie_word_embeddings"]:
            return {}
        return {f"{self.topology.head}.weight": f"{self.topology.embeddings}.weight"}

    def info(self, name: str) -> TensorInfo:
        stored, expert = self._place(name)
        info = self.file.info(stored)
        shape, nbytes = info.shape, info.nbytes
        if expert is not None:
            shape, nbytes = shape[1:], nbytes // shape[0]
        if self._is_vector(name):
            shape = (1, *shape)
        return TensorInfo(shape=shape, dtype=info.dtype, nbytes=nbytes, stored=info.stored)

    def tensor(self, name: str) -> torch.Tensor:
        stored, expert = self._place(name)
        value = self._reordered(name, self.file.tensor(stored, expert))
        if self._is_vector(name):
            value = value[None]
        offset = self.topology.gguf.norm_offset if self.topology.gguf else 0.0
        return value - offset if offset and name.rpartition(".")[0].endswith("norm") else value

    def rows(self, name: str) -> torch.Tensor:
        """The bytes of matrix `name` as they are stored, uint8 [rows, bytes of a row], rows in our order."""
        stored, expert = self._place(name)
        return self._reordered(name, self.file.rows(stored, expert))

    def _is_vector(self, name: str) -> bool:
        """Whether llama.cpp keeps the matrix of one row `name` as a vector."""
        vectors = self.topology.gguf.vectors if self.topology.gguf else ()
        return any(name.endswith(f".{self.topology.disk_name(f'.{part}.').strip('.')}.weight") for part in vectors)

    def _reordered(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if not any(name.endswith((f".{part}.weight", f".{part}.bias")) for part in self._permuted()):
            return value
        heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
        return undo_rotary_order(value, self._config[heads])

    @cached_property
    def identity(self) -> str:
        def sample(name: str) -> Iterator[bytes]:
            return self.file.sample(name)

        return base.identity(self._config, self.file.tensors.items(), sample, [("gguf", self.nbytes)])

    def companion_files(self) -> list[Path]:
        return []

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = build_tokenizer(self.file.metadata, self.path, self._config["max_position_embeddings"])
        check_tokenizer(self.path, tokenizer, self._config["vocab_size"])
        return tokenizer

    def tokenizer_metadata(self) -> dict[str, Any]:
        """The file's own ``tokenizer.*`` keys, for a GGUF file made from it: nothing is lost on the way."""
        keys = {key: value for key, value in self.file.metadata.items() if key.startswith("tokenizer.")}
        kinds = {"tokenizer.ggml.token_type": "i32", "tokenizer.ggml.precompiled_charsmap": "u8"}
        return {key: Typed(value, kinds[key]) if key in kinds else value for key, value in keys.items()}

    def _find_topology(self, keys: Keys) -> Topology:
        architecture = keys.architecture
        experts = keys.get("expert_count", 0) not in (0, None)
        found = gguf_topology(architecture, experts=experts) if isinstance(architecture, str) else None
        if found is None:
            known = sorted({family.gguf.architecture for family in topologies() if family.gguf})
            raise Unsupported(
                f"{self.path}: GGUF architecture {architecture!r}{' with experts' if experts else ''}; "
                f"fewbits reads {', '.join(known)}: for others pass the original safetensors model"
            )
        return found

    def _refuse_unreadable(self) -> None:
        types = sorted({info.stored for info in self.file.tensors.values() if not info.kind.readable})
        if types:
            raise Unsupported(
                f"{self.path}: holds tensors of type {', '.join(types)}; fewbits reads "
                f"{', '.join(readable())}: pass a GGUF of those types, or the original safetensors model"
            )

    def _map_names(self) -> tuple[dict[str, tuple[str, int | None]], dict[str, str]]:
        """Our name -> (GGUF name, expert), and the GGUF names left over with the reason."""
        places: dict[str, tuple[str, int | None]] = {}
        dropped: dict[str, str] = {}
        for stored in self.file.tensors:
            targets = self._targets(stored)
            if stored in ROPE_TENSORS:
                dropped[stored] = "rotary frequencies, expressed in config.json"
            elif not targets:
                raise Unsupported(
                    f"{self.path}: tensor {stored!r} has no place in a {self.topology.name} model; "
                    f"pass the original safetensors model"
                )
            places.update(targets)
        return places, dropped

    def _targets(self, stored: str) -> dict[str, tuple[str, int | None]]:
        layout = self.topology.gguf
        assert layout is not None
        module, _, leaf = stored.rpartition(".")
        if leaf not in ("weight", "bias"):
            return {}
        if module in _OUTSIDE:
            return {f"{getattr(self.topology, _OUTSIDE[module])}.{leaf}": (stored, None)}
        prefix, _, rest = module.partition(".")
        number, _, part = rest.partition(".")
        if prefix != "blk" or not (number.isascii() and number.isdigit()):
            return {}
        block = f"{self.topology.blocks}.{int(number)}"
        if part in dict(layout.names):
            name = f"{block}.{dict(layout.names)[part]}.{leaf}"
            return {self.topology.disk_name(name): (stored, None)}
        shape = self.file.info(stored).shape
        if part not in dict(layout.experts) or self.topology.experts is None or len(shape) != 3:
            return {}
        if shape[0] > MAX_EXPERTS:
            raise BadInput(f"{self.path}: tensor {stored!r} is for {shape[0]} experts; {MAX_EXPERTS} are allowed")
        experts, kind = self.topology.experts, dict(layout.experts)[part]
        return {f"{block}.{experts.disk_name(index, kind)}.{leaf}": (stored, index) for index in range(shape[0])}

    def _place(self, name: str) -> tuple[str, int | None]:
        name = self.tied().get(name, name)
        if name not in self._places:
            raise no_such_tensor(name, self.path, self._places)
        return self._places[name]

    def _permuted(self) -> tuple[str, ...]:
        return self.topology.gguf.permuted if self.topology.gguf else ()

    def _shape(self, stored: str) -> tuple[int, ...] | None:
        return self.file.tensors[stored].shape if stored in self.file.tensors else None

    def _dtype(self) -> torch.dtype:
        """The type most matrices are stored in; bfloat16 for packed ones, whose range fp16 need not cover."""
        sizes: dict[str, int] = {}
        for info in self.file.tensors.values():
            if len(info.shape) > 1:
                sizes[info.stored] = sizes.get(info.stored, 0) + info.nbytes
        largest = max(sizes, key=sizes.__getitem__, default="F32")
        return {"F32": torch.float32, "F16": torch.float16}.get(largest, torch.bfloat16)

    def _check_counts(self) -> None:
        """Counts that a model would be built from must be those of the tensors: a key can claim anything."""
        layers, width = self._config["num_hidden_layers"], self._config["head_dim"]
        found = count_blocks(self._places, self.topology.blocks)
        if layers != found:
            raise BadInput(f"{self.path}: the file claims {layers} blocks and has tensors for {found}")
        for kind, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            shape = self._shape(f"blk.0.attn_{kind}.weight")
            if shape is not None and shape[0] != self._config[heads] * width:
                raise BadInput(
                    f"{self.path}: blk.0.attn_{kind}.weight has {shape[0]} rows; "
                    f"{self._config[heads]} heads of {width} need {self._config[heads] * width}"
                )
            if width % 2:
                raise BadInput(f"{self.path}: heads of odd width {width} cannot be rotated")


def undo_rotary_order(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (or bias entries) of q or k from llama.cpp's order to transformers' (module docstring)."""
    pairs = value.reshape(heads, -1, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)
