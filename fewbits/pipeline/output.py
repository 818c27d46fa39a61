"""Assembles the output directory: shards, index, config, tokenizer, certificate, model card.

Every tensor of the source ends in exactly one of four lists: quantized, kept, tied or dropped, with the
reason. Tensors are streamed from the source and the journal one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.algorithms import METHODS
from fewbits.checkpoints.base import Source
from fewbits.checkpoints.safetensors_file import SafetensorsFile, write_stream
from fewbits.core.errors import BadInput
from fewbits.core.record import write_json

MAX_SHARD_BYTES = 5_000_000_000
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One tensor of the output and where its data comes from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    provider: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def _cast(source: Source, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def provide() -> Tensor:
        stored = source.tensor(name)
        if not stored.is_floating_point():
            return stored
        if not bool(torch.isfinite(stored).all()):
            raise BadInput(f"{name}: holds NaN or infinite values; repair the source tensor")
        cast = stored.to(dtype)
        if not bool(torch.isfinite(cast).all()):
            raise BadInput(f"{name}: values overflow {dtype}; choose --dtype bfloat16 or float32")
        return cast

    return provide


def kept_items(
    source: Source,
    quantized: set[str],
    tied: set[str],
    dropped: dict[str, str],
    changed: set[str],
    dtype: torch.dtype,
) -> tuple[list[Item], list[dict[str, Any]]]:
    """The source tensors that go out dense as they are, and the account of all source tensors.

    changed: names that a transform gave new values, or that hold a quantized weight's parts; written elsewhere.
    """
    items, account = [], []
    for name in source.names():
        info = source.info(name)
        entry = {"name": name, "bytes": info.nbytes}
        if name in quantized:
            account.append({**entry, "action": "quantized", "reason": ""})
        elif name in changed:
            account.append({**entry, "action": "kept", "reason": "scaled by a transform"})
        elif name in tied:
            account.append({**entry, "action": "tied", "reason": "shares the embedding's tensor"})
        elif name in dropped:
            account.append({**entry, "action": "dropped", "reason": dropped[name]})
        else:
            target = dtype if info.dtype in _FLOATS else info.dtype
            items.append(Item(name=name, dtype=target, shape=info.shape, provider=_cast(source, name, target)))
            stored = "" if target == info.dtype else f"stored as {target}".replace("torch.", "")
            reason = ", ".join(filter(None, (info.note, stored)))
            account.append({**entry, "action": "kept", "reason": reason})
    for name, origin in source.tied().items():
        account.append({"name": name, "bytes": 0, "action": "tied", "reason": f"shares {origin}"})
    return items, account


def block_items(paths: Iterable[Path]) -> list[Item]:
    """The tensors of the journal's block files: what is quantized, and what a transform changed."""
    items = []
    for path in paths:
        file = SafetensorsFile(path)
        for name in file.names():
            info = file.info(name)
            items.append(
                Item(name=name, dtype=info.dtype, shape=info.shape, provider=lambda f=file, n=name: f.tensor(n))
            )
    return items


def write_shards(directory: Path, items: Iterable[Item], max_bytes: int = MAX_SHARD_BYTES) -> int:
    """Writes `items` as one safetensors file or as shards with an index; returns the bytes of tensor data."""
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in sorted(items, key=lambda item: item.name):
        if shards[-1] and filled + item.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.nbytes
    total = sum(item.nbytes for shard in shards for item in shard)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_stream(directory / name, [(i.name, i.dtype, i.shape, i.provider) for i in shard], {"format": "pt"})
        weight_map.update({item.name: name for item in shard})
    if len(shards) > 1:
        write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    return total


def check_companions(source: Source) -> None:
    """BadInput where `write_companions` would find no tokenizer."""
    if not _has_tokenizer(source.companion_files()):
        source.load_tokenizer()


def write_companions(directory: Path, source: Source) -> None:
    """Tokenizer, chat template and generation config: copied, or written out where the source has no files."""
    files = source.companion_files()
    for path in files:
        shutil.copyfile(path, directory / path.name)
    if not _has_tokenizer(files):
        source.load_tokenizer().save_pretrained(directory)
    generation = source.generation_config()
    if generation is not None and not (directory / "generation_config.json").exists():
        write_json(directory / "generation_config.json", generation)


def _has_tokenizer(files: Iterable[Path]) -> bool:
    return any(path.name.startswith("tokenizer") for path in files)


def write_config(directory: Path, source: Source, dtype: torch.dtype, quantization: dict[str, Any]) -> None:
    """config.json: the source's, with the dtype of the kept tensors and `quantization_config`."""
    config = source.config()
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = quantization
    write_json(directory / "config.json", config)


def _is_method(name: str) -> bool:
    return all(step in METHODS for step in name.split(","))


def write_card(directory: Path, certificate: dict[str, Any]) -> None:
    """README.md: what this checkpoint is, what was lost, how to load it."""
    scheme, source, size = certificate["scheme"], certificate["source"], certificate["size"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [fewbits, quantized]",
        "---",
        "",
        f"# {source['model_type']} quantized to {scheme['weights']}",
        "",
        f"Made from `{Path(source['path']).name}` by fewbits {certificate['fewbits']} "
        f"({certificate['method']['name']}, {size['bits_per_weight']:.2f} bits per quantized weight, "
        f"{size['bytes'] / 1e6:.1f} MB).",
        "",
        "## What was lost",
        "",
        "| against the original | value |",
        "|---|---|",
    ]
    method = certificate["method"]["name"]
    # A certificate may hold other methods' rows beside its own, to compare with; the card is about this one.
    measured = [
        found
        for found in certificate["evaluations"]
        if found["kl"] and (found["what"] == method or not _is_method(found["what"]))
    ]
    for found in measured:
        kl, top1, before = found["kl"], found["top1"], found["reference_perplexity"]
        lines += [
            f"| text | {found['text']['description']}, {found['text']['tokens']} tokens |",
            f"| KL(original, quantized) | {kl['mean']:.4f} ± {kl['stderr'] or 0:.4f} nats per token |",
            f"| perplexity | {found['perplexity']['mean']:.3f} (original {before['mean']:.3f}) |",
            f"| top-1 agreement | {100 * top1['mean']:.1f} % |",
        ]
    if not measured:
        lines.append("| measured | no: quantized with evaluation switched off |")
    lines += ["", "## Loading", "", *_loading(certificate["checkpoint_format"])]
    lines += ["", "`certificate.json` records how it was made and what was measured.", ""]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _loading(kind: str) -> list[str]:
    if kind == "gguf":
        return ["```", "llama-cli -m path/to/this/directory/model.gguf -p Hello", "```"]
    return [
        "```python",
        *(["import fewbits  # registers the format with transformers"] if kind == "fewbits" else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        "```",
    ]
