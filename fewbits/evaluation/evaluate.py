"""Perplexity, KL to the original and top-1 agreement on held-out text.

**Chunked.** The text is cut into windows that do not overlap and each is scored on its own, so the first
tokens of a window are predicted from little context: perplexity comes out higher than with a sliding window,
equally for both models, and every token costs one forward pass. Windows are few thousand tokens apart on
average, so they serve as the blocks of the standard errors (`metrics.estimate`).

**One model at a time.** The original goes over the windows first and its predictions are kept on disk
(`reference.py`); then the quantized model goes over the same windows and is compared as it goes. Both are
computed in float32 on a CPU, so that what is measured is the rounding of the weights and not that of bf16
activations; on an accelerator in the dtype of their checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbits.calibration.data import TextSpec, TokenSet, pack, read_texts
from fewbits.core import record
from fewbits.core.errors import BadInput
from fewbits.evaluation.forward import Forward, check_ids
from fewbits.evaluation.reference import Progress, Reference, slab_nll
from fewbits.formats.kv import KVFormat, parse_kv
from fewbits.metrics import block_estimate, kl, perplexity
from fewbits.metrics.result import Evaluation, by_position, divergence

SAMPLES, SEQUENCE_LENGTH = 16, 512

Model = Any  # a path, "demo" or hub id; a loaded model; or the pair (model, tokenizer)


def evaluate(
    model: Model,
    *,
    against: Model | Reference | None = None,
    text: TextSpec = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    what: str | None = None,
    kv: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures `model`, and how far it is from `against`.

    model, against: a model directory, GGUF file, "demo" or hub id; a loaded model; or (model, tokenizer).
    against may be a `Reference` made before (`remember`), which then settles text, samples, length and seed.
    text: as `calibration.data.read_texts`; None is the built-in text that calibration never sees.
    samples: windows; None takes up to 16. sequence_length: tokens a window, 512 by default.
    what: label of the result; the model's name by default. kv: how `model`, not the original, stores keys and values
    ("int4", see formats/kv.py). progress: called with (stage, done, total).
    Raises `BadInput` for unusable text or models that do not share a vocabulary.
    """
    options = {"text": text, "samples": samples, "sequence_length": sequence_length}
    cache = None if kv is None else parse_kv(kv)
    if isinstance(against, Reference):
        if given := [name for name, value in options.items() if value is not None]:
            raise BadInput(f"{', '.join(given)}: settled by the reference passed as `against`; leave out")
        return _measure(model, against, against.tokens, what, cache, device, progress)
    if against is None:
        return _measure(model, None, None, what, cache, device, progress, seed=seed, **options)
    with remember(against, seed=seed, device=device, progress=progress, **options) as reference:
        return _measure(model, reference, reference.tokens, what, cache, device, progress)


