"""SmoothQuant: divide what is hard in the activations into the weights.

    X W^T = (X diag(1/s)) (W diag(s))^T,      s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

An outlier channel of X spoils the one scale its tensor (or token) has, while weights are smooth. Any positive s leaves
the product as it is; alpha says how much of the difficulty moves. At 1/2 both sides end with the same largest
magnitude in every channel, sqrt(max|X_j| max|W_j|); models with larger outliers want 0.75 to 0.9.

max|W_j| runs over all linears that read the same X. The division by s is free where a norm precedes: it goes into
the norm's weight (and bias). Beyond the paper, `products` smooths what o_proj and down_proj read, whose scales go into
v_proj and up_proj (channels.py); query heads that share a value head share the mean of their scales.

Without an `alpha`, each place takes that of the least squared output error with inputs and weights both rounded, and
none at all where nothing is better. One alpha for a whole model, as in the paper, is a compromise between blocks with
outliers and blocks without. Every alpha is also tried with no s below the median of all s: then outliers are divided,
and quiet channels are not multiplied. What multiplying them is good for, more levels for what is small, goes wrong
where they are quiet in the text that gave s alone:

- Sink tokens (formats/rows.py) have channels thousands of times larger than all others have, and others hardly use
  them. Where sinks share a scale with all others, max|X_j| counts them; where they have scales of their own it does
  not, s_j is tiny, the column W_j s_j is rounded to nothing, and the sink loses all of its output. What sinks lose
  counts as what all others lose, each as a share of its own.
- What down_proj reads has large values that move from channel to channel. The first token that uses a quiet one has
  x_j / s_j set the scale for the rest of it. Half of a sample of inputs gives the s that are tried, the other half
  the error.

The paper's O1, O2 and O3 are the granularity of the activations, not of the smoothing: one scale a token, one for the
tokens of a product, one fixed by calibration, under one scale for the weights (formats/scheme.py).
Source: Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Block, Stage, Transformed
from fewbits.algorithms.channels import RoundedLoss, Scalable, scalables
from fewbits.core.errors import BadInput
from fewbits.formats.rows import sinks

_SMALLEST = 1e-5  # of a column's magnitude and of a scale


def smoothing_scales(activations: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """s [in], positive, from max|X_j| `activations` [in] and the weights [out, in] that read X.

    Channels that were never active keep s = 1. BadInput for alpha outside [0, 1] or weights of another width.
    """
    if not 0 <= alpha <= 1:
        raise BadInput(f"alpha {alpha}: needs 0 <= alpha <= 1, e.g. 0.5")
    if any(weight.shape[1] != len(activations) for weight in weights):
        widths = ", ".join(str(weight.shape[1]) for weight in weights)
        raise BadInput(f"{len(activations)} activation channels for weights of {widths} columns")
    largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).clamp(min=_SMALLEST)
    scales = (activations.pow(alpha) / largest.to(activations.dtype).pow(1 - alpha)).clamp(min=_SMALLEST)
    return torch.where(activations > 0, scales, torch.ones_like(scales))


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Smooths every place. alpha: fixed, or None for the best of `steps` + 1 from 0 to 1.  products: smooths what
    o_proj and down_proj read, too."""

    role: ClassVar[str] = "transform"
    statistics: ClassVar[frozenset[str]] = frozenset({"max_abs", "rows"})

    alpha: float | None = None
    steps: int = 10
    products: bool = True

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise BadInput(f"alpha {self.alpha}: needs 0 <= alpha <= 1, e.g. 0.5, or none to search it")
        if self.steps < 1:
            raise BadInput(f"steps {self.steps}; at least 1 alpha beside 0 must be tried")

    def apply(self, block: Block) -> Transformed:
        """Smooths the block's channels in place."""
        first = block.stages[0].refs[0].name
        if block.activations is None:
            return Transformed(notes={first: ["smoothquant: inputs are not rounded; nothing was smoothed"]})
        norms = {norm for norm, _ in block.topology.norms} if block.topology else set()
        places = [place for place in scalables(block) if self.products or place.producer in norms]
        if not places:
            lines = ["smoothquant: no table says what feeds the linears of this family; nothing was smoothed"]
            return Transformed(notes={first: lines})
        changed: set[str] = set()
        for place in places:
            _, s = self.best(place, block)
            if s is not None:
                changed |= place.scale(s)
        return Transformed(changed=frozenset(changed))

    def best(self, place: Scalable, block: Block) -> tuple[float, Tensor | None]:
        """alpha and the scales s [in]; None where nothing is better, or nothing was seen."""
        seen = [stage for stage in place.stages if stage.inputs.tokens and stage.inputs.max_abs is not None]
        if not seen:
            return 0.0, None
        if self.alpha is not None:
            return self.alpha, _shared(place, seen, self.alpha, block)
        halves = [_halves(stage) for stage in seen if stage.inputs.rows is not None and len(stage.inputs.rows) > 1]
        known, unseen = [first for first, _ in halves], [second for _, second in halves]
        of = RoundedLoss(unseen, block, apart=True)
        least, found = of(None), None
        tried = itertools.product((step / self.steps for step in range(self.steps + 1)), (False, True))
        for alpha, spare in tried if halves else ():
            loss = of(_shared(place, known, alpha, block, spare=spare))
            if loss < least:
                least, found = loss, (alpha, spare)
        if found is None:
            return 0.0, None
        return found[0], _shared(place, seen, found[0], block, spare=found[1])


def _halves(stage: Stage) -> tuple[Stage, Stage]:
    """`stage` as if it had seen the first half of the sampled rows; or the second, and the sinks of the first."""
    rows = stage.inputs.rows
    assert rows is not None
    first, second = rows.split(-(-len(rows) // 2))
    apart = sinks(first)
    size = first.abs()
    known = dataclasses.replace(stage.inputs, rows=first, max_abs=size.amax(0), ordinary=size[~apart].amax(0))
    unseen = dataclasses.replace(stage.inputs, rows=torch.cat([second, first[apart]]))
    return dataclasses.replace(stage, inputs=known), dataclasses.replace(stage, inputs=unseen)


def _shared(place: Scalable, stages: Sequence[Stage], alpha: float, block: Block, *, spare: bool = False) -> Tensor:
    """The scales of everything that reads `place`, equal where they must be; spare: channels are divided only."""
    assert block.activations is not None
    scaling = block.activations.scaling
    together = (scaling.block == "tensor" or scaling.static) and not scaling.sinks
    reach = [stage.inputs.max_abs if together else stage.inputs.ordinary for stage in stages]
    largest = torch.stack([each for each in reach if each is not None]).amax(0)
    weights = [ref.weight.float() for stage in place.stages for ref in stage.refs]
    scales = smoothing_scales(largest.float(), weights, alpha)
    return place.tie(scales.clamp(min=float(scales.median())) if spare else scales)
