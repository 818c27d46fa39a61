"""What lets a killed run continue: files of what is finished, in a hidden directory beside the output.

`Unfinished` is that directory, of whatever run; `Journal` that of a quantization, with one file per finished block:

    .OUT.partial/run.json               what is being computed; a different run refuses to continue it
    .OUT.partial/choice.json            what `--method auto` chose, before anything is quantized
    .OUT.partial/block-00007.safetensors  codes, scales and records of block 7; its presence commits the block
    .OUT.partial/state-00007.safetensors  the hidden states that leave block 7, exact
    .OUT.partial/final/                  the checkpoint being assembled; renamed to OUT when complete

Files appear by rename, the state before the block, so a block that is there has its state there, and at any
moment at most the current block's work is lost. Only the newest state is kept. States are stored bit for
bit: a resumed run computes from the same numbers as an undisturbed one and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fewbits.checkpoints.base import read_json
from fewbits.checkpoints.safetensors_file import SafetensorsFile, write_stream
from fewbits.core.errors import BadInput
from fewbits.core.record import write_json

Streams = dict[str, list[Tensor]]
_LOCK = "lock"


def check_output(out: Path, before: Any = None, now: Mapping[str, Any] | None = None) -> None:
    """BadInput where there is something that a run would have to overwrite.

    before: the fingerprint of the finished run that `out` says it is of; now: that of the run to come.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    held = "exists and holds something else"
    if isinstance(before, dict) and now is not None:
        held = f"is finished, with other settings ({_changed(before, now)})"
    raise BadInput(f"{out} {held}; choose another output, or remove it first")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = dict.fromkeys([*now, *before])
    return ", ".join(key for key in keys if before.get(key) != now.get(key)) or "older version"


class Unfinished:
    """The unfinished output `out` of the run described by `fingerprint` (JSON-ready)."""

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self.out = out
        self.directory = out.parent / f".{out.name}.partial"
        self.final = self.directory / "final"
        self.fingerprint = json.loads(json.dumps(fingerprint))

    @contextlib.contextmanager
    def open(self, *, restart: bool) -> Iterator[Self]:
        """Locks the unfinished run, creating it or continuing one with the same fingerprint."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / _LOCK).touch()
        except OSError as error:
            raise BadInput(f"cannot write to '{self.out}': {error.strerror}; choose another output") from error
        with open(self.directory / _LOCK, "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadInput(
                    f"another process is writing {self.out}; wait for it or choose another output"
                ) from error
            self._claim(restart=restart)
            yield self

    def _claim(self, *, restart: bool) -> None:
        run = self.directory / "run.json"
        if restart:
            for path in self.directory.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()
        elif run.exists():
            before = read_json(run)
            if before != self.fingerprint:
                raise BadInput(
                    f"an unfinished run for {self.out} used other settings ({_changed(before, self.fingerprint)}); "
                    "repeat its command to finish it, or pass --restart to discard it"
                )
        write_json(run, self.fingerprint)

    def discard(self) -> None:
        """Removes everything of the unfinished run."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def publish(self) -> None:
        """Renames the assembled checkpoint to its final name and removes the rest."""
        if self.out.exists():
            self.out.rmdir()  # only ever an empty directory: anything else was refused at the start
        os.replace(self.final, self.out)
        self.discard()


class Journal(Unfinished):
    """The unfinished output of a quantization."""

    def block_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05}.safetensors"

    def _state_path(self, index: int) -> Path:
        return self.directory / f"state-{index:05}.safetensors"

    def finished(self) -> int:
        """How many blocks need not be done again (0 when nothing can be continued)."""
        count = 0
        while self.block_path(count).exists():
            count += 1
        return count if count and self._state_path(count - 1).exists() else 0

    def write(
        self, index: int, tensors: Mapping[str, Tensor], records: Sequence[dict[str, Any]], streams: Streams
    ) -> None:
        """Commits block `index`."""
        _write(self._state_path(index), _flat(streams))
        _write(self.block_path(index), tensors, {"records": json.dumps(records, allow_nan=False)})
        if index:
            self._state_path(index - 1).unlink(missing_ok=True)

    def rehearse(self, streams: Streams) -> None:
        """Writes `streams` as `write` would and removes them again, for whoever wants to know how long that takes."""
        path = self.directory / "rehearsal.safetensors"
        _write(path, _flat(streams))
        path.unlink()

    @property
    def _choice(self) -> Path:
        return self.directory / "choice.json"

    def choice(self) -> dict[str, Any] | None:
        """What was chosen for this run before it was interrupted."""
        if self._choice.exists():
            return read_json(self._choice)
        if self.finished():
            raise BadInput(
                f"{self._choice} is missing, and blocks of this run are there: pass --restart to discard them"
            )
        return None

    def choose(self, choice: dict[str, Any]) -> None:
        """Keeps `choice` for the run, however often it is interrupted."""
        write_json(self._choice, choice)

    def streams(self, index: int) -> Streams:
        """The hidden states that leave block `index`, in the order they were written."""
        file = SafetensorsFile(self._state_path(index))
        streams: Streams = {}
        for name in sorted(file.names()):
            streams.setdefault(name.rpartition(".")[0], []).append(file.tensor(name))
        return streams

    def records(self, index: int) -> list[dict[str, Any]]:
        """What was noted of the layers of block `index`."""
        found: list[dict[str, Any]] = json.loads(SafetensorsFile(self.block_path(index)).metadata["records"])
        return found


def _flat(streams: Streams) -> dict[str, Tensor]:
    return {
        f"{name}.{position:05}": tensor for name, batches in streams.items() for position, tensor in enumerate(batches)
    }


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    def provider(tensor: Tensor) -> Any:
        return lambda: tensor.detach().cpu().contiguous()

    items = [(name, t.dtype, tuple(t.shape), provider(t)) for name, t in tensors.items()]
    write_stream(path, items, metadata)
