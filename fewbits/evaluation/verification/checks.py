"""A check and its verdict, and the report that holds them.

ok            looked at, and right
warning       works, but not as somebody may expect
failed        the runtime would refuse it, or compute something else
not checked   with the reason: a verdict nobody should take for a yes
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

OK, WARNING, FAILED, NOT_CHECKED = "ok", "warning", "failed", "not checked"
_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """mend: what to do about it; empty where there is nothing to mend."""

    name: str
    verdict: str
    detail: str
    mend: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    path: str
    runtime: str
    format: str
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.verdict != FAILED for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        counts = Counter(check.verdict for check in self.checks)
        return {**dataclasses.asdict(self), "passed": self.passed, "verdicts": dict(counts)}


def ok(name: str, detail: str) -> Check:
    return Check(name=name, verdict=OK, detail=detail)


def warning(name: str, detail: str, mend: str) -> Check:
    return Check(name=name, verdict=WARNING, detail=detail, mend=mend)


def failed(name: str, detail: str, mend: str) -> Check:
    return Check(name=name, verdict=FAILED, detail=detail, mend=mend)


def not_checked(name: str, detail: str) -> Check:
    return Check(name=name, verdict=NOT_CHECKED, detail=detail)


def some(names: Iterable[str]) -> str:
    """The first few of many names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
