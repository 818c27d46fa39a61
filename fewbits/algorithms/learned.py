"""Learned rounding: the codes and scales of a block by signed gradient descent on what the block puts out.

GPTQ and refinement ask of each linear that its own product come out right. The next block reads none of those
products; it reads the block's output y, in which the errors of seven linears meet, cancel or multiply. Here the block
runs as a whole, on inputs that come from quantized blocks, against y* of the original block in the original model:

    loss = mean over tokens of  |y_t - y*_t|^2 / |y*_t|^2

*Variables.* One offset v per weight and one factor f per scale, beside the code c and scale s that the solver found:

    code = c + round(r + v),   |v| <= 1/2            so a code moves to a neighbour or stays
    scale = stored(f * s)                            where the format stores its scales plainly

r, in levels and less than 1/2, says where in the cell of its code a weight begins: at its best value while all other
codes stay as they are, (dW H)_j / H_jj above its code. GPTQ rounds many weights away from their nearest level to make
up for others; begun at the weight itself they would lie on the edge of their cell, and the first noisy steps would undo
the solution. Of a solver that just rounds it is the weight itself, as in the paper. With v = 0 and f = 1 the codes are
the solver's, exactly.

*Steps.* The gradient passes the rounding as if it were not there: dQ/dv is the width of the step, which is positive,
and only the sign is used:

    v <- v - lr * sign(dL/dQ),      f <- f - range_lr * sign(sum of Q dL/dQ over the block of the scale)

Both rates fall linearly to 0 from 1 / iterations, so that offsets can just reach their bounds. The sign needs no rate
for each weight, though their gradients differ by orders of magnitude, and no moments. Where a check finds the loss
above that of the start, learning goes back to the best state and on at half the rate: in a format of many levels, or a
narrow block, steps of 1 / iterations flip more codes than are wrong.

*Tokens.* Every block reads its input through a normalisation, which divides by |y_t|: so does the loss. In plain
squares a single attention sink of magnitude 26,000 would be all of it.

*Choice.* A check looks at the loss of some of the sequences and the best state seen is taken; the start is one of
them. The loss on calibration text falls far more than that on other text: there are more offsets than outputs to fit
them to. More text is what helps most (calibration/continuations.py makes some). `held` keeps a share of the sequences
out of training to choose by them instead; on 16 sequences of the demo model that cost more (3 bits: KL .246) than it
brought (.229 without), because a quarter less text was learned from.

Compared with the paper: codes start from any solver; factors scale the grid as it stands and leave zero points alone
(there: factors of minimum and maximum); tokens are normalised; the best of several states is taken.
Source: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent", arXiv 2309.05516.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewbits.algorithms.base import Learned, Lesson, Pupil
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.formats import Format, Quantized
from fewbits.formats.scales import PlainScale

_INSIDE = 0.49  # of a level: the farthest from its code that a weight may start
_FACTORS = (0.5, 1.5)  # of a scale
_ROUNDED = 0.95  # share of weights that lie in the cell of their code from which the solver just rounded
_CHECKED = 8  # batches that a check looks at, where none are held back: it costs a third of an iteration for each
_DAMPING = 0.01  # as GPTQ's: directions that calibration hardly saw must not decide where a weight begins


@dataclass(frozen=True, kw_only=True)
class LearnedRounding:
    """Learns offsets and scales. iterations: 0 leaves all as it is; tokens: per iteration; lr, range_lr: first steps of
    offsets and scales, 1 / iterations by default, 0 to leave one alone; held: share of the sequences that only choose
    the best of `checks` states, 0 to choose by those trained on; seed: order of the sequences."""

    role: ClassVar[str] = "learn"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian", "reference"})

    iterations: int = 100
    tokens: int = 1024
    lr: float | None = None
    range_lr: float | None = None
    held: float = 0.0
    checks: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.tokens < 1 or self.checks < 1:
            raise BadInput(f"{self}: needs iterations >= 0, tokens >= 1 and checks >= 1")
        if not 0 <= self.held < 1:
            raise BadInput(f"held {self.held}; a share of the sequences from 0 to less than 1, e.g. 0.25")
        for rate in (self.lr, self.range_lr):
            if rate is not None and not 0 <= rate <= 1:
                raise BadInput(f"a first step of {rate}; steps are in levels and lie from 0 to 1, e.g. 0.005")

    def sequences(self, samples: int, length: int) -> int:
        """As many as `tokens` allow; no more than leave one batch to train on and one to hold."""
        return max(1, min(self.tokens // length, samples // 2))

    def learn(self, lesson: Lesson) -> Learned:
        """Codes and scales of the least loss that was seen, on the sequences that choose."""
        size = self.sequences(len(lesson.inputs), lesson.inputs[0].shape[0])
        trained, held = self._split(len(lesson.inputs), size)
        variables = [_Variables(pupil) for pupil in lesson.pupils]
        rate = 1 / max(self.iterations, 1) if self.lr is None else self.lr
        range_rate = 1 / max(self.iterations, 1) if self.range_lr is None else self.range_lr
        every = max(1, math.ceil(self.iterations / self.checks))
        for variable in variables:
            variable.write()
        before = best = _held_loss(lesson, held, size)
        share = 1.0
        chooser = _batches(trained, size, self.seed)
        with _trainable(lesson.pupils):
            for iteration in range(self.iterations):
                _backward(lesson, next(chooser))
                decay = share * (1 - iteration / self.iterations)
                for variable in variables:
                    variable.step(rate * decay, range_rate * decay)
                    variable.write()
                if (iteration + 1) % every == 0 or iteration + 1 == self.iterations:
                    loss = _held_loss(lesson, held, size)
                    if loss < best:
                        best = loss
                        for variable in variables:
                            variable.keep()
                    elif loss > before:  # the steps are too long for this block
                        share /= 2
                        for variable in variables:
                            variable.restore()
        for variable in variables:
            variable.restore()
        return Learned(quantized=[variable.quantized() for variable in variables], before=before, after=best)

    def _split(self, samples: int, size: int) -> tuple[list[int], list[int]]:
        """Sequences to train on and to choose by, each at least one batch of `size`; one alone is both."""
        if samples == 1:
            return [0], [0]
        if not self.held:
            count = size * min(samples // size, _CHECKED)
            return list(range(samples)), [index * samples // count for index in range(count)]
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = size * max(1, min(round(self.held * samples / size), samples // size - 1))
        return sorted(order[count:]), sorted(order[:count])


class _Variables:
    """What is learned of one linear, and the best of it so far."""

    def __init__(self, pupil: Pupil) -> None:
        self.ref, self.start = pupil.ref, pupil.quantized
        self.residual = None if pupil.residual is None else pupil.residual.dense()
        self.distance = distance(pupil)
        self.offset = torch.zeros_like(self.distance)
        scaling = self.start.format.scaling
        self.factor: Tensor | None = None
        if isinstance(scaling.store, PlainScale) and not scaling.minimum:
            self.factor = torch.ones_like(self.start.scale, dtype=torch.float32)
        self.keep()

    def quantized(self) -> Quantized:
        """The codes and scales that the variables stand for."""
        start, format = self.start, self.start.format
        moved = (self.distance + self.offset).round_().add_(start.codes).clamp_(0, len(format.grid.levels) - 1)
        codes = moved.to(torch.int16).to(torch.uint8)  # no vector instruction takes floats to uint8
        if self.factor is None:
            return format.quantized(codes, start.scale, start.zero, start.stored)
        scale = format.scaling.store.round(start.scale.float() * self.factor, format.grid.top)
        return format.quantized(codes, *format.settle(scale, start.zero))

    def keep(self) -> None:
        """Takes the present state for the best."""
        self.best = self.offset.clone(), None if self.factor is None else self.factor.clone()

    def restore(self) -> None:
        """Goes back to the best state, in the block too."""
        offset, factor = self.best
        self.offset.copy_(offset)
        if self.factor is not None and factor is not None:
            self.factor.copy_(factor)
        self.write()

    def write(self) -> None:
        """Puts the values into the block."""
        decoded = self.quantized().dequantize()
        self.ref.write(decoded if self.residual is None else decoded + self.residual)

    @torch.no_grad()
    def step(self, rate: float, range_rate: float) -> None:
        """One step against the sign of the gradient that the block's parameter holds."""
        gradient = self.ref.gradient
        if gradient is None:
            return  # nothing that ran depends on it
        gradient = gradient.float()
        if self.factor is not None and range_rate:
            decoded = self.ref.weight if self.residual is None else self.ref.weight - self.residual
            slope = block_sums(gradient * decoded, self.start.format)
            self.factor.sub_(slope.sign_(), alpha=range_rate).clamp_(*_FACTORS)
        self.offset.sub_(gradient.sign(), alpha=rate).clamp_(-0.5, 0.5)


