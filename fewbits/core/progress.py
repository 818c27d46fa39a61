"""What a long run says while it works: plain values, so that no layer knows how they are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of `stage` are finished; `note` is about the step just done."""

    stage: str
    done: int
    total: int
    note: str = ""


OnProgress = Callable[[Progress], None]
