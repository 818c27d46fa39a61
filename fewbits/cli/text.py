"""`--continuations N`: calibration windows that the original model has continued, kept beside the output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.core.progress import OnProgress, Progress

if TYPE_CHECKING:
    from fewbits.calibration.data import TokenSet


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
) -> TokenSet:
    """The windows of `text` and `copies` continuations of each, from OUT.calibration.safetensors where a
    run before left the same there."""
    from fewbits.calibration.continuations import continued
    from fewbits.calibration.data import read_tokens, write_tokens
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
    if (kept := read_tokens(path, asked)) is not None:
        return kept
    report(Progress("continue", 0, 1, "loading the original"))
    original, _ = load(model, target)
    found = continued(original, windows, copies, seed=seed, report=report)
    write_tokens(path, found, asked)
    return found
