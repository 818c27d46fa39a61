"""What a study writes down: plain JSON, from which its figures and its page can be drawn again anywhere.

    {"study": "formats", "fewbits": version, "environment": {...}, "seconds": 8.1, "settings": {...},
     "sources": ["Author year, arXiv ..."], "results": {...}}

`results` is the study's own; everything else is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.core.record import environment, versions

Record = dict[str, Any]


def record(
    study: str,
    *,
    settings: Mapping[str, Any],
    sources: Sequence[str],
    results: Mapping[str, Any],
    seconds: float,
) -> Record:
    """The record of `study`; `results` and `settings` must be what JSON can say (no NaN, no infinity)."""
    return {
        "study": study,
        "fewbits": versions().get("fewbits", ""),
        "environment": environment(),
        "seconds": round(seconds, 1),
        "settings": dict(settings),
        "sources": list(sources),
        "results": dict(results),
    }
