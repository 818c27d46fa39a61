"""Embeddings rounded too: each row of the table to nearest, by its absmax, as LLM-FP4 has it.

    e' = Q(e; absmax(e))        one scale for each token of the vocabulary

The table is read by lookup, not by a product, so there is no output error to search on and no kernel to gain from. What
this step gives is the loss of a model whose embeddings are that coarse: the values are those of the format, and the
checkpoint stores them in the model's own dtype. A head that shares the table is rounded with it; behind `rotate`, which
gives the head a tensor of its own, it is not.
Source: Liu et al. 2023, "LLM-FP4: 4-bit Floating-Point Quantized Transformers", arXiv 2310.16836.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.algorithms.base import Rewritten
from fewbits.checkpoints.base import Source, TensorInfo
from fewbits.checkpoints.changed import ChangedSource
from fewbits.core.errors import BadInput
from fewbits.formats import Format, parse_format
from fewbits.models.topology import find_topology


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Rounds the table of embeddings to the format called `element`, one scale a row."""

    role: ClassVar[str] = "rewrite"
    statistics: ClassVar[frozenset[str]] = frozenset()

    element: str = "fp4_e2m1"

    def __post_init__(self) -> None:
        if "-" in self.element:
            raise BadInput(f"element {self.element!r}: an element alone, fp4_e2m1 or int8; scales are one a row")
        parse_format(f"{self.element}-channel")

    def rewrite(self, source: Source, kept: Callable[[str], bool], rounded: bool = False) -> Rewritten:
        """`source` with its embeddings rounded; as it is, and a note, for a family that no table lists."""
        topology = find_topology(source.config())
        if topology is None:
            kind = source.config().get("model_type")
            return Rewritten(
                source=source, notes=[f"embeddings: no table says where {kind} has them; left as they are"]
            )
        name, format = f"{topology.embeddings}.weight", parse_format(f"{self.element}-channel")
        shared = sorted(other for other, origin in source.tied().items() if origin == name)
        notes = [f"embeddings: {name} holds values of {format.name}, stored as they were"]
        notes += [f"embeddings: {other} is the same tensor and is rounded with it" for other in shared]
        return Rewritten(source=_Rounded(source, name, format), notes=notes)


class _Rounded(ChangedSource):
    """`inner` with one tensor rounded when it is read."""

    def __init__(self, inner: Source, name: str, format: Format) -> None:
        super().__init__(inner)
        self._name, self._format = name, format

    def info(self, name: str) -> TensorInfo:
        found = super().info(name)
        return dataclasses.replace(found, note=f"rounded to {self._format.name}") if name == self._name else found

    def tensor(self, name: str) -> Tensor:
        value = super().tensor(name)
        if name != self._name:
            return value
        return self._format.quantize(value.float(), name).dequantize().to(value.dtype)
