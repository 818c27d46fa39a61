"""A source that stands for another one, some of whose tensors it changes as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewbits.checkpoints.base import Source, TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChangedSource:
    """Answers as `inner` does; a subclass says what is different."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.path, self.dtype, self.nbytes = inner.path, inner.dtype, inner.nbytes

    @property
    def identity(self) -> str:
        return self._inner.identity

    def config(self) -> dict[str, Any]:
        return self._inner.config()

    def generation_config(self) -> dict[str, Any] | None:
        return self._inner.generation_config()

    def names(self) -> list[str]:
        return self._inner.names()

    def info(self, name: str) -> TensorInfo:
        return self._inner.info(name)

    def tensor(self, name: str) -> Tensor:
        return self._inner.tensor(name)

    def tied(self) -> dict[str, str]:
        return self._inner.tied()

    def companion_files(self) -> list[Path]:
        return self._inner.companion_files()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._inner.load_tokenizer()
