"""What a model's file holds: bytes and parameters by part, and which parts can be quantized.

    file size = sum over tensors of their stored bytes + headers and metadata

Parts are told by the names of the tensors. Parameters are counted in the model, where a matrix that two modules
share counts once; bytes are counted in the file, so the parts add up to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from fewbits.checkpoints.base import Source
from fewbits.models.walk import linears
from fewbits.pipeline.shell import ModelShell

HEADERS = "headers and metadata"
# Part -> what becomes of it, in the order of a model's forward pass.
PARTS = {
    "embeddings": "kept: rows are looked up, not multiplied",
    "attention": "quantized",
    "MLP": "quantized",
    "experts": "quantized",
    "routers": "kept: a small error sends a token to another expert",
    "norms": "kept: a few numbers per block",
    "head": "kept: fewbits quantizes the linears of the blocks",
    "other": "kept: not a linear of a block",
}
QUANTIZED = frozenset(part for part, why in PARTS.items() if why == "quantized")
_TIED = "kept: rows are looked up, not multiplied; the head shares them"


def classifier(shell: ModelShell) -> Callable[[str], str]:
    """Tensor name (of the model or of its file) -> part."""
    topology, names = shell.topology, {module: name for name, module in shell.model.named_modules()}
    embeddings = names.get(shell.model.get_input_embeddings())
    head = names.get(shell.model.get_output_embeddings())
    disk = topology.disk_name if topology else (lambda name: name)
    routers = {f"{prefix}.{name}" for prefix, _ in shell.blocks for name in (topology.routers if topology else ())}
    routers |= {disk(name) for name in routers}
    inside = tuple(f"{prefix}." for prefix, _ in shell.blocks)
    matrices = {
        f"{prefix}.{name}"
        for prefix, block in shell.blocks
        for ref in linears(block, topology)
        for name in (ref.name, ref.disk_name)
    }

    def part(name: str) -> str:
        module = name.rpartition(".")[0]
        if module in (embeddings, head):
            return "embeddings" if module == embeddings else "head"
        if module in routers or "router" in name:
            return "routers"
        if "norm" in module.rpartition(".")[2] or "norm" in name.rpartition(".")[2]:
            return "norms"
        if not name.startswith(inside):
            return "other"
        if "expert" in name:
            return "experts"
        if "attn" in name or "attention" in name:
            return "attention"
        return "MLP" if module in matrices else "other"

    return part


def sizes(source: Source, shell: ModelShell) -> list[dict[str, Any]]:
    """One row a part, in the order of PARTS, the file's headers last: parameters, bytes, what becomes of it."""
    part = classifier(shell)
    parameters: Counter[str] = Counter()
    for name, parameter in shell.model.named_parameters():  # a shared one comes once
        parameters[part(name)] += parameter.numel()
    tensors: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    types: dict[str, Counter[str]] = {}
    for name in source.names():
        info = source.info(name)
        found = part(name)
        tensors[found] += 1
        stored[found] += info.nbytes
        types.setdefault(found, Counter())[info.stored] += info.nbytes
    rows = [
        {
            "part": name,
            "tensors": tensors[name],
            "parameters": parameters[name],
            "bytes": stored[name],
            "stored": [kind for kind, _ in types.get(name, Counter()).most_common()],
            "quantized": name in QUANTIZED,
            "what": _TIED if name == "embeddings" and source.tied() else what,
        }
        for name, what in PARTS.items()
        if tensors[name] or parameters[name]
    ]
    rest = source.nbytes - sum(stored.values())
    return [*rows, {"part": HEADERS, "tensors": 0, "parameters": 0, "bytes": rest, "stored": [], "quantized": False,
                    "what": ""}]  # fmt: skip
