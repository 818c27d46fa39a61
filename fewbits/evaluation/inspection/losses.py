"""Every scheme through every block, side by side, in one pass over a short text.

    layer     e = ||X W^T - X' Q^T||^2 / ||X W^T||^2,     X its inputs in the original model, X' the same as rounded
    model     KL(original || scheme), nats per token

Each scheme has a stream of hidden states of its own. A block is read once; for each scheme its linears are rounded to
nearest, compared on the original's inputs, and the scheme's stream goes through; then the weights are put back. After
the last block every stream gives logits. So the loss of the model is measured, not extrapolated from layers: errors of
layers rank the schemes much as KL does, but how they add up differs from model to model.

Costs: one block in memory, twice; one hidden state per token and scheme; one forward of the text per scheme, and at
most as much again for the layers (inputs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbits.core.progress import OnProgress, Progress
from fewbits.evaluation.inspection.inputs import Inputs, received
from fewbits.evaluation.inspection.outliers import Outliers
from fewbits.evaluation.inspection.schemes import Candidate
from fewbits.metrics import block_estimate, kl, top1_agreement
from fewbits.models.walk import Ref, linears
from fewbits.pipeline.rounding import quantized_activations
from fewbits.pipeline.shell import ModelShell

# Positions of a window that are compared. Every second one to spare time; not the first, which has no context: rounding
# that disturbs the attention sink costs it 10 nats, a fifth of the mean in windows this short.
COMPARED = slice(1, None, 2)


@dataclass(kw_only=True)
class Losses:
    """What was found: per candidate label, the mean error by kind of linear and block; KL and top-1 agreement."""

    errors: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    linear_errors: dict[str, dict[str, float]] = field(default_factory=dict)  # by the linear's full name
    kl: dict[str, dict[str, Any]] = field(default_factory=dict)
    top1: dict[str, dict[str, Any]] = field(default_factory=dict)


def losses(
    shell: ModelShell,
    ids: Tensor,
    candidates: Sequence[Candidate],
    outliers: Outliers,
    report: OnProgress,
) -> Losses:
    """Errors and divergences of `candidates` on the windows `ids` [S, T]; shows `outliers` what the original does."""
    report(Progress("inspect", 0, len(shell.blocks), "embedding the text"))
    with shell.resident_outside(head=False):
        original = shell.embed([ids])[0]
    outliers.hidden(-1, "embeddings", original)
    streams = {candidate.label: original for candidate in candidates}
    found = Losses()
    for index, (prefix, block) in enumerate(shell.blocks):
        refs = linears(block, shell.topology)
        with shell.resident(prefix, block), received(refs) as inputs:
            original = shell.forward(index, original)
        outliers.see(index, prefix, original, refs, inputs)
        with shell.resident(prefix, block):
            _block(shell, index, refs, candidates, inputs, streams, found)
        report(Progress("inspect", index + 1, len(shell.blocks), f"{len(candidates)} schemes"))
    _divergences(shell, ids, original, streams, found, report)
    return found


def _block(
    shell: ModelShell,
    index: int,
    refs: Sequence[Ref],
    candidates: Sequence[Candidate],
    inputs: dict[str, Inputs],
    streams: dict[str, Tensor],
    found: Losses,
) -> None:
    """Block `index`, resident: errors of its linears and the step of every stream."""
    prefix = shell.blocks[index][0]
    weights = {ref.name: ref.weight.to(torch.float32, copy=True) for ref in refs}
    signals = {name: inputs[name].energy(weight) for name, weight in weights.items() if name in inputs}
    for candidate in candidates:
        errors: dict[str, list[float]] = {}
        for ref in refs:
            weight, name = weights[ref.name], f"{prefix}.{ref.name}"
            decoded = candidate.weights.quantize(weight, f"{name}.weight").dequantize()
            ref.write(decoded)
            known = inputs.get(ref.name)  # None: no token was sent to this expert
            error = known and known.error(weight, decoded, candidate.activations, signals[ref.name])
            if error is not None:
                errors.setdefault(ref.kind, []).append(error)
                found.linear_errors.setdefault(candidate.label, {})[name] = error
        by_kind = found.errors.setdefault(candidate.label, {})
        for kind in dict.fromkeys(ref.kind for ref in refs):
            series = by_kind.setdefault(kind, [None] * len(shell.blocks))
            series[index] = sum(errors[kind]) / len(errors[kind]) if errors.get(kind) else None
        with quantized_activations(refs, candidate.activations):
            streams[candidate.label] = shell.forward(index, streams[candidate.label])


def _divergences(
    shell: ModelShell,
    ids: Tensor,
    original: Tensor,
    streams: dict[str, Tensor],
    found: Losses,
    report: OnProgress,
) -> None:
    divergences: dict[str, list[Tensor]] = {label: [] for label in streams}
    agreements: dict[str, list[Tensor]] = {label: [] for label in streams}
    with shell.resident_outside(head=True):
        for row in range(len(ids)):
            window = slice(row, row + 1)
            reference = shell.logits(ids[window, COMPARED], original[window, COMPARED])[0]
            for label, hidden in streams.items():
                logits = shell.logits(ids[window, COMPARED], hidden[window, COMPARED])[0]
                divergences[label].append(kl(reference, logits).cpu())
                agreements[label].append(top1_agreement(reference, logits).float().cpu())
            report(Progress("compare", row + 1, len(ids), "predictions"))
    found.kl = {label: block_estimate(torch.stack(values)).to_dict() for label, values in divergences.items()}
    found.top1 = {label: block_estimate(torch.stack(values)).to_dict() for label, values in agreements.items()}
