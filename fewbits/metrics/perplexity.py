"""Perplexity: how many tokens, on average, the model hesitates between.

    nll_t = -log q(target_t)            perplexity = exp(mean nll)

A standard error s of the mean nll becomes, to first order, exp(mean) * s of the perplexity.
"""

from __future__ import annotations

import math

import torch

from fewbits.metrics.estimate import Estimate


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log probability of each target, in nats: logits [T, V], targets int [T] -> float32 [T].

    Row t of the logits must be the prediction *of* target t: shift before calling.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logits [T, V] and targets [T] are needed, not {shapes}")
    values = logits.float()
    picked = values.gather(1, targets.to(values.device).unsqueeze(1)).squeeze(1)
    return torch.logsumexp(values, dim=-1) - picked


def perplexity(mean_nll: Estimate) -> Estimate:
    """The perplexity of a mean negative log-likelihood, with its standard error carried along."""
    # Beyond e^709 a float overflows; a model that bad is reported as infinite rather than failing here.
    mean = math.exp(mean_nll.mean) if mean_nll.mean < 709.0 else math.inf
    return Estimate(mean=mean, stderr=mean * mean_nll.stderr, n=mean_nll.n)
