"""Errors that name the value, the allowed set and the way out.

Every error a user can cause is a `FewbitsError`; its `exit_code` is what the command line returns:
2 for bad input (the user can mend it by changing what they passed), 1 for a run that failed.
`assert` is kept for our own mistakes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: BaseException, most: int = 120) -> str:
    """What kind of error it was and the first line of what it said, in one line."""
    said = str(error).splitlines()
    return f"{type(error).__name__}: {said[0][:most]}" if said else type(error).__name__


class FewbitsError(Exception):
    """A run that failed for a reason the message explains."""

    exit_code = 1


class BadInput(FewbitsError, ValueError):
    """What was passed cannot be used; the message says what can."""

    exit_code = 2


class Unsupported(BadInput):
    """Well-formed, but not something fewbits can do; the message gives the way out."""


class MissingExtra(BadInput, ImportError):
    """An optional dependency is needed and absent.

    `extra` is the name in ``pip install 'fewbits[extra]'``.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}': pip install 'fewbits[{extra}]'")
        self.package, self.extra = package, extra


_SHOWN = 24  # names an error lists; a longer list is cut, nearest first


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """`known` reordered so that the names most like `name` come first."""
    return sorted(
        known,
        key=lambda other: (
            -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio(),
            other,
        ),
    )


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name no table holds; lists the known ones, nearest first."""
    names = nearest_first(name, known)
    shown = names if len(names) <= _SHOWN else [*names[:_SHOWN], f"and {len(names) - _SHOWN} more"]
    return BadInput(f"unknown {kind} {name!r}; known: {', '.join(shown)}")