@contextlib.contextmanager
def remember(
    model: Model,
    *,
    text: TextSpec = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    directory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[Reference]:
    """The original's predictions, to `evaluate` several models against; removed on leaving the block.

    Arguments as for `evaluate`; directory: where the predictions go (default: the temporary directory).
    """
    with opened(model, device) as loaded:
        tokens = windows(loaded, text, samples, sequence_length, seed)
        forward = Forward(loaded.model, loaded.name)
        check_ids(tokens.ids, forward.vocabulary, loaded.name)
        place = None if directory is None else os.fspath(directory)
        reference = Reference(forward, loaded.tokenizer, tokens, directory=place, progress=progress)
    del loaded, forward
    gc.collect()  # before the second model is loaded, not some time after
    with reference:
        yield reference


def _measure(
    model: Model,
    reference: Reference | None,
    tokens: TokenSet | None,
    what: str | None,
    kv: KVFormat | None,
    device: str | torch.device | None,
    progress: Progress | None,
    **options: Any,
) -> Evaluation:
    began = time.monotonic()
    with opened(model, device) as loaded:
        if tokens is None:
            tokens = windows(loaded, **options)
        forward = Forward(loaded.model, loaded.name, kv)
        if reference is not None:
            _same_vocabulary(reference, forward, loaded.tokenizer)
        check_ids(tokens.ids, forward.vocabulary, loaded.name)
        if kv is not None:
            _check_window(kv, tokens.ids.shape[1])
        scores = score(forward, tokens.ids, reference, progress)
        dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        where = forward.device.type
        name = loaded.name
    compared = reference is not None
    count, length = tokens.ids.shape
    return Evaluation(
        what=what or (name if kv is None else f"{name}, cache {kv.name}"),
        model=name,
        against=reference.name if reference is not None else None,
        method=f"chunked: {count} windows of {length} tokens, no overlap, errors by window"
        + (f"; reference kept as {reference.store}" if reference is not None else "")
        + (f"; keys and values as {kv.name}, {kv.group} tokens read at a time" if kv is not None else ""),
        dtype=dtype,
        device=where,
        perplexity=perplexity(block_estimate(scores.nll)),
        reference_perplexity=perplexity(block_estimate(reference.nll)) if reference is not None else None,
        kl=divergence(scores.kl) if compared else None,
        top1=block_estimate(scores.top1) if compared else None,
        lost=block_estimate(scores.nll - reference.nll) if reference is not None else None,
        kl_by_position=by_position(scores.kl) if compared else (),
        text=tokens.description,
        seconds=round(time.monotonic() - began, 3),
        record=record.environment(),
    )


@dataclass(kw_only=True)
class Scores:
    """What a model says of each token."""

    nll: torch.Tensor  # float32 [samples, length - 1]
    kl: torch.Tensor  # float32 [samples, length], zeros without a reference
    top1: torch.Tensor  # float32 [samples, length], 1 where the two agree


def score(
    forward: Forward, ids: torch.Tensor, reference: Reference | None = None, progress: Progress | None = None
) -> Scores:
    """The model of `forward` over the windows `ids` [samples, length], compared with `reference` if there is one."""
    count, length = ids.shape
    scores = Scores(nll=torch.zeros(count, length - 1), kl=torch.zeros(count, length), top1=torch.zeros(count, length))
    for window in range(count):
        for rows, logits in forward.slabs(ids[window]):
            scores.nll[window, rows.start : rows.stop] = slab_nll(ids[window], rows, logits)
            if reference is not None:
                original = reference.logits(window, rows, logits.device)
                scores.kl[window, rows] = kl(original, logits).cpu()
                # The stored argmax, not that of `original`: in float16 near ties become ties.
                scores.top1[window, rows] = (reference.top1[window, rows] == logits.argmax(-1).cpu()).float()
        if progress is not None:
            progress("evaluate", window + 1, count)
    return scores


# ---- what was passed, made ready


@dataclass(frozen=True, kw_only=True)
class Opened:
    model: nn.Module
    tokenizer: Any  # None when a model was passed alone
    name: str


@contextlib.contextmanager
def opened(model: Model, device: str | torch.device | None = None) -> Iterator[Opened]:
    """`model` loaded, in eval mode and inference mode; a model passed in gets its own mode back."""
    loaded = _load(model, device)
    training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.inference_mode():
            yield loaded
    finally:
        loaded.model.train(training)


def _load(model: Model, device: str | torch.device | None) -> Opened:
    if isinstance(model, str | os.PathLike):
        # Imported here: a model passed in needs none of the readers this pulls in.
        from fewbits.runtime.load import load

        on_cpu = torch.device(device).type == "cpu" if device is not None else not torch.cuda.is_available()
        module, tokenizer = load(os.fspath(model), device=device, dtype=torch.float32 if on_cpu else None)
        return Opened(model=module, tokenizer=tokenizer, name=os.fspath(model))
    module, tokenizer = model if isinstance(model, tuple) and len(model) == 2 else (model, None)
    if not isinstance(module, nn.Module):
        raise BadInput(
            f"cannot evaluate a {type(model).__name__}; pass a path, 'demo', a loaded model, "
            "or the pair (model, tokenizer)"
        )
    config = getattr(module, "config", None)
    return Opened(model=module, tokenizer=tokenizer, name=getattr(config, "name_or_path", "") or type(module).__name__)


def windows(
    loaded: Opened,
    text: TextSpec = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    split: str = "evaluation",
) -> TokenSet:
    """Token windows of `text` for the model; arguments as for `evaluate`, `split` of the built-in text."""
    if loaded.tokenizer is None:
        raise BadInput(f"{loaded.name} came without its tokenizer; pass (model, tokenizer)")
    texts, description = read_texts(text, split=split)
    return pack(
        texts,
        loaded.tokenizer,
        sequence_length=SEQUENCE_LENGTH if sequence_length is None else sequence_length,
        samples=samples,
        at_most=SAMPLES,
        seed=seed,
        max_length=getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None),
        description=description,
    )


def _check_window(kv: KVFormat, length: int) -> None:
    """BadInput where no token of a window would be read quantized: the loss would be 0 and say nothing."""
    kept = -(-(kv.first + kv.recent + kv.group) // kv.group) * kv.group  # pieces up to the one that fills a group
    if length <= kept:
        raise BadInput(
            f"windows of {length} tokens never read the cache {kv.name}: it keeps {kv.first} first and {kv.recent} "
            f"recent tokens as they are; take windows above {kept}, or less to keep (-recent0-first0)"
        )


def _same_vocabulary(reference: Reference, forward: Forward, tokenizer: Any) -> None:
    if reference.vocabulary != forward.vocabulary:
        raise BadInput(
            f"vocabulary mismatch: {forward.name} has {forward.vocabulary} tokens and {reference.name} has "
            f"{reference.vocabulary}; KL compares predictions over the same tokens, so pass the model "
            "it was made from"
        )
    vocabularies = [getattr(each, "get_vocab", None) for each in (reference.tokenizer, tokenizer)]
    if all(callable(each) for each in vocabularies) and vocabularies[0]() != vocabularies[1]():  # type: ignore[misc]
        raise BadInput(
            f"vocabulary mismatch: the tokenizers of {forward.name} and {reference.name} name the same ids "
            "differently; pass the model it was made from"
        )
