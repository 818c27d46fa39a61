"""A quantized checkpoint as a dense source: its quantized matrices are decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fewbits.checkpoints.base import TensorInfo
from fewbits.checkpoints.changed import ChangedSource
from fewbits.checkpoints.codecs import QuantizedModules


class DecodedSource(ChangedSource):
    """The source of `packed`, with the weights of `modules` (all by default) dense, in float32."""

    def __init__(self, packed: QuantizedModules, modules: Iterable[str] | None = None) -> None:
        super().__init__(packed.source)
        self._packed = packed
        decoded = packed.entries if modules is None else modules
        self._modules = {packed.entries[module].tensor: module for module in decoded}

    def names(self) -> list[str]:
        return sorted({*self._inner.names(), *self._modules})

    def info(self, name: str) -> TensorInfo:
        if name not in self._modules:
            return self._inner.info(name)
        value = self.tensor(name)  # a file need not say the shape elsewhere
        parts = self._packed.entries[self._modules[name]].parts
        stored = sum(self._inner.info(part).nbytes for part in parts)
        return TensorInfo(shape=tuple(value.shape), dtype=value.dtype, nbytes=stored, stored="quantized")

    def tensor(self, name: str) -> Tensor:
        if name in self._modules:
            return self._packed.dense(self._modules[name])
        return self._inner.tensor(name)
