"""A directory of safetensors as transformers writes it: one file, or shards with an index.

``model.safetensors.index.json`` maps tensor names to shard names. A shard name is only ever a file name:
one with a path in it is refused, since an index must not reach outside its directory. (The hub's cache
keeps shards as symbolic links, so the link's target is not restricted; names that come out of a file are.)
Every shard must exist, pass the checks of `safetensors_file`, and hold the tensors that the index puts
there.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewbits.checkpoints import base
from fewbits.checkpoints.base import TensorInfo, by_library, no_such_tensor, read_json
from fewbits.checkpoints.safetensors_file import SafetensorsFile
from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.topology import find_topology

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0.][^/\\\0]{0,200}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class SafetensorsSource:
    """The `Source` of a model directory.

    Raises BadInput for a directory that is not a complete model, Unsupported for pickled weights and, unless
    `allow_quantized`, for a checkpoint that is quantized already.
    """

    def __init__(self, path: str, *, allow_quantized: bool = False) -> None:
        self.path = path
        self.directory = Path(path)
        if not (self.directory / "config.json").is_file():
            raise BadInput(f"{path}: not a model directory: it has no config.json")
        self._config = _with_side_config(read_json(self.directory / "config.json"), self.directory)
        self._files = _open_files(self.directory)
        self._where = {name: file for file, names in self._files for name in names}
        self.nbytes = sum(file.nbytes for file, _ in self._files)
        if not allow_quantized:
            _refuse_quantized(path, self._config, self._where)
        self.dtype = _dtype(path, self._config, self._where)
        self._check_vocabulary()
        self._check_blocks()

    def config(self) -> dict[str, Any]:
        return copy.deepcopy(self._config)

    def generation_config(self) -> dict[str, Any] | None:
        path = self.directory / "generation_config.json"
        return read_json(path) if path.is_file() else None

    def names(self) -> list[str]:
        return sorted(self._where)

    def tied(self) -> dict[str, str]:
        head, embeddings = self._head_and_embeddings()
        if self._config.get("tie_word_embeddings") and head not in self._where and embeddings in self._where:
            return {head: embeddings}
        return {}

    def info(self, name: str) -> TensorInfo:
        name = self.tied().get(name, name)
        if name not in self._where:
            raise no_such_tensor(name, self.path, self._where)
        return self._where[name].info(name)

    def tensor(self, name: str) -> torch.Tensor:
        name = self.tied().get(name, name)
        if name not in self._where:
            raise no_such_tensor(name, self.path, self._where)
        return self._where[name].tensor(name)

    @cached_property
    def identity(self) -> str:
        def sample(name: str) -> Iterator[bytes]:
            return self._where[name].sample(name)

        sizes = [(file.path.name, file.nbytes) for file, _ in self._files]
        return base.identity(self._config, ((name, self.info(name)) for name in self._where), sample, sizes)

    def companion_files(self) -> list[Path]:
        found = {path for pattern in _COMPANIONS for path in self.directory.glob(pattern) if path.is_file()}
        return sorted(found)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        absent = not (self.directory / "tokenizer.json").is_file()
        hint = " (it has no tokenizer.json: copy the original model's tokenizer files into it)" if absent else ""
        tokenizer: PreTrainedTokenizerBase = by_library(
            f"{self.path}: the tokenizer cannot be loaded{hint}",
            lambda: AutoTokenizer.from_pretrained(str(self.directory), local_files_only=True, trust_remote_code=False),
        )
        _, embeddings = self._head_and_embeddings()
        if embeddings in self._where:
            check_tokenizer(self.path, tokenizer, self._where[embeddings].info(embeddings).shape[0])
        return tokenizer

    def _head_and_embeddings(self) -> tuple[str, str]:
        topology = find_topology(self._config)
        if topology is None:
            return "lm_head.weight", "model.embed_tokens.weight"
        return f"{topology.head}.weight", f"{topology.embeddings}.weight"

    def _check_vocabulary(self) -> None:
        size = self._config.get("vocab_size")
        for name in self._head_and_embeddings():
            rows = self._where[name].info(name).shape[:1] if name in self._where else ()
            if rows and isinstance(size, int) and rows[0] != size:
                raise BadInput(f"{self.path}: config.json says vocab_size {size}, tensor {name!r} has {rows[0]} rows")

    def _check_blocks(self) -> None:
        topology, stated = find_topology(self._config), self._config.get("num_hidden_layers")
        if topology is None or stated is None:
            return
        found = count_blocks(self._where, topology.blocks)
        if type(stated) is not int or not 0 < stated <= found:
            raise BadInput(
                f"{self.path}: config.json says num_hidden_layers {stated!r}, the tensors make {found} blocks"
            )


def _with_side_config(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """`config` with what older writers put beside it: GPTQ's and ModelOpt's files say how weights are quantized."""
    if config.get("quantization_config") or config.get("quantization"):
        return config
    if (directory / "quantize_config.json").is_file():
        return {
            **config,
            "quantization_config": {"quant_method": "gptq", **read_json(directory / "quantize_config.json")},
        }
    if (directory / "hf_quant_config.json").is_file():
        found = read_json(directory / "hf_quant_config.json").get("quantization")
        if isinstance(found, dict) and found.get("quant_algo"):
            return {**config, "quantization_config": {"quant_method": "modelopt", **found}}
    return config


def count_blocks(names: Iterable[str], blocks: str) -> int:
    """How many blocks the tensor names speak of: 1 + the highest number after `blocks`, if all are there."""
    pattern = re.compile(re.escape(blocks) + r"\.([0-9]{1,9})\.")
    found = {int(match.group(1)) for match in map(pattern.match, names) if match}
    return next((number for number in range(len(found) + 1) if number not in found), 0)


def check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """BadInput when the tokenizer can produce an id that the embeddings have no row for."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise BadInput(f"{path}: the tokenizer has token id {highest}, the embeddings only {rows} rows")


