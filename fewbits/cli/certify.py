"""Adding measurements to the certificate a quantized directory carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbits.core.errors import BadInput
from fewbits.core.record import write_json

NAME = "certificate.json"


def read_certificate(directory: Path) -> dict[str, Any]:
    """The certificate of `directory`; BadInput where there is none that can be read."""
    path = directory / NAME
    if not path.is_file():
        raise BadInput(f"'{directory}' has no {NAME}; pass a directory that `fewbits quantize` wrote")
    try:
        certificate = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"'{path}' is not valid JSON ({error}); quantize again") from error
    if not isinstance(certificate, dict):
        raise BadInput(f"'{path}' holds a {type(certificate).__name__}, not an object; quantize again")
    return certificate


def add_to_certificate(directory: Path, **lists: list[dict[str, Any]]) -> None:
    """Extends the lists of that name in the certificate, and rewrites the model card from it.

    An entry equal to an earlier one replaces it. Equal means: the same label, text and kind of measurement (an
    evaluation), or the same prompt (a sample).
    """
    from fewbits.pipeline.output import write_card  # brings torch: not for `fewbits --help`

    certificate = read_certificate(directory)
    for name, entries in lists.items():
        keys = [_key(entry) for entry in entries]
        kept = [entry for entry in certificate.get(name, []) if _key(entry) not in keys]
        certificate[name] = [*kept, *entries]
    write_json(directory / NAME, certificate)
    write_card(directory, certificate)


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return (
        entry.get("prompt"),
        str(entry.get("what")).lower(),
        (entry.get("text") or {}).get("sha256"),
        "kl" in entry and entry["kl"] is not None,
    )
