"""What the quantized model lost on held-out text, from two streams of logits, window by window."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fewbits.calibration.data import TokenSet
from fewbits.core.record import environment
from fewbits.metrics import block_estimate, kl, nll, perplexity, top1_agreement
from fewbits.metrics.result import Evaluation, by_position, divergence


def measure(
    what: str,
    model: str,
    against: str,
    tokens: TokenSet,
    pairs: Iterable[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """An evaluation record from logits [T, V] of the original and of the quantized model, window by window."""
    started = time.monotonic()
    divergences, agreements, losses, reference_losses = [], [], [], []
    for ids, (before, after) in zip(tokens.ids, pairs, strict=True):
        targets = ids[1:].to(after.device)
        divergences.append(kl(before, after).cpu())
        agreements.append(top1_agreement(before, after).float().cpu())
        reference_losses.append(nll(before[:-1], targets).cpu())
        losses.append(nll(after[:-1], targets).cpu())
    values = torch.stack(divergences)
    return Evaluation(
        what=what,
        model=model,
        against=against,
        method="while quantizing, block by block; windows do not overlap",
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        perplexity=perplexity(block_estimate(torch.stack(losses))),
        reference_perplexity=perplexity(block_estimate(torch.stack(reference_losses))),
        kl=divergence(values),
        top1=block_estimate(torch.stack(agreements)),
        lost=block_estimate(torch.stack(losses) - torch.stack(reference_losses)),
        kl_by_position=by_position(values),
        text=tokens.description,
        seconds=time.monotonic() - started,
        record=environment(),
    ).to_dict()
