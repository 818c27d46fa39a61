"""What a broken file may cost: a second, 200 MB, and an error that is ours; and which of the cases always run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fewbits.core.errors import FewbitsError

SECONDS = 1.0
BYTES = 200 << 20
TURNS = 3


def first_fast(cases: Iterable[Any]) -> list[Any]:
    """`cases` as parameters; all but the first go the same ways through the code, and are marked slow."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def _once(act: Callable[[], Any]) -> tuple[FewbitsError | None, float, int]:
    """What `act` raised, its CPU seconds and the bytes that it added to the process's peak.

    The peak counts torch's buffers too; Linux resets it on request.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, began = _resident("VmRSS"), time.process_time()
    raised = None
    try:
        act()
    except FewbitsError as error:
        raised = error
        assert str(error)
    return raised, time.process_time() - began, _resident("VmHWM") - before


def attempt(act: Callable[[], Any]) -> FewbitsError | None:
    """Runs `act`: the FewbitsError it raised, or None. Any other exception, a second or 200 MB more fail the test.

    An act that took too long is given two more turns, and the fastest counts: the collector walking the objects of a
    thousand tests, or threads of the test before still spinning, are charged to whoever runs then. The file's own
    cost comes back each time. Of memory the first turn alone counts.
    """
    raised, seconds, grown = _once(act)
    for _ in range(TURNS - 1):
        if seconds >= SECONDS:
            seconds = min(seconds, _once(act)[1])
    assert seconds < SECONDS, f"took {seconds:.2f} s"
    assert grown < BYTES, f"took {grown >> 20} MiB"
    return raised


def refused(act: Callable[[], Any]) -> FewbitsError:
    """As `attempt`, and `act` must be refused."""
    error = attempt(act)
    assert error is not None, "it was taken"
    return error
