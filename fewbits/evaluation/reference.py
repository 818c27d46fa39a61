"""The original model's predictions, kept on disk so that the two models are never in memory together.

Kept in one of two ways, whichever the model allows:

    "hidden states"      the inputs of the head, float32 [tokens, hidden], and the head itself. The logits are
                         computed again in float32 when read: nothing is rounded, and 8192 tokens of a 135M
                         model take 19 MB + 113 MB where their logits would take 1.6 GB.
    "log-probabilities"  float16 [tokens, vocabulary], for models that change the logits after the head (see
                         `forward.py`). Rows are normalised in float32 before they are rounded and again when
                         read. A log-probability l keeps 11 bits, |error| <= |l| / 2048: likely tokens, which
                         carry the weight of the KL, are kept best. Rounding is unbiased, so it mostly cancels
                         in the mean over the vocabulary: measured, below 1e-5 nats on the mean KL and below
                         1e-3 on any one token (tests/unit/test_evaluation.py).

Both files are plain little-endian arrays in a temporary directory that is removed on `close`, on leaving the
`with` block, and at the latest when the interpreter exits. The space is checked before the first byte.
"""

from __future__ import annotations

import errno
import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.calibration.data import TokenSet
from fewbits.core.errors import FewbitsError
from fewbits.core.units import bytes_text
from fewbits.evaluation.forward import Forward
from fewbits.metrics import nll

Progress = Callable[[str, int, int], None]  # (stage, done, total), in windows

EXACT, ROUNDED = "hidden states", "log-probabilities"
_WAY_OUT = "set TMPDIR to a larger disk, or pass fewer --samples"


class Reference:
    """What the original predicts on `tokens`; pass it as `against` to measure several models against it.

    name: of the original. tokens: the windows. vocabulary: of the logits. tokenizer: the original's.
    nll: float32 [samples, sequence_length - 1]. top1: int64 [samples, sequence_length], the argmax.
    store: "hidden states" or "log-probabilities".
    """

    def __init__(
        self,
        forward: Forward,
        tokenizer: Any,
        tokens: TokenSet,
        *,
        directory: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Runs the model over `tokens` and keeps what it predicts under a new folder in `directory`.

        directory: None for the system's temporary directory. Raises `FewbitsError` when space runs out.
        """
        self.name, self.tokens, self.tokenizer = forward.name, tokens, tokenizer
        self.vocabulary, self.device = forward.vocabulary, forward.device
        head: Any = forward.head
        self.store = EXACT if forward.separable and type(head) is nn.Linear else ROUNDED
        self._width = head.in_features if self.store == EXACT else self.vocabulary
        self._bias: torch.Tensor | None = None
        self._loaded_head: torch.Tensor | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="fewbits-reference-", dir=directory))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        try:
            with _out_of_space(self._folder):
                self._check_space(head)
                if self.store == EXACT:
                    self._record_head(head)
                self._record(forward, progress)
        except BaseException:
            self.close()
            raise

    # ---- writing

    def _check_space(self, head: nn.Linear) -> None:
        count = self.tokens.tokens
        needed = 4 * (count * self._width + head.weight.numel()) if self.store == EXACT else 2 * count * self.vocabulary
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise FewbitsError(
                f"the reference's predictions on {count} tokens take {bytes_text(needed)} and "
                f"{self._folder.parent} has {bytes_text(free)} free; {_WAY_OUT}"
            )

    def _record(self, forward: Forward, progress: Progress | None) -> None:
        count, length = self.tokens.ids.shape
        self.nll = torch.zeros(count, length - 1)
        self.top1 = torch.zeros(count, length, dtype=torch.int64)
        with open(self._folder / "rows", "wb") as file:
            for window, ids in enumerate(self.tokens.ids):
                states = forward.hidden(ids) if self.store == EXACT else None
                if states is not None:
                    _append(file, states.float())
                for rows, logits in forward.slabs(ids, states):
                    if states is None:
                        _append(file, torch.log_softmax(logits, dim=-1).to(torch.float16))
                    self.nll[window, rows] = slab_nll(ids, rows, logits)
                    self.top1[window, rows] = logits.argmax(dim=-1).cpu()
                if progress is not None:
                    progress("reference", window + 1, count)

    def _record_head(self, head: nn.Linear) -> None:
        with open(self._folder / "head", "wb") as file:
            _append(file, head.weight.detach().float())
        self._bias = None if head.bias is None else head.bias.detach().float().cpu()

    # ---- reading

    def logits(self, window: int, rows: slice, device: torch.device) -> torch.Tensor:
        """float32 [rows, vocabulary] on `device`, up to a constant a row: logits or log-probabilities."""
        start = window * self.tokens.ids.shape[1] + rows.start
        data = self._rows[start : start + rows.stop - rows.start].to(device).float()
        if self.store == ROUNDED:
            return data
        bias = None if self._bias is None else self._bias.to(device)
        return nn.functional.linear(data, self._head(device), bias)

    @functools.cached_property
    def _rows(self) -> torch.Tensor:
        dtype = torch.float32 if self.store == EXACT else torch.float16
        return _map(self._folder / "rows", dtype, (self.tokens.tokens, self._width))

    def _head(self, device: torch.device) -> torch.Tensor:
        if self._loaded_head is None or self._loaded_head.device != device:
            shape = (self.vocabulary, self._width)
            self._loaded_head = _map(self._folder / "head", torch.float32, shape).to(device)
        return self._loaded_head

    # ---- life

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self._folder.iterdir()) if self._folder.exists() else 0

    def close(self) -> None:
        """Removes the files; the reference cannot be read afterwards."""
        self._loaded_head = None
        self.__dict__.pop("_rows", None)
        self._remove()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _map(path: Path, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_file(str(path), shared=False, size=shape[0] * shape[1], dtype=dtype).view(shape)


def _append(file: Any, values: torch.Tensor) -> None:
    file.write(memoryview(values.detach().cpu().contiguous().numpy()).cast("B"))


def slab_nll(ids: torch.Tensor, rows: slice, logits: torch.Tensor) -> torch.Tensor:
    """-log p of the token after each of `rows`; the last token of the window has none."""
    targets = ids[rows.start + 1 : rows.stop + 1]
    return nll(logits[: len(targets)], targets).cpu()


@contextmanager
def _out_of_space(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FewbitsError(f"no space left in {folder.parent} for the reference's predictions; {_WAY_OUT}") from error
