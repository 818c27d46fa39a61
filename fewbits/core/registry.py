"""Ordered tables of strings, resolved on first use.

A registry maps a name to ``"package.module:attribute"``. Order is preference; grep finds the entry;
the module is imported only when its name is asked for, so an optional dependency costs nothing until
picked. Contract tests iterate the same tables, so one line enrols a thing in all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from fewbits.core.errors import unknown


class Registry:
    """An ordered, lazily imported table of named things of one `kind` ("method", "kernel", ...)."""

    def __init__(self, kind: str, table: dict[str, str]) -> None:
        self.kind = kind
        self._table = dict(table)
        self._loaded: dict[str, Any] = {}

    def names(self) -> list[str]:
        return list(self._table)

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def get(self, name: str) -> Any:
        """The thing registered as `name`; `BadInput` listing the known names if there is none."""
        if name not in self._table:
            raise unknown(self.kind, name, self._table)
        if name not in self._loaded:
            module, _, attribute = self._table[name].partition(":")
            self._loaded[name] = getattr(importlib.import_module(module), attribute)
        return self._loaded[name]

    def items(self) -> Iterator[tuple[str, Any]]:
        return ((name, self.get(name)) for name in self._table)
