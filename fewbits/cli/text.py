"""`--continuations N`: calibration windows that the original model has continued, kept beside the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbits.core.progress import OnProgress, Progress


def calibration_text(
    model: str,
    text: list[Path] | None,
    copies: int,
    out: Path,
    *,
    samples: int | None,
    sequence_length: int | None,
    seed: int,
    device: str | None,
    report: OnProgress,
) -> Any:
    """A TokenSet of the windows of `text` and `copies` continuations of each, from OUT.calibration.safetensors where a
    run before left the same there."""
    from fewbits.calibration.continuations import continued
    from fewbits.checkpoints.source import open_source
    from fewbits.core.errors import BadInput
    from fewbits.pipeline.job import calibration_tokens, choose_device
    from fewbits.runtime.load import load

    if copies < 0:
        raise BadInput(f"--continuations {copies}: take 0 or more")
    target, source = choose_device(device), open_source(model)
    windows = calibration_tokens(source, list(text) if text else None, samples, sequence_length, seed)
    asked = {"source": source.identity, "windows": windows.sha256, "copies": copies, "seed": seed}
    path = Path(f"{out}.calibration.safetensors")
    if (kept := read_windows(path, asked)) is not None:
        return kept
    report(Progress("continue", 0, 1, "loading the original"))
    original, _ = load(model, target)
    found = continued(original, windows, copies, seed=seed, report=report)
    write_windows(path, found, asked)
    return found


def read_windows(path: Path, asked: dict[str, Any]) -> Any:
    """The windows in `path` if they answer to `asked` and are whole, else None."""
    from safetensors import SafetensorError, safe_open

    from fewbits.calibration.data import TokenSet, ids_sha256

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata, ids = file.metadata() or {}, file.get_tensor("ids")
        description = json.loads(metadata["description"])
        same = json.loads(metadata["asked"]) == json.loads(json.dumps(asked))
    except (SafetensorError, KeyError, ValueError):
        return None
    digest = ids_sha256(ids)
    return (
        TokenSet(ids=ids, sha256=digest, description=description) if same and digest == description["sha256"] else None
    )


def write_windows(path: Path, tokens: Any, asked: dict[str, Any]) -> None:
    """Keeps `tokens` in `path`, under what was asked for."""
    from safetensors.torch import save_file

    from fewbits.core.record import atomic_path

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"description": json.dumps(tokens.description), "asked": json.dumps(asked)}
    with atomic_path(path) as temporary:
        save_file({"ids": tokens.ids}, temporary, metadata=metadata)
