"""Registers fewbits with transformers when, and only when, transformers' quantizers are imported.

`import fewbits` has to make ``AutoModelForCausalLM.from_pretrained`` understand the native format, yet
importing transformers' quantizers here would cost every use of fewbits 3.5 seconds (measured; 2 for torch
alone), and most uses never call it. transformers looks quantization methods up in a dictionary of one module,
``transformers.quantizers.auto``; so if that module is loaded already, registration happens at once, and if
not, a finder on `sys.meta_path` waits for it, lets the ordinary import run, registers, and is gone.

Trade-off: an import hook is machinery; in exchange nothing is paid before it is needed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

AWAITED = "transformers.quantizers.auto"


def install() -> None:
    """Arranges the registration; calling it again changes nothing."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from fewbits.integrations.transformers_plugin import register

    register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: for the awaited module it wraps the loader that the others find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        _register()
