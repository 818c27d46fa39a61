"""What is checked, opened once: the source, its quantized modules, the model that config.json describes."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Dense, Layer, QuantizedModules, Stored, StoredMix, quantized_modules
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.evaluation.verification.runtimes import DENSE, GGUF
from fewbits.models.skeleton import skeleton
from fewbits.models.topology import SHARED_INPUTS, Topology, find_topology
from fewbits.models.walk import ExpertRef, blocks, linears


@dataclasses.dataclass
class Subject:
    """A checkpoint under verification."""

    source: Source
    _layers: dict[str, Layer | None] = dataclasses.field(default_factory=dict)

    @cached_property
    def modules(self) -> QuantizedModules:
        return quantized_modules(self.source)

    @property
    def format(self) -> str:
        return GGUF if isinstance(self.source, GGUFSource) else self.modules.name or DENSE

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.source.config()

    @cached_property
    def quantization(self) -> dict[str, Any]:
        found = self.config.get("quantization_config") or self.config.get("quantization") or {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def topology(self) -> Topology | None:
        return find_topology(self.config)

    @cached_property
    def skeleton(self) -> nn.Module:
        return skeleton(self.config)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name on disk -> [out, in] of every matrix of the blocks, experts included; routers left out."""
        found = {}
        for prefix, block in blocks(self.skeleton, self.topology):
            for ref in linears(block, self.topology):
                found[f"{prefix}.{ref.disk_name}"] = (ref.shape[0], ref.shape[1])
        return found

    @cached_property
    def experts(self) -> dict[str, tuple[str, int]]:
        """Name on disk -> (which matrix of which block, number of the expert)."""
        return {
            f"{prefix}.{ref.disk_name}": (f"{prefix}.{ref.part}", ref.index)
            for prefix, block in blocks(self.skeleton, self.topology)
            for ref in linears(block, self.topology)
            if isinstance(ref, ExpertRef)
        }

    def fused(self) -> list[list[str]]:
        """Matrices that a fusing runtime computes as one: siblings that read the same input."""
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for name in self.matrices:
            parent, _, kind = name.rpartition(".")
            for shared in self.topology.shared_inputs if self.topology else SHARED_INPUTS:
                if kind in shared and len(shared) > 1:
                    groups.setdefault((parent, shared), []).append(name)
        return [group for group in groups.values() if len(group) > 1]

    def read(self, module: str) -> Stored | StoredMix | Dense:
        """A quantized module."""
        found = self.modules.read(module)
        self._layers[module] = found.layer if isinstance(found, Stored) else None
        return found

    def stored(self, module: str) -> Stored | None:
        """A quantized module, or None for one that is decoded or dense."""
        if module not in self.modules.entries:
            return None
        found = self.read(module)
        return found if isinstance(found, Stored) else None

    def layer(self, module: str) -> Layer | None:
        """What a quantized module is; None for one that is decoded. It is not read again."""
        if module not in self._layers:
            self.read(module)
        return self._layers[module]

    def weight(self, module: str) -> Tensor:
        """The decoded weight, float32."""
        if module in self.modules.entries:
            return self.modules.dense(module)
        return self.source.tensor(f"{module}.weight").float()
