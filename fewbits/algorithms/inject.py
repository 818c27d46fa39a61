"""Outliers put into a model that computes what it did: what a larger model has, in one small enough to measure.

    norm gain_j *= c (and bias_j),      W[:, j] /= c for every linear that reads the norm

Small language models have few of the outlier channels that make large ones hard to quantize, and no two models have
the same. Injected ones are a dial: at c = 100 channel j of every norm's output is a hundred times what it was, its
column of the weights a hundredth, and every product is the same to the last bits of float32. What a method then loses,
it loses to outliers alone. A step of this kind belongs in front of others: `--method inject,smoothquant`.

The tensors are changed as they are read, in float32; the original model they are compared with is the injected one.
Source: the observation is Dettmers et al. 2022 (arXiv 2208.07339), the dial that of Xiao et al. 2023 (arXiv 2211.10438)
turned backwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Rewritten
from fewbits.algorithms.rotate import readers_on_disk
from fewbits.checkpoints.base import Source, TensorInfo
from fewbits.checkpoints.changed import ChangedSource
from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.skeleton import skeleton
from fewbits.models.topology import find_topology
from fewbits.models.walk import blocks


@dataclass(frozen=True, kw_only=True)
class Inject:
    """Makes `channels` of every norm's output, chosen by `seed` and the same in all layers, `factor` times larger."""

    role: ClassVar[str] = "rewrite"
    statistics: ClassVar[frozenset[str]] = frozenset()

    factor: float = 30.0
    channels: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.factor > 0 or self.channels < 1:
            raise BadInput(f"{self}: needs a factor above 0 and at least 1 channel")

    def rewrite(self, source: Source, kept: Callable[[str], bool], rounded: bool = False) -> Rewritten:
        """`source` with larger channels; as it is, and a note, where no table says what reads its norms."""
        config = source.config()
        topology = find_topology(config)
        if topology is None or not topology.norms:
            kind = config.get("model_type")
            return Rewritten(source=source, notes=[f"inject: no table says what the norms of {kind} feed; no outliers"])
        width = int(config["hidden_size"])
        if self.channels > width:
            raise BadInput(f"{self.channels} outlier channels in a model of {width}; choose fewer")
        chosen = torch.randperm(width, generator=torch.Generator().manual_seed(self.seed))[: self.channels]
        s = torch.ones(width).index_fill(0, chosen, self.factor)
        changed: dict[str, Tensor] = {}
        stored = {*source.names(), *source.tied()}
        for prefix, block in blocks(skeleton(config), topology):
            for norm, readers in topology.norms:
                names = {f"{prefix}.{name}.weight": 1 / s for name in readers_on_disk(topology, block, readers)}
                absent = sorted(name for name in names if name not in stored)
                if absent:
                    raise Unsupported(f"{absent[0]} is fused in the source file; split the source first")
                gains = {topology.disk_name(f"{prefix}.{norm}.{kind}"): s for kind in ("weight", "bias")}
                changed |= names | {name: gain for name, gain in gains.items() if name in stored}
        found = ", ".join(map(str, sorted(chosen.tolist())))
        notes = [
            f"inject: channels {found} of every norm's output are {self.factor:g} times larger, by the same function"
        ]
        return Rewritten(source=_Injected(source, changed), notes=notes)


class _Injected(ChangedSource):
    """`inner` with the last dimension of some tensors multiplied when they are read."""

    def __init__(self, inner: Source, by: Mapping[str, Tensor]) -> None:
        super().__init__(inner)
        self._by = by

    def info(self, name: str) -> TensorInfo:
        found = super().info(name)
        if name not in self._by:
            return found
        return dataclasses.replace(found, dtype=torch.float32, note="outliers injected")

    def tensor(self, name: str) -> Tensor:
        value = super().tensor(name)
        return value.float() * self._by[name] if name in self._by else value
