"""`verify`: every check in order, each with a verdict, none of them fatal for the others.

A check that raises has found damage: its message is the verdict. Where the directory cannot be opened at all there is
one verdict, and nothing else is checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import FewbitsError, unknown
from fewbits.core.progress import OnProgress, Progress
from fewbits.evaluation.verification import numbers, static
from fewbits.evaluation.verification.checks import Check, Verification, failed, not_checked, ok
from fewbits.evaluation.verification.model import Subject
from fewbits.evaluation.verification.runtimes import GGUF, RUNTIMES, Runtime


def verify(
    path: str | os.PathLike[str],
    runtime: str = "transformers",
    *,
    source: str | os.PathLike[str] | None = None,
    progress: OnProgress = lambda event: None,
) -> Verification:
    """Checks that `path` loads and decodes right in `runtime` (transformers, vllm, llama.cpp or mlx).

    source: the original model, to compare decoded weights and a few logits with. BadInput for an unknown runtime, a
    source that cannot be opened or a `path` that is not there; damage in `path` is a verdict.
    """
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES)
    reference = None if source is None else open_source(source)
    began, target = time.monotonic(), RUNTIMES[runtime]
    try:
        opened = open_source(path, allow_quantized=True)
        subject = Subject(opened)
        kind = subject.format
    except FewbitsError as error:
        if not os.path.exists(path):
            raise
        damage = failed("files", str(error), "write or download the checkpoint again")
        return Verification(path=os.fspath(path), runtime=runtime, format="?", checks=(damage,), seconds=0.0)
    steps = _steps(subject, target, reference)
    checks: list[Check] = []
    for number, (name, step) in enumerate(steps.items()):
        progress(Progress(f"verify for {runtime}", number, len(steps), name))
        checks += _verdicts(name, step)
    progress(Progress(f"verify for {runtime}", len(steps), len(steps), ""))
    return Verification(
        path=os.fspath(path), runtime=runtime, format=kind, checks=tuple(checks), seconds=time.monotonic() - began
    )


def _verdicts(name: str, step: Callable[[], Check | list[Check]]) -> list[Check]:
    try:
        found = step()
    except FewbitsError as error:
        return [failed(name, str(error), "see the message; `fewbits quantize` or `convert` writes sound files")]
    return found if isinstance(found, list) else [found]


def _steps(
    subject: Subject, runtime: Runtime, reference: Source | None
) -> dict[str, Callable[[], Check | list[Check]]]:
    steps: dict[str, Callable[[], Check | list[Check]]] = {
        "files": partial(_files, subject),
        "format": partial(static.check_format, subject, runtime),
        "dtype": partial(static.check_dtype, subject, runtime),
        "rope": partial(static.check_rope, subject, runtime),
        **{name: partial(check, subject) for name, check in static.SETTINGS.items()},
        "fused shards": partial(numbers.check_fused, subject, runtime),
        "tensor parallel": partial(static.check_parallel, subject, runtime),
        "scales": partial(numbers.check_scales, subject),
        "kernels": partial(static.check_kernels, subject, runtime),
    }
    if subject.format == GGUF:
        steps["gguf"] = lambda: list(static.check_gguf(subject))
    if reference is None:
        steps["decoded weights"] = lambda: not_checked("decoded weights", "give the original with --source")
    else:
        steps["decoded weights"] = partial(numbers.check_weights, subject, reference)
    steps["logits"] = partial(_logits, subject, runtime, reference)
    return steps


def _files(subject: Subject) -> Check:
    source = subject.source
    names = source.names()
    where = Path(source.path)
    kind = "a GGUF file" if isinstance(source, GGUFSource) else "config.json, weights and index agree"
    return ok("files", f"{kind}: {len(names)} tensors, {source.nbytes / 1e6:.1f} MB in {where.name}")


def _logits(subject: Subject, runtime: Runtime, reference: Source | None) -> list[Check]:
    """Logits of the decoded weights beside the source's and the runtime's."""
    large = numbers.too_large(subject)
    if large is not None:
        return [not_checked("logits", f"the model takes {large}; compare with `fewbits eval`")]
    ids = numbers.prompt(subject)
    ours: Tensor = numbers.logits(numbers.decoded_model(subject), ids)
    if not bool(ours.isfinite().all()):
        return [failed("logits", "NaN or infinite", "a weight or a norm is damaged: see the other checks")]
    if reference is None:
        first = ok("logits", f"finite over {ids.shape[1]} tokens; give the original with --source to compare")
    else:
        first = numbers.check_logits(subject, ours, ids, reference)
    name = f"runs in {runtime.name}"
    if subject.format not in runtime.formats:
        return [first, not_checked(name, "it does not read this format")]
    return [first, *_verdicts(name, partial(numbers.check_runtime, subject, runtime, ours, ids))]
