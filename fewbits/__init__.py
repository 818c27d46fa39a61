"""fewbits makes a large language model small and fast on the hardware at hand, and proves what that cost.

    import fewbits
    out = fewbits.quantize("path-or-id", "W4A16", group_size=64, out="dir")
    model, tokenizer = fewbits.load("dir")              # an ordinary transformers model
    fewbits.evaluate("dir", against="path-or-id").kl    # mean, stderr, median, p99
    fewbits.format("nf4-g64").quantize(weight)          # any tensor, any format

Names are resolved on first use: importing fewbits imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fewbits.integrations.on_import import install as _teach_transformers

if TYPE_CHECKING:
    from fewbits.evaluation import evaluate
    from fewbits.formats import parse_format as format
    from fewbits.pipeline.quantize import quantize
    from fewbits.runtime.load import load

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "format", "load", "quantize"]

_PUBLIC = {
    "evaluate": "fewbits.evaluation:evaluate",
    "format": "fewbits.formats:parse_format",
    "load": "fewbits.runtime.load:load",
    "quantize": "fewbits.pipeline.quantize:quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# From here on transformers loads native checkpoints: at once if it is imported already, else when it is.
_teach_transformers()
