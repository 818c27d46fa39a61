"""Model topology: written once per family, read by everything that must know how tensors hang together.

A `Topology` says where the blocks are, which norm feeds which linears, which linears read the same input
(they can share statistics, a scale or one fused kernel), which modules route tokens, how experts lie on
disk, and what GGUF calls each tensor. Names are relative: to the model (`embeddings`, `final_norm`, `head`,
`blocks`) or to a block (everything else).

A new family is one `Topology` in a module of this package and one line in `TOPOLOGIES`. A model whose
`model_type` no table lists is still walked and quantized (`walk.py`); it only gets no transforms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from fewbits.core.registry import Registry

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # as a rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """Experts that the running model fuses into 3-D parameters while the checkpoint keeps them apart.

    In the model, `module` (relative to a block) owns ``gate_up_proj`` [E, 2I, H] and ``down_proj``
    [E, H, I]; on disk each expert's matrices are tensors of their own, named `disk` with the expert's number
    and part filled in.
    """

    module: str = "mlp.experts"
    disk: str = "mlp.experts.{expert}.{part}"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def disk_name(self, expert: int, part: str) -> str:
        """The module name on disk, relative to the block; `part` is gate_proj, up_proj or down_proj."""
        spelled = {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}[part]
        return self.disk.format(expert=expert, part=spelled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFLayout:
    """How llama.cpp writes the family. `names` maps GGUF module names to ours, in blocks relative to
    ``blk.N``; `permuted` lists the projections whose rows llama.cpp reorders (see gguf_source)."""

    architecture: str
    names: tuple[tuple[str, str], ...]
    experts: tuple[tuple[str, str], ...] = ()  # 3-D GGUF tensor -> expert part
    vectors: tuple[str, ...] = ()  # our modules whose matrix of one row is a vector there
    permuted: tuple[str, ...] = ()
    writes: tuple[str, ...] | None = None  # model types that llama.cpp computes so; None: all of the family
    norm_offset: float = 0.0  # what GGUF's norm weights have more than the model's
    activation: tuple[str, ...] = ("silu", "swish")  # the one llama.cpp computes, by its names in config.json
    fixed: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # field of config.json -> the values that llama.cpp computes
    # with; the first is transformers' default, and what a file is read back with
    scales: tuple[tuple[str, str], ...] = ()  # key there -> field of config.json: factors, 1 where they are not given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """One family of models. See the module's docstring for what the names are relative to."""

    name: str
    model_types: tuple[str, ...]
    norms: tuple[tuple[str, tuple[str, ...]], ...]  # norm -> the linears that read its output
    shared_inputs: tuple[tuple[str, ...], ...] = (
        SHARED_INPUTS  # last components of module names; siblings of one parent that read the same input
    )
    products: tuple[tuple[str, str], ...] = (
        ("self_attn.v_proj", "self_attn.o_proj"),
        ("*up_proj", "*down_proj"),
    )  # (writer, reader), patterns: a scale on the writer's rows comes out as one on the reader's columns
    writers: tuple[str, ...] = ("self_attn.o_proj", "*down_proj")  # patterns: linears that add to the residual stream
    value_output: tuple[str, str] | None = ("self_attn.v_proj", "self_attn.o_proj")  # a head apart, nothing but
    # the average of attention between them
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    routers: tuple[str, ...] = ()
    experts: ExpertLayout | None = None
    renamed: tuple[tuple[str, str], ...] = ()  # (part of a model's tensor name, the same on disk)
    gguf: GGUFLayout | None = None

    def disk_name(self, name: str) -> str:
        """The checkpoint's name for the model's parameter `name` (fused experts apart)."""
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name


TOPOLOGIES = Registry(
    "model family",
    {
        "llama": "fewbits.models.llama:LLAMA",
        "granite": "fewbits.models.llama:GRANITE",
        "smollm3": "fewbits.models.llama:SMOLLM3",
        "qwen2": "fewbits.models.llama:QWEN2",
        "qwen3": "fewbits.models.llama:QWEN3",
        "olmo2": "fewbits.models.llama:OLMO2",
        "phi3": "fewbits.models.phi3:PHI3",
        "gemma": "fewbits.models.gemma:GEMMA",
        "gemma2": "fewbits.models.gemma:GEMMA2",
        "gemma3_text": "fewbits.models.gemma:GEMMA3",
        "qwen3_moe": "fewbits.models.moe:QWEN3_MOE",
        "qwen2_moe": "fewbits.models.moe:QWEN2_MOE",
        "olmoe": "fewbits.models.moe:OLMOE",
        "mixtral": "fewbits.models.moe:MIXTRAL",
    },
)


def topologies() -> Iterator[Topology]:
    """All tables, in order."""
    for _, found in TOPOLOGIES.items():
        yield found


def find_topology(config: dict[str, Any]) -> Topology | None:
    """The table for the family of this ``config.json``; None when no table lists its ``model_type``."""
    model_type = config.get("model_type")
    return next((found for found in topologies() if model_type in found.model_types), None)


def gguf_topology(architecture: str, *, experts: bool = False) -> Topology | None:
    """The table for a GGUF ``general.architecture``; `experts` tells llama from mixtral, which share one."""
    for found in topologies():
        layout = found.gguf
        if layout and layout.architecture == architecture and bool(layout.experts) == experts:
            return found
    return None
