"""What a method is, and what methods share.

`fewbits quantize --method rotate,awq,gptq,refine` names steps that are taken in the order of their roles:

| role | does | offers |
|---|---|---|
| rewrite | changes the whole model, as it is read, so that it computes the same | `rewrite(source, kept)` |
| transform | changes a block so that it computes the same and quantizes better | `apply(block)` |
| weights | turns a weight into codes; exactly one, `rtn` if none is named | `solve(weight, format, inputs, name)` |
| refine | improves codes and scales that are there | `refine(solved, weight, inputs, name)` |
| residual | adds what codes do not hold, in 16 bits; one at most | `correct(solved, weights, inputs, name, again)` |
| learn | improves the codes of a whole block at once, against the block's output | `learn(lesson)` |

Each step is a frozen dataclass of options that says in `statistics` what calibration must collect; calibration
collects the union once. The objective every calibrated step is judged by is the layer's output error over the
calibration tokens,

    ||X (W - Q)^T||^2  =  n/2 * tr(dW H dW^T),     H = (2/n) sum x x^T.

Only a step that learns looks further, to what the block as a whole puts out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from fewbits.calibration.collect import Ref
from fewbits.calibration.stats import Inputs
from fewbits.checkpoints.base import Source
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.formats import Format, Quantized
from fewbits.formats.low_rank import LowRank, LowRankSpec
from fewbits.formats.mix import Mixed
from fewbits.formats.outliers import Outliers
from fewbits.models.topology import Topology

ROLES = ("rewrite", "transform", "weights", "refine", "residual", "learn")


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A quantized weight and what its solution needed (`notes`: retries, fallbacks; shown to the user).

    quantized: `Mixed` where the weight was to be of several formats; algorithms/mixes.py alone makes those.

    Calibrated methods report their objective per row [out]: `loss` of the result, `rtn_loss` of rounding to
    nearest, `zero_loss` of dropping the weight altogether (the scale the others are read against).
    outliers: columns that stay in 16 bits.
    """

    quantized: Quantized | Mixed
    notes: list[str] = field(default_factory=list)
    loss: Tensor | None = None
    rtn_loss: Tensor | None = None
    zero_loss: Tensor | None = None
    outliers: Outliers | None = None


class Step(Protocol):
    """What all steps have."""

    role: ClassVar[str]
    statistics: ClassVar[frozenset[str]]


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A model rewritten. source: answers as the original's, with other tensors and perhaps another configuration.

    input_hadamard: module on disk -> orders of the Hadamard transform that its input must go through when the model
    runs; the weight is that of the transformed input. notes: what the user should know.
    """

    source: Source
    input_hadamard: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Rewrite(Step, Protocol):
    """Changes the model as a whole; tells nothing of text. `kept(module)`: whether a linear will stay dense; `rounded`:
    whether the inputs of the others will be rounded."""

    def rewrite(self, source: Source, kept: Callable[[str], bool], rounded: bool = False) -> Rewritten: ...


class WeightMethod(Step, Protocol):
    """Turns a weight [out, in] into codes of `format`; leaves its inputs alone."""

    def solve(self, weight: Tensor, format: Format, inputs: Inputs, name: str) -> Solved: ...


class Refinement(Step, Protocol):
    """Improves `solved`, the codes of `weight` [out, in], by the same objective; never makes it worse."""

    def refine(self, solved: Solved, weight: Tensor, inputs: Inputs, name: str) -> Solved: ...


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """solved: the codes, perhaps others than before, their loss that of the linears with their residuals.
    residuals: of each linear, in order; None where it has none."""

    solved: Solved
    residuals: Sequence[LowRank | None]


class Residual(Step, Protocol):
    """Adds to each linear what its codes do not hold; never makes it worse."""

    def spec(self, shape: tuple[int, int]) -> LowRankSpec | None:
        """What a linear of `shape` (out, in) will get."""
        ...

    def correct(
        self,
        solved: Solved,
        weights: Sequence[Tensor],
        inputs: Inputs,
        name: str,
        again: Callable[[Tensor], Solved],
    ) -> Corrected:
        """Residuals of `weights` [out, in], solved one below the other as `solved`; `again` solves others like that."""
        ...


@dataclass(kw_only=True)
class Stage:
    """Linears that receive one and the same input, and what is known of it."""

    refs: Sequence[Ref]
    inputs: Inputs


@dataclass(frozen=True, kw_only=True)
class Block:
    """A resident block as a transform sees it.

    stages: in the order they run. A transform that changes what flows into a stage changes its `inputs` with it.
    topology: None for a family that no table lists; transforms then do nothing and say so.
    format: of all its linears, but for those that `formats` names.  activations: what their inputs are rounded to.
    """

    name: str
    module: nn.Module
    topology: Topology | None
    stages: Sequence[Stage]
    format: Format
    formats: Mapping[str, Format] = field(default_factory=dict)
    activations: Format | None = None

    def format_of(self, ref: Ref) -> Format:
        """What `ref` will be quantized to."""
        return self.formats.get(ref.name, self.format)


@dataclass(frozen=True, kw_only=True)
class Transformed:
    """What a transform did. changed: parameters of the block, by name, that are not weights of its linears and have
    new values (norms, biases); notes: what the user should know, by the name of a linear."""

    changed: frozenset[str] = frozenset()
    notes: dict[str, list[str]] = field(default_factory=dict)


class Transform(Step, Protocol):
    """Changes the parameters of a block in place so that it computes the same function."""

    def apply(self, block: Block) -> Transformed: ...


@dataclass(frozen=True, kw_only=True)
class Pupil:
    """A linear of a block being learned: `weight` [out, in] float32 before it was quantized, its codes so far, what is
    known of its inputs, and the residual that goes with the codes."""

    ref: Ref
    weight: Tensor
    quantized: Quantized
    inputs: Inputs
    residual: LowRank | None = None
    outliers: Outliers | None = None

    def values(self, quantized: Quantized) -> Tensor:
        """What the linear computes with, [out, in] float32, when its codes are `quantized`."""
        decoded = quantized.dequantize()
        if self.outliers is not None:
            return self.outliers.dense(decoded)
        return decoded if self.residual is None else decoded + self.residual.dense()


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A block with the codes the other steps found, and what it should put out.

    forward: the block on hidden states [B, T, H], B as `Learner.sequences` says; gradients reach the parameters.
    inputs: sequences [T, H] as they arrive here behind quantized blocks; targets: what the original block makes of
    the same text behind original blocks.
    """

    name: str
    pupils: Sequence[Pupil]
    forward: Callable[[Tensor], Tensor]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """quantized: of each pupil, in order. before, after: the loss by which the state was chosen."""

    quantized: Sequence[Quantized]
    before: float
    after: float


