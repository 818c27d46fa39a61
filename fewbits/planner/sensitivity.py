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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewbits.algorithms.base import WeightMethod, proxy_loss
from fewbits.calibration.stats import Inputs, InputSum
from fewbits.core.errors import FewbitsError, Unsupported
from fewbits.formats import Format
from fewbits.models.walk import ExpertRef, Ref


@dataclass(kw_only=True)
class GroupSums:
    """Running sums for linears that share an input: its Hessian, and M and b as the module's docstring has them."""

    refs: Sequence[Ref]
    plain: InputSum = field(init=False)
    weighted: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    windows: int = 0

    def __post_init__(self) -> None:
        first = self.refs[0].weight
        rows, columns = sum(ref.shape[0] for ref in self.refs), first.shape[1]
        self.plain = InputSum(columns, frozenset({"hessian"}), first.device)
        self.weighted = torch.zeros(columns, columns, dtype=torch.float64, device=first.device)
        self.rows = torch.zeros(rows, dtype=torch.float64, device=first.device)

    def add(self, x: Tensor, gradients: Sequence[Tensor]) -> None:
        """Inputs `x` [windows, tokens, in] and the gradients of each ref's outputs [windows, tokens, out]."""
        self.plain.add(x)
        for row in range(len(x)):
            window = x[row].float()
            for_weight = torch.cat([gradient[row].float().t() @ window for gradient in gradients])
            self.weighted += for_weight.t() @ for_weight
            self.rows += for_weight.square_().sum(dim=1, dtype=torch.float64)
        self.windows += len(x)

    def sensitivity(self, name: str) -> Sensitivity:
        inputs = self.plain.inputs(name)
        if not bool(torch.isfinite(self.weighted).all() and torch.isfinite(self.rows).all()):
            raise FewbitsError(f"{name}: gradients are NaN or infinite; plan in float32 or bfloat16")
        trace = max(float(self.rows.sum()), 1e-300)  # zero where the output does not depend on the layer
        rows = self.rows / max(self.plain.tokens, 1)
        return Sensitivity(inputs=inputs, weighted=self.weighted / trace, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """inputs: the statistics a method needs; weighted: M [in, in]; rows: b / T [out] of the stacked group."""

    inputs: Inputs
    weighted: Tensor
    rows: Tensor

    def loss(self, delta: Tensor) -> float:
        """Nats per token that a change `delta` [out, in] of the stacked weights costs the model."""
        return float((0.5 * self.rows * proxy_loss(delta, self.weighted).to(self.rows.dtype)).sum())

    def error(self, delta: Tensor, weight: Tensor) -> float:
        """The share of the energy of the group's outputs that `delta` changes."""
        assert self.inputs.hessian is not None
        signal = float(proxy_loss(weight, self.inputs.hessian).sum())
        return float(proxy_loss(delta, self.inputs.hessian).sum()) / signal if signal > 0 else 0.0


@contextlib.contextmanager
def watched(groups: Sequence[GroupSums]) -> Iterator[None]:
    """While open, a forward and backward pass through the block adds its inputs and gradients to `groups`."""
    handles = []

    def hook(sums: GroupSums, position: int, seen: dict[int, Tensor]):  # type: ignore[no-untyped-def]
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()

            def backward(gradient: Tensor) -> None:
                seen[position] = gradient.detach()
                if len(seen) == len(sums.refs):
                    sums.add(x, [seen[index] for index in range(len(sums.refs))])
                    seen.clear()

            output.register_hook(backward)

        return forward

    try:
        for sums in groups:
            seen: dict[int, Tensor] = {}
            for position, ref in enumerate(sums.refs):
                if isinstance(ref, ExpertRef):
                    raise Unsupported(
                        f"{ref.name}: plans are not made for fused experts; ignore them (--ignore 're:.*experts.*'), "
                        "or quantize to one scheme"
                    )
                handles.append(ref.module.register_forward_hook(hook(sums, position, seen)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def cost(
    refs: Sequence[Ref], format: Format, method: WeightMethod, found: Sensitivity, name: str
) -> tuple[float, float]:
    """(loss, relative output error) of the group `refs` in `format`, its codes chosen by `method`."""
    weights = [ref.weight.float() for ref in refs]
    parts = [torch.cat(weights)] if format.rowwise else weights
    deltas = [part - method.solve(part, format, found.inputs, name).quantized.dequantize() for part in parts]
    delta = torch.cat(deltas)
    return found.loss(delta), found.error(delta, torch.cat(weights))
