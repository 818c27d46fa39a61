"""What a change of a layer's weights costs the whole model, without running the whole model.

Let L be -log p of labels drawn from the model's own predictions p, summed over a window of text. To second order a
change dW of one weight moves the predictions of the window by

    KL(original || changed)  =  1/2  E[ <G, dW>^2 ],      G = dL/dW  [out, in],  the mean over labels and windows

(the Fisher information; Martens 2014, arXiv 1412.1193). G sums over the tokens of the window, so an error that many
tokens share, as in keys that all later tokens read, counts as often as it is shared. Rounding errors of different rows
are nearly uncorrelated, which leaves a sum over rows; and rows are taken to differ in size only,

    b_r = E |G_r|^2,    M = E[G^T G] / E|G|^2         [in, in], trace 1
    KL per token  =  1/2T  sum_r b_r (dW M dW^T)_rr        T tokens a window

so that each candidate costs one small product. What is left out: products between rows and between layers, and what is
beyond second order. One backward pass pays for all of it. M is not the Hessian X^T X of GPTQ: inputs that the output
hardly depends on count for little in M, such as the first token's with its massive activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewbits.algorithms.base import WeightMethod, proxy_loss
from fewbits.algorithms.mixes import solve
from fewbits.calibration.stats import Inputs, InputSum
from fewbits.core.errors import FewbitsError
from fewbits.formats.mix import Weights
from fewbits.models.walk import ExpertRef, Ref


@dataclass(kw_only=True)
class Sums:
    """Running sums for matrices that share an input: its Hessian, and M and b as the module's docstring has them."""

    refs: Sequence[Ref]
    plain: InputSum = field(init=False)
    weighted: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    tokens: int = 0  # of the text, whether or not they reached the matrices

    def __post_init__(self) -> None:
        first = self.refs[0].weight
        rows, columns = sum(ref.shape[0] for ref in self.refs), first.shape[1]
        self.plain = InputSum(columns, frozenset({"hessian"}), first.device)
        self.weighted = torch.zeros(columns, columns, dtype=torch.float64, device=first.device)
        self.rows = torch.zeros(rows, dtype=torch.float64, device=first.device)

    def add(self, gradient: Tensor, tokens: int) -> None:
        """G [out, in] of the stacked matrices over one window of so many tokens."""
        self.weighted += gradient.t() @ gradient
        self.rows += gradient.square().sum(dim=1, dtype=torch.float64)
        self.tokens += tokens

    def sensitivity(self, name: str) -> Sensitivity:
        inputs = self.plain.inputs(name)
        if not bool(torch.isfinite(self.weighted).all() and torch.isfinite(self.rows).all()):
            raise FewbitsError(f"{name}: gradients are NaN or infinite; plan in float32 or bfloat16")
        trace = max(float(self.rows.sum()), 1e-300)  # zero where the output does not depend on the layer
        rows = self.rows / max(self.tokens, 1)
        return Sensitivity(refs=self.refs, inputs=inputs, weighted=self.weighted / trace, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """inputs: the statistics a method needs; weighted: M [in, in]; rows: b / T [out] of the stacked `refs`."""

    refs: Sequence[Ref]
    inputs: Inputs
    weighted: Tensor
    rows: Tensor

    def loss(self, delta: Tensor) -> float:
        """Nats per token that a change `delta` [out, in] of the stacked weights costs the model."""
        return float((0.5 * self.rows * proxy_loss(delta, self.weighted).to(self.rows.dtype)).sum())

    def energy(self, matrix: Tensor) -> float:
        """Of the outputs of `matrix` [out, in], summed over the tokens that reach it."""
        assert self.inputs.hessian is not None
        return float(proxy_loss(matrix, self.inputs.hessian).sum()) * self.inputs.tokens


def parts(refs: Sequence[Ref]) -> list[list[Ref]]:
    """The linears of a group share their input; of experts, only gate and up of the same one do."""
    found: dict[object, list[Ref]] = {}
    for ref in refs:
        key = (ref.index, ref.part == "down_proj") if isinstance(ref, ExpertRef) else None
        found.setdefault(key, []).append(ref)
    return list(found.values())


Take = Callable[[Sequence[Tensor], int], None]


@contextlib.contextmanager
def watched(sums: Sequence[Sums]) -> Iterator[tuple[list[nn.Parameter], Take]]:
    """While open, a forward and backward pass through the block adds its inputs and gradients to `sums`.

    Linears are watched by hooks. Matrices inside fused parameters have no output to hook: gives those parameters, and
    a function that takes their gradients over one window and its number of tokens.
    """
    handles = []
    owners: dict[nn.Module, list[Sums]] = {}
    for each in sums:
        first = each.refs[0]
        if isinstance(first, ExpertRef):
            owners.setdefault(first.owner, []).append(each)
            continue
        seen: dict[int, Tensor] = {}
        for position, ref in enumerate(each.refs):
            assert not isinstance(ref, ExpertRef)
            handles.append(ref.module.register_forward_hook(_linear_hook(each, position, seen)))
    handles += [owner.register_forward_pre_hook(_owner_hook(inside)) for owner, inside in owners.items()]
    fused = [(owner, name, getattr(owner, name)) for owner in owners for name in _fused(owners[owner])]

    def take(gradients: Sequence[Tensor], tokens: int) -> None:
        for (owner, name, _), gradient in zip(fused, gradients, strict=True):
            for each in owners[owner]:
                refs = [ref for ref in each.refs if isinstance(ref, ExpertRef)]
                if refs[0].parameter == name:
                    each.add(torch.cat([ref.slice_of(gradient) for ref in refs]).float(), tokens)

    try:
        for _, _, parameter in fused:
            parameter.requires_grad_(True)
        yield [parameter for _, _, parameter in fused], take
    finally:
        for _, _, parameter in fused:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()


def _linear_hook(sums: Sums, position: int, seen: dict[int, Tensor]) -> Callable[..., None]:
    """Once every ref of `sums` has its gradient in `seen`, adds window by window."""

    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()

        def backward(gradient: Tensor) -> None:
            seen[position] = gradient.detach()
            if len(seen) < len(sums.refs):
                return
            sums.plain.add(x)
            for row in range(len(x)):
                window = x[row].float()
                found = torch.cat([seen[index][row].float().t() @ window for index in range(len(sums.refs))])
                sums.add(found, len(window))
            seen.clear()

        output.register_hook(backward)

    return forward


def _owner_hook(inside: Sequence[Sums]) -> Callable[..., None]:
    def forward(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            for each in inside:
                first = each.refs[0]
                assert isinstance(first, ExpertRef)
                each.plain.add(first.inputs(*args))

    return forward


def _fused(inside: Sequence[Sums]) -> list[str]:
    """The parameters that hold the matrices, each once."""
    return list(dict.fromkeys(ref.parameter for each in inside for ref in each.refs if isinstance(ref, ExpertRef)))


def cost(found: Sequence[Sensitivity], format: Weights, method: WeightMethod, name: str) -> tuple[float, float]:
    """(loss, relative output error) of a group in `format`, its codes chosen by `method`."""
    loss = noise = signal = 0.0
    for each in found:
        weights = [ref.weight.float() for ref in each.refs]
        stacked = torch.cat(weights)
        solved = [
            solve(method, (), part, format, each.inputs, name).quantized.dequantize()
            for part in ([stacked] if format.rowwise else weights)
        ]
        delta = stacked - torch.cat(solved)
        loss += each.loss(delta)
        noise += each.energy(delta)
        signal += each.energy(stacked)
    return loss, noise / signal if signal > 0 else 0.0