def _open_files(directory: Path) -> list[tuple[SafetensorsFile, list[str]]]:
    """The weight files with the names each one provides."""
    if (directory / SINGLE).is_file():
        file = SafetensorsFile(directory / SINGLE)
        return [(file, file.names())]
    if (directory / INDEX).is_file():
        return _open_shards(directory)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise Unsupported(
            f"{directory}: the weights are pickled ({pickles[0]}), and unpickling runs code; where you trust "
            f"the file, convert it: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
        )
    raise BadInput(f"{directory}: holds neither {SINGLE} nor {INDEX}")


def _open_shards(directory: Path) -> list[tuple[SafetensorsFile, list[str]]]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{directory / INDEX}: has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise BadInput(
                f"{directory / INDEX}: tensor {name[:80]!r} is said to be in {str(shard)[:200]!r}; "
                f"the name of a .safetensors file in the same directory is expected"
            )
        shards.setdefault(shard, []).append(name)
    missing = sorted(shard for shard in shards if not (directory / shard).is_file())
    if missing:
        raise BadInput(f"{directory}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:5])}")
    files = []
    for shard, names in sorted(shards.items()):
        file = SafetensorsFile(directory / shard)
        absent = sorted(set(names) - file.tensors.keys())
        if absent:
            raise BadInput(f"{directory / shard}: tensor {absent[0][:80]!r} is not there, though {INDEX} says so")
        # a tensor that no index entry names is still part of the model, unless another shard has it too
        extra = [name for name in file.names() if name not in weight_map]
        files.append((file, [*names, *extra]))
    return files


def _refuse_quantized(path: str, config: dict[str, Any], where: dict[str, SafetensorsFile]) -> None:
    quantization = config.get("quantization_config") or config.get("quantization")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise Unsupported(
            f"{path}: already quantized (quant_method {method or 'unnamed'}); pass the original model, "
            f"whose weights are bf16, fp16 or fp32"
        )
    for name, file in where.items():
        info = file.info(name)
        if name.endswith(".weight") and info.dtype not in DTYPES.values():
            raise Unsupported(
                f"{path}: weight {name!r} is stored as {info.stored}; the weights of a model to quantize are "
                f"BF16, F16, F32 or F64"
            )


def _dtype(path: str, config: dict[str, Any], where: dict[str, SafetensorsFile]) -> torch.dtype:
    """What config.json names, or else the type most of the weights have."""
    stated = config.get("dtype") or config.get("torch_dtype")
    if stated is not None:
        name = str(stated).removeprefix("torch.")
        if name not in DTYPES:
            raise Unsupported(f"{path}: config.json has dtype {stated!r}; allowed: {', '.join(DTYPES)}")
        return DTYPES[name]
    counts: Counter[torch.dtype] = Counter()
    for name, file in where.items():
        info = file.info(name)
        if info.dtype in DTYPES.values():
            counts[info.dtype] += info.nbytes
    return counts.most_common(1)[0][0] if counts else torch.float32
