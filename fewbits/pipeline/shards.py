"""The shards of a conversion: they let a killed one continue, and end in the bytes of an undisturbed one.

    .OUT.partial/part-00003.safetensors   the tensors of some items (a layer, a tensor that stays), up to a size
    .OUT.partial/part-00003.json          what was noted of these items, one by one; its presence commits the part
    .OUT.partial/final/                   as in journal.py

An item never lies in two parts, so the committed ones say with which item to go on; and since the sizes of items alone
decide where a part ends, the run that continues cuts as the undisturbed one does. How many parts there are is known
once the last is written. They then get their names in `final`, where a run that is killed between two renames finds
the first ones.

A part is written by a thread while the next one is gathered, so that disk and decoding do not wait for each other; two
parts are in memory then. One thread, so parts are committed in order.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fewbits.checkpoints.base import read_json
from fewbits.checkpoints.safetensors_file import SafetensorsFile, write_stream
from fewbits.core.errors import BadInput
from fewbits.core.record import write_json
from fewbits.pipeline.journal import Unfinished

Note = dict[str, Any]  # JSON


class Shards(Unfinished):
    """Items gathered until their tensors fill `limit` bytes, then committed."""

    def __init__(self, out: Path, fingerprint: Note, limit: int) -> None:
        super().__init__(out, fingerprint)
        self.limit = limit
        self._tensors: dict[str, Tensor] = {}  # of the items that are not committed yet
        self._notes: list[Note] = []
        self._parts: list[list[str]] = []  # the names of the tensors of each committed part
        self._total = 0
        self._writer: ThreadPoolExecutor
        self._writing: Future[None] | None = None

    @contextlib.contextmanager
    def open(self, *, restart: bool) -> Iterator[Self]:
        # The thread ends before the lock is given up: nobody else can meet a part that it is still writing.
        with super().open(restart=restart), ThreadPoolExecutor(1, "shards") as self._writer:
            yield self

    def discard(self) -> None:
        with contextlib.suppress(Exception):  # what is to be removed may as well have failed
            self._wait()
        super().discard()

    def resume(self) -> list[Note]:
        """The notes of the items that need not be done again, in order."""
        notes: list[Note] = []
        while (found := self._committed(len(self._parts))) is not None:
            file, of_items = found
            self._parts.append(list(file.tensors))
            self._total += sum(info.nbytes for info in file.tensors.values())
            notes += of_items
        return notes

    def _committed(self, number: int) -> tuple[SafetensorsFile, list[Note]] | None:
        """Part `number` and its notes; None where there is none, or where not all of it reached the disk."""
        try:
            return SafetensorsFile(self._place(number)), read_json(self._record(number))["items"]
        except BadInput:
            return None

    def add(self, tensors: dict[str, Tensor], note: Note) -> None:
        """The next item; `resume` gives its note back once it is on disk."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and sum(tensor.nbytes for tensor in self._tensors.values()) + size > self.limit:
            self._commit()
        self._tensors |= tensors
        self._notes.append(note)

    def _commit(self) -> None:
        """Gives the gathered items to the writer, once it is done with those before."""
        self._wait()
        self._writing = self._writer.submit(self._write, len(self._parts), self._tensors, self._notes)
        self._parts.append(list(self._tensors))
        self._total += sum(tensor.nbytes for tensor in self._tensors.values())
        self._tensors, self._notes = {}, []

    def _write(self, number: int, tensors: dict[str, Tensor], notes: list[Note]) -> None:
        items = [(name, value.dtype, tuple(value.shape), lambda v=value: v) for name, value in tensors.items()]
        write_stream(self._part(number), items, {"format": "pt"})
        write_json(self._record(number), {"items": notes})

    def _wait(self) -> None:
        """Until the part that is being written is committed; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number:05}.safetensors"

    def _record(self, number: int) -> Path:
        return self._part(number).with_suffix(".json")

    def _place(self, number: int) -> Path:
        """Where part `number` is: in `final` under its new name, or still under its own."""
        moved = [*self.final.glob(f"model-{number + 1:05}-of-*.safetensors")]
        moved += [self.final / "model.safetensors"] if number == 0 else []
        part = self._part(number)
        return part if part.exists() else next((path for path in moved if path.exists()), part)

    def finish(self) -> int:
        """Moves the shards to `final`, which then holds them and their index alone; the bytes of all tensors."""
        if self._tensors:
            self._commit()
        self._wait()
        self.final.mkdir(exist_ok=True)
        count, weight_map = len(self._parts), {}
        for number, tensors in enumerate(self._parts):
            name = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
            os.replace(self._place(number), self.final / name)
            weight_map.update(dict.fromkeys(tensors, name))
        for path in set(self.final.iterdir()) - {self.final / name for name in weight_map.values()}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # half of what a killed run wrote beside them
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.final / "model.safetensors.index.json", index)
        return self._total