def distance(pupil: Pupil) -> Tensor:
    """r [out, in]: how many levels from its code each weight begins, less than half a level."""
    error = pupil.weight - pupil.values(pupil.quantized)
    own = _in_levels(error, pupil.quantized)
    hessian = pupil.inputs.hessian
    rounded = float((own.abs() <= 0.5).float().mean()) >= _ROUNDED
    if hessian is not None and not rounded and bool(hessian.any()):
        hessian = hessian.float()
        damping = _DAMPING * hessian.diagonal().mean()
        own = _in_levels((error @ hessian + damping * error) / (hessian.diagonal() + damping), pupil.quantized)
    return own.clamp_(-_INSIDE, _INSIDE)


def _in_levels(error: Tensor, quantized: Quantized) -> Tensor:
    """`error` [out, in] in units of the step from each code to its neighbour on that side; 0 past the last level."""
    format = quantized.format
    last = len(format.grid.levels) - 1
    found = torch.empty_like(error)
    for rows, scale, zero in format.row_chunks(quantized.shape, quantized.scale, quantized.zero):
        codes, by = quantized.codes[rows].int(), error[rows].sign().int()
        here, beside = (format.decode((codes + step).clamp_(0, last).to(torch.uint8), scale, zero) for step in (0, by))
        width = (beside - here).abs()
        found[rows] = torch.where(width > 0, error[rows] / width, torch.zeros_like(width))
    return found


