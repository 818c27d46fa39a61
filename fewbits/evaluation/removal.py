"""What a model loses when parts of its hidden states are taken out: dimensions, or single values of single tokens.

Dimensions are set to zero in the inputs of attention and MLP behind the norms, as in LLM.int8() (Dettmers et al.
2022): the residual stream itself and the head see them still. Massive activations are replaced where they emerge, in
the output of one block, by zero or by their mean, as in Sun et al. 2024.

Effects are paired: the same windows with and without, so that what one window is harder than another cancels.

    d_w = nll of window w with the change - without        ratio of perplexities = exp(mean d_w)
    stderr = ratio * std(d_w) / sqrt(windows)
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.calibration.collect import Ref
from fewbits.core.progress import OnProgress, Progress
from fewbits.evaluation.forward import Forward
from fewbits.evaluation.observe import MASSIVE, MASSIVE_RATIO
from fewbits.evaluation.reference import slab_nll
from fewbits.metrics import block_estimate, perplexity
from fewbits.metrics.estimate import finite
from fewbits.models.walk import LinearRef

Plan = tuple[str, list[int], AbstractContextManager[None]]  # name, dimensions, the model without them while open
LARGEST = math.log(1e12)  # a ratio beyond is written down as this: the model is gone, and no figure could show it


@dataclass(frozen=True, kw_only=True)
class Score:
    """nll [windows, length - 1]; top [windows, length]: probability of the most likely token."""

    nll: Tensor
    top: Tensor

    def to_dict(self, original: Score | None = None) -> dict[str, Any]:
        """JSON-ready: perplexity, its ratio to that of `original`, mean probability of the most likely token."""
        result: dict[str, Any] = {
            "perplexity": perplexity(block_estimate(self.nll)).to_dict(),
            "top": block_estimate(self.top).to_dict(),
        }
        if original is not None:
            change = block_estimate(self.nll - original.nll)
            ratio = math.exp(min(change.mean, LARGEST))
            result["ratio"] = {"mean": ratio, "stderr": finite(ratio * change.stderr)}
        return result


def score(forward: Forward, ids: Tensor) -> Score:
    """Likelihoods of the windows `ids` [windows, length]."""
    count, length = ids.shape
    nll, top = torch.zeros(count, length - 1), torch.zeros(count, length)
    with torch.inference_mode():
        for window in range(count):
            for rows, logits in forward.slabs(ids[window]):
                nll[window, rows.start : rows.stop] = slab_nll(ids[window], rows, logits)
                top[window, rows] = (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp().cpu()
    return Score(nll=nll, top=top)


@contextlib.contextmanager
def zeroed(refs: Sequence[Ref], dimensions: Sequence[int]) -> Iterator[None]:
    """While open, the inputs of `refs` are zero at `dimensions`."""
    chosen = list(dimensions)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., chosen] = 0.0
        return (x, *args[1:])

    modules = {ref.module if isinstance(ref, LinearRef) else ref.owner for ref in refs}
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextlib.contextmanager
def changed(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the hidden states [B, T, H] that leave `block` are those that `change` returns for them."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def massive_replaced(block: nn.Module, dimensions: Sequence[int], by: Tensor) -> AbstractContextManager[None]:
    """While open, massive activations that leave `block` at `dimensions` are what `by` [H] says."""
    return changed(block, lambda x: torch.where(_massive(x, dimensions), by.to(x), x))


def massive_spared(block: nn.Module, dimensions: Sequence[int], others: Sequence[int]) -> AbstractContextManager[None]:
    """While open, tokens with massive activations at `dimensions` are zero at `others` instead."""

    def change(x: Tensor) -> Tensor:
        tokens = _massive(x, dimensions).any(dim=-1, keepdim=True)
        return x.masked_fill(tokens & _among(x, others), 0.0)

    return changed(block, change)


def _massive(x: Tensor, dimensions: Sequence[int]) -> Tensor:
    """Where x [B, T, H] is massive, among `dimensions`."""
    magnitude = x.abs()
    median = magnitude.flatten(1).median(dim=1).values[:, None, None]
    return (magnitude > MASSIVE) & (magnitude > MASSIVE_RATIO * median) & _among(x, dimensions)


def _among(x: Tensor, dimensions: Sequence[int]) -> Tensor:
    """bool [H]: which of the dimensions of x are listed."""
    return torch.isin(torch.arange(x.shape[-1], device=x.device), torch.tensor(list(dimensions), device=x.device))


def measured(forward: Forward, ids: Tensor, plans: Sequence[Plan], say: OnProgress) -> dict[str, Any]:
    """JSON-ready: the model as it is, and every plan; plans of one name are draws of random dimensions."""
    original = score(forward, ids)
    say(Progress("perplexity", 1, len(plans) + 1))
    runs: dict[str, list[tuple[list[int], Score]]] = {}
    for number, (key, dimensions, context) in enumerate(plans):
        with context:
            runs.setdefault(key, []).append((dimensions, score(forward, ids)))
        say(Progress("perplexity", number + 2, len(plans) + 1, key))
    return {
        "original": original.to_dict(),
        "runs": {
            key: _together([{"dimensions": found, **each.to_dict(original)} for found, each in members])
            for key, members in runs.items()
        },
    }


def _together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One run as it is; several with other random dimensions as their mean and its error over the draws."""
    if len(runs) == 1:
        return runs[0]
    joined: dict[str, Any] = {"draws": runs}
    for key in ("perplexity", "top", "ratio"):
        values = [run[key]["mean"] for run in runs]
        if None in values:  # a perplexity beyond what a float holds
            joined[key] = {"mean": None, "stderr": None, "n": len(values)}
            continue
        stderr = statistics.stdev(values) / len(values) ** 0.5
        joined[key] = {"mean": statistics.fmean(values), "stderr": stderr, "n": len(values)}
    return joined