class Learner(Step, Protocol):
    """Improves the codes of all linears of a block together; never makes the loss it chooses by worse."""

    def sequences(self, samples: int, length: int) -> int:
        """How many of `samples` sequences of `length` tokens go through the block at a time."""
        ...

    def learn(self, lesson: Lesson) -> Learned: ...


def need_hessian(inputs: Inputs, method: str, name: str) -> Tensor:
    """The Hessian of `inputs`; BadInput where there was no calibration, FewbitsError where it overflowed."""
    if inputs.hessian is None:
        raise BadInput(f"{name}: {method} needs calibration; pass text or use method 'rtn'")
    if not bool(torch.isfinite(inputs.hessian).all()):
        raise FewbitsError(
            f"{name}: the calibration inputs overflowed (NaN or infinite Hessian); calibrate in float32 or bfloat16"
        )
    return inputs.hessian


def revived(hessian: Tensor) -> Tensor:
    """H with inputs that were always zero taken for average ones, each by itself: other text may reach them, and a
    search that finds their errors to cost nothing would clip their weights."""
    dead = hessian.diagonal() == 0
    if not bool(dead.any()):
        return hessian
    found = hessian.clone()
    found.diagonal().masked_fill_(dead, float(hessian.diagonal().mean()))
    return found


def damped_hessian(hessian: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag H) I in float64, inputs that were always zero taken for average ones."""
    found = hessian.to(torch.float64, copy=True)
    dead, mean = found.diagonal() == 0, float(found.diagonal().mean())
    found.diagonal().add_(damping * mean).masked_fill_(dead, mean)
    return found


def drifted(weight: Tensor, inputs: Inputs, hessian: Tensor, strength: float) -> Tensor:
    """W (I + strength C H^-1): what to aim at where the drift C of the inputs is known, which completes the square of
    GPTAQ's objective; else W. `hessian`: damped, float64."""
    if inputs.cross is None or not strength:
        return weight
    shift = torch.linalg.solve(hessian, inputs.cross.double(), left=False)
    return weight + strength * (weight @ shift.to(weight.dtype))


def proxy_loss(delta: Tensor, hessian: Tensor) -> Tensor:
    """dW H dW^T per row of `delta` [out, in], summed in float64: twice the mean squared output error per token.

    The product is taken in the dtype of `delta`: float32 resolves a loss to about 1e-6 of its size.
    """
    return ((delta @ hessian.to(delta.dtype)) * delta).sum(dim=1, dtype=torch.float64)
