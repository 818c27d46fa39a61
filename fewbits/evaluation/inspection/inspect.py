"""`inspect`: the record of one page about a model that nobody has quantized yet."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from fewbits.calibration.data import TextSpec, TokenSet, pack, read_texts
from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Dense, StoredMix, quantized_modules
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.core.progress import OnProgress
from fewbits.evaluation.inspection import recommend, schemes
from fewbits.evaluation.inspection.losses import Losses, losses
from fewbits.evaluation.inspection.outliers import Outliers
from fewbits.evaluation.inspection.schemes import Candidate
from fewbits.evaluation.inspection.sizes import sizes
from fewbits.evaluation.studies.record import Record, record
from fewbits.models.walk import ExpertRef, Ref, linears
from fewbits.pipeline.shell import ModelShell, check_vocabulary

SAMPLES, SEQUENCE_LENGTH = 4, 192  # two minutes for the embedded model on 2 cores
MAX_LOSS = 0.05
SOURCES = (
    "Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339 (outlier dimensions)",
    "Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762",
    "Frantar et al. 2022, GPTQ, arXiv 2210.17323 (output error of a layer)",
)


def inspect(
    model: str | os.PathLike[str],
    *,
    schemes: Sequence[str] = (),
    text: TextSpec = None,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    memory: int | None = None,
    max_loss: float = MAX_LOSS,
    device: str | None = None,
    on_progress: OnProgress | None = None,
) -> Record:
    """What `model` (directory, .gguf, hub id or "demo") is made of and what each scheme would cost it.

    schemes: names to try, as `quantize` takes them, or with a group size (W4A16-g64); default: those in
    `inspection.schemes`. text, samples, sequence_length, seed: the windows it is measured on. memory: bytes the
    weights must fit in. max_loss: KL that counts as little loss.
    Raises BadInput for arguments that make no sense. A model that is quantized already is described, not measured.
    """
    started = time.monotonic()
    _check(samples, max_loss, memory)
    source = open_source(model, allow_quantized=True)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shell = ModelShell(source, place, torch.float32 if place.type == "cpu" else source.dtype)
    results: dict[str, Any] = {"model": _model(source, shell), "parts": sizes(source, shell)}
    settings: dict[str, Any] = {"model": source.path}
    quantized = _quantized(source)
    if quantized is not None:
        results["quantized"] = quantized
    else:
        found = _candidates(schemes, source, shell)
        tokenizer = source.load_tokenizer()
        tokens = _tokens(source, shell, tokenizer, text, samples, sequence_length, seed)
        settings |= {"text": tokens.description["description"], "windows": samples, "tokens": tokens.tokens,
                     "compared": "every second position, not the first", "seed": seed,
                     "weights": "round-to-nearest", "max_loss": max_loss}  # fmt: skip
        outliers = Outliers(tokens.ids, tokenizer)
        lost = losses(shell, tokens.ids, found[0], outliers, on_progress or (lambda _: None))
        rows = _rows(found[0], lost, source, shell, results["model"]["parameters"])
        results |= {
            "schemes": rows,
            "skipped": found[1],
            "errors": lost.errors,
            "agreement": _rank_correlation([r["error"] for r in rows], [r["kl"]["mean"] for r in rows]),
            "outliers": outliers.results(),
            "recommended": recommend.recommend(rows, max_loss=max_loss, memory=memory),
        }
    return record(
        "inspect", settings=settings, sources=SOURCES if quantized is None else (), results=results,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _check(samples: int, max_loss: float, memory: int | None) -> None:
    if samples < 2:
        raise BadInput(f"{samples} window; at least 2 are needed for an error bar")
    if not max_loss > 0:
        raise BadInput(f"largest loss {max_loss:g}; a KL above 0 is needed, e.g. 0.05")
    if memory is not None and memory <= 0:
        raise BadInput(f"memory of {memory} bytes; more than 0 is needed")


def _model(source: Source, shell: ModelShell) -> dict[str, Any]:
    config = source.config()
    refs = _refs(shell)
    return {
        "name": source.path,
        "type": config.get("model_type"),
        "family": shell.topology.name if shell.topology else None,
        "parameters": sum(parameter.numel() for parameter in shell.model.parameters()),
        "blocks": len(shell.blocks),
        "width": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "tied": bool(source.tied()),
        "dtype": str(source.dtype).removeprefix("torch."),
        "bytes": source.nbytes,
        "linears": len(refs),
        "quantizable": sum(rows * columns for rows, columns in (ref.shape for ref in refs)),
        "experts": any(isinstance(ref, ExpertRef) for ref in refs),
    }


def _refs(shell: ModelShell) -> list[Ref]:
    return [ref for _, block in shell.blocks for ref in linears(block, shell.topology)]


def _quantized(source: Source) -> dict[str, Any] | None:
    """What a checkpoint that is quantized already says of itself; None for a dense model."""
    config = source.config().get("quantization_config")
    if not config:
        return None
    method = config.get("quant_method")
    try:
        packed = quantized_modules(source)
    except Unsupported as error:
        return {"method": method, "modules": None, "formats": {}, "note": str(error)}
    formats: Counter[str] = Counter()
    for name in packed.entries:
        found = packed.read(name)
        if isinstance(found, Dense):
            formats[found.note] += 1
        elif isinstance(found, StoredMix):
            formats[found.mix.name] += 1
        else:
            inputs = f", activations {found.activations.name}" if found.activations else ""
            formats[found.format.name + inputs] += 1
    return {"method": method, "modules": len(packed.entries), "formats": dict(formats.most_common()), "note": ""}


def _candidates(names: Sequence[str], source: Source, shell: ModelShell) -> tuple[list[Candidate], dict[str, str]]:
    """Those that fit this model, and why the others do not."""
    wanted = schemes.candidates(names, source.dtype)
    refs = _refs(shell)
    skipped = {each.label: why for each in wanted if (why := schemes.why_not(each, refs))}
    kept = [each for each in wanted if each.label not in skipped]
    if not kept:
        label, why = next(iter(skipped.items()))
        raise BadInput(f"none of the schemes fits this model ({label}: {why}); name others with --scheme")
    return kept, skipped


def _tokens(
    source: Source,
    shell: ModelShell,
    tokenizer: Any,
    text: TextSpec,
    samples: int,
    sequence_length: int | None,
    seed: int,
) -> TokenSet:
    limit = source.config().get("max_position_embeddings")
    texts, description = read_texts(text)
    tokens = pack(
        texts, tokenizer, samples=samples, seed=seed, max_length=limit, description=description,
        sequence_length=min(SEQUENCE_LENGTH, limit or SEQUENCE_LENGTH) if sequence_length is None else sequence_length,
    )  # fmt: skip
    check_vocabulary(tokens.ids, shell.model.config)
    return tokens


def _rows(
    found: Sequence[Candidate], lost: Losses, source: Source, shell: ModelShell, parameters: int
) -> list[dict[str, Any]]:
    """What the tables show of each scheme, least loss first; `parameters` of the model, shared ones once."""
    shapes = [ref.shape for ref in _refs(shell)]
    weights = {f"{p}.{ref.name}": ref for p, b in shell.blocks for ref in linears(b, shell.topology)}
    sizes = {name: ref.shape[0] * ref.shape[1] for name, ref in weights.items()}
    kept = parameters - sum(sizes.values())
    rows = []
    for each in found:
        errors = lost.linear_errors[each.label]
        total = sum(sizes[name] for name in errors)
        kernel = schemes.kernels(each, shapes, shell.device)
        rows.append(
            {
                "label": each.label,
                "weights": each.weights.name,
                "activations": each.activations.name if each.activations else None,
                **schemes.size(each, shapes, kept, source.dtype),
                "error": sum(error * sizes[name] for name, error in errors.items()) / total,
                "worst": max(errors, key=errors.__getitem__),
                "worst_error": max(errors.values()),
                "kl": lost.kl[each.label],
                "top1": lost.top1[each.label],
                **schemes.loads(each, shapes),
                "kernels": kernel["kernels"],
                "packed": kernel["packed"],
                "kernel_why": kernel["why"],
                "command": each.command(source.path),
            }
        )
    return sorted(rows, key=lambda row: row["kl"]["mean"])


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: the correlation of ranks; None for fewer than three values."""
    if len(first) < 3:
        return None
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
