"""What 8-bit rounding of a linear's input costs, and which of its channels are to blame.

Absmax INT8, as LLM.int8() and SmoothQuant have it, with one scale per token or one per tensor (here: per window):

    q(x) = s round(x / s),   s = max |x| / 127                e = sum (q(x) - x)^2

A large channel does harm twice: by its own rounding error, and by the step it forces on all others. Keeping channel d
in 16 bits takes away both, and what it *carries* is the share of the error that goes with it:

    carried_d = 1 - e(without d) / e

Leaving out one channel changes the scale only of the tokens in which it is the largest, so all channels are settled by
two roundings: with the largest magnitude of each token and with the second largest. The shares need not add up to 1:
where two channels are equally large, neither carries anything alone. For sets there is `error_without`, which rounds
anew; with G = W^T W of the linears that read x it also gives the error of their outputs, trace(D G D^T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LEVELS = 127.0
SCALINGS = ("token", "tensor")


def rounding_error(x: Tensor, largest: Tensor) -> Tensor:
    """q(x) - x for x [T, C]; largest: magnitude given to the last level, [T, 1] or a scalar."""
    step = (largest / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / step).round_().mul_(step).sub_(x)


def largest_of(x: Tensor, scaling: str) -> Tensor:
    """The magnitude that sets the scale: [T, 1] per "token", a scalar per "tensor"."""
    magnitude = x.abs()
    return magnitude.amax(dim=1, keepdim=True) if scaling == "token" else magnitude.amax()


def error_without(x: Tensor, channels: Sequence[int], scaling: str, gram: Tensor | None = None) -> tuple[float, float]:
    """(squared error of x [T, C], of the outputs) with `channels` kept exact; 0 for the outputs without `gram`."""
    rest = x.clone()
    rest[:, list(channels)] = 0.0
    off = rounding_error(rest, largest_of(rest, scaling))
    return float(off.square().sum()), 0.0 if gram is None else float(((off @ gram) * off).sum())


def errors_without_each(x: Tensor, scaling: str) -> tuple[float, Tensor]:
    """(e, float64 [C]: e with channel d kept exact) of x [T, C], C >= 2."""
    per_token = scaling == "token"
    magnitude = x.abs() if per_token else x.abs().amax(dim=0, keepdim=True)
    (first, second), channel = magnitude.topk(2, dim=1).values.unbind(1), magnitude.argmax(dim=1)
    error = rounding_error(x, first[:, None]).double().square()
    finer = rounding_error(x, second[:, None]).double().square()
    if not per_token:
        error, finer = error.sum(dim=0, keepdim=True), finer.sum(dim=0, keepdim=True)
    rows = torch.arange(len(channel), device=x.device)
    whole = error.sum(dim=1)
    without = whole.sum() - error.sum(dim=0)
    # Where d is the largest, the others are rounded with the finer step.
    gained = finer.sum(dim=1) - finer[rows, channel] - (whole - error[rows, channel])
    return float(whole.sum()), without.index_add(0, channel, gained)


@dataclass(kw_only=True)
class InputError:
    """Sums over windows for one input. without [C]: error with each channel kept exact, by scaling.

    others: of all tokens but the first of a window, whose energy is `others_signal`, the error with one scale per
    "token", per "tensor", and per tensor when the first token is "spared": kept exact and left out of the scale. The
    energy of the first token can be a thousand times that of the rest; a share of all of it would show nothing.
    """

    name: str
    block: int
    kind: str
    residual: bool
    signal: float = 0.0
    others_signal: float = 0.0
    error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SCALINGS, 0.0))
    others: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*SCALINGS, "spared"), 0.0))
    without: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x: Tensor) -> None:
        """Adds the input x [T, C] of one window."""
        self.signal += _energy(x)
        for scaling in SCALINGS:
            whole, without = errors_without_each(x, scaling)
            self.error[scaling] += whole
            self.without[scaling] = self.without[scaling] + without.cpu() if scaling in self.without else without.cpu()
        rest = x[1:]
        self.others_signal += _energy(rest)
        self.others["token"] += _energy(rounding_error(rest, largest_of(rest, "token")))
        self.others["tensor"] += _energy(rounding_error(rest, largest_of(x, "tensor")))
        self.others["spared"] += _energy(rounding_error(rest, largest_of(rest, "tensor")))

    def carried(self, scaling: str) -> Tensor:
        """Share of the error each channel carries, float64 [C]; zeros where nothing is lost."""
        if self.error[scaling] == 0.0:
            return torch.zeros_like(self.without[scaling])
        return 1.0 - self.without[scaling] / self.error[scaling]


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())