def block_sums(x: Tensor, format: Format) -> Tensor:
    """Sums of `x` [out, in] over the elements that share a scale, in the shape of the scales."""
    rows, columns = x.shape
    width = format.scaling.width(columns)
    below = -rows % width if format.scaling.block == "tile" else 0
    if format.scaling.block != "tensor":
        x = nn.functional.pad(x, (0, -columns % width, 0, below))
    return format.blocks(x).sum(-1)


def token_loss(found: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token [...] as a share of its target's square."""
    found, target = found.float(), target.float()
    size = target.square().sum(-1)
    return (found - target).square().sum(-1) / size.clamp(min=torch.finfo(torch.float32).tiny)


@contextlib.contextmanager
def _trainable(pupils: Sequence[Pupil]) -> Iterator[None]:
    """The parameters that hold the pupils' weights ask for gradients."""
    holders = [pupil.ref.holder for pupil in pupils]
    for holder in holders:
        holder.requires_grad_(True)
    try:
        yield
    finally:
        for holder in holders:
            holder.requires_grad_(False)
            holder.grad = None


def _batches(samples: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """`size` of `samples` at a time without end, each sample once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += [samples[place] for place in torch.randperm(len(samples), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]


def _backward(lesson: Lesson, chosen: Sequence[int]) -> None:
    """Leaves the gradient of the loss of the sequences `chosen` in the parameters."""
    for pupil in lesson.pupils:
        pupil.ref.holder.grad = None
    loss = _loss(lesson, chosen).sum()  # not the mean: a sum stays farther from the end of float16
    loss.backward()


def _loss(lesson: Lesson, chosen: Sequence[int]) -> Tensor:
    found = lesson.forward(torch.stack([lesson.inputs[index] for index in chosen]))
    target = torch.stack([lesson.targets[index] for index in chosen]).to(found.device)
    return token_loss(found, target)


@torch.no_grad()
def _held_loss(lesson: Lesson, held: Sequence[int], size: int) -> float:
    losses = [_loss(lesson, held[start : start + size]).double().mean() for start in range(0, len(held), size)]
    loss = float(torch.stack(losses).mean())
    if not math.isfinite(loss):
        raise FewbitsError(f"{lesson.name}: its outputs are NaN or infinite; run calibration in float32 or bfloat16")
    return loss
