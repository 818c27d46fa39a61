"""What linears receive in one forward, and the output error of a weight on it.

    ||X D^T||^2 = tr(D G D^T),   D = W - Q,   G = X^T X

The right side is the shorter way where the text has more tokens than the layer has inputs: G is computed once, and
each scheme then costs one product of the layer's own size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.algorithms.base import proxy_loss
from fewbits.formats import Format
from fewbits.models.walk import ExpertRef, Ref


class Inputs:
    """What one linear (or several that share it) receives: X [n, in], float32."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach().reshape(-1, x.shape[-1]).float()
        self._gram: Tensor | None = None
        self._rounded: dict[str, Tensor] = {}

    def energy(self, matrix: Tensor) -> float:
        """||X M^T||^2 of `matrix` [out, in]."""
        if len(self.x) <= matrix.shape[1]:
            return float((self.x @ matrix.t()).square_().sum(dtype=torch.float64))
        if self._gram is None:
            self._gram = self.x.t() @ self.x
        return float(proxy_loss(matrix, self._gram).sum())

    def error(self, weight: Tensor, decoded: Tensor, activations: Format | None, signal: float) -> float | None:
        """The relative output error of `decoded` in place of `weight`; None where there is no output to compare.

        signal: the energy of `weight`.
        """
        if not signal > 0:
            return None
        if activations is None:
            return max(self.energy(weight - decoded), 0.0) / signal
        # X W^T - X' Q^T, as two small products: both factors are near zero where the scheme is good.
        noise = torch.addmm((self.x - self.rounded(activations)) @ decoded.t(), self.x, (weight - decoded).t())
        return float(noise.square_().sum(dtype=torch.float64)) / signal

    def rounded(self, format: Format) -> Tensor:
        if format.name not in self._rounded:
            self._rounded[format.name] = format.quantize(self.x, "activations").dequantize()
        return self._rounded[format.name]


@contextlib.contextmanager
def received(refs: Sequence[Ref]) -> Iterator[dict[str, Inputs]]:
    """While open, fills the dictionary with what each ref receives, by name, in one forward; q, k, v share theirs."""
    found: dict[str, Inputs] = {}
    shared: list[tuple[Tensor, Inputs]] = []

    def linear(names: Sequence[str]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            known = next((inputs for x, inputs in shared if x is args[0]), None)
            if known is None:
                known = Inputs(args[0])
                shared.append((args[0], known))
            found.update({name: known for name in names})

        return hook

    def experts(members: Sequence[ExpertRef]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            first: dict[int, Inputs] = {}
            for ref in members:
                if ref.part == "down_proj":
                    found[ref.name] = Inputs(ref.inputs(*args))
                else:  # gate and up of one expert receive the same tokens
                    found[ref.name] = first.setdefault(ref.index, Inputs(ref.inputs(*args)))

        return hook

    owners: dict[nn.Module, list[ExpertRef]] = {}
    handles = []
    for ref in refs:
        if isinstance(ref, ExpertRef):
            owners.setdefault(ref.owner, []).append(ref)
        else:
            handles.append(ref.module.register_forward_pre_hook(linear([ref.name])))
    handles += [owner.register_forward_pre_hook(experts(members)) for owner, members in owners.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
