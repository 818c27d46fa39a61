"""From logits to the next token: greedy, or temperature and nucleus (top-p) sampling.

    p = softmax(logits / temperature), cut to the fewest tokens whose sum reaches top_p, renormalised

Nucleus sampling: Holtzman et al., arXiv 1904.09751. A `torch.Generator` of its own makes a seed repeatable
whatever else the program draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are picked. temperature 0 is greedy; top_p 1 cuts nothing; seed None draws a fresh one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise BadInput(f"temperature {self.temperature}: 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p {self.top_p}: above 0 and at most 1")

    def generator(self) -> torch.Generator:
        """The source of randomness of one generation."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def pick(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token for `logits` [vocabulary]. BadInput where they are NaN: the model is broken."""
        if self.temperature == 0:
            token = int(logits.argmax())
            if bool(torch.isnan(logits[token])):
                raise BadInput("the model's logits are NaN: its weights are damaged, or overflow its dtype")
            return token
        probabilities = torch.softmax(logits.float() / self.temperature, -1).cpu()
        if not bool(torch.isfinite(probabilities).all()):
            raise BadInput("the model's logits are NaN: its weights are damaged, or overflow its dtype")
        if self.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            # A token stays while the sum before it is short of top_p, so the first always does.
            ordered[ordered.cumsum(0) - ordered >= self.top_p] = 0
            return int(index[torch.multinomial(ordered, 1, generator=generator)])
        return int(torch.multinomial(probabilities, 1, generator=generator))
