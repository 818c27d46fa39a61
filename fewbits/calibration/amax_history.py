"""Delayed scaling: a scale that is known before the values, from the largest magnitudes of the last steps.

    scale = (top / max(history)) / 2^margin

The history holds `length` largest magnitudes, this step's among them; the oldest is forgotten as the next one comes.
A step that has nothing to say changes nothing: with 0 (the layer did not run: an expert without tokens) the history
stays as it is, and with 0, infinity or NaN in it the old scale is kept. A scale too large for float32 is the largest
float32.

One extreme therefore holds the scale down for `length` steps and not for ever. It is how FP8 training scales without
looking at a tensor twice, and one of the ways static ranges are estimated (algorithms/input_ranges.py).
Source: NVIDIA, Transformer Engine, DelayedScaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fewbits.core.errors import BadInput

_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(kw_only=True)
class AmaxHistory:
    """The `scale` that values are multiplied by so that the largest expected one lands on `top` (448: E4M3)."""

    length: int = 1024
    top: float = 448.0
    margin: int = 0
    scale: float = 1.0
    _seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.length < 1 or self.top <= 0:
            raise BadInput(f"{self}: a history holds at least 1 step, and top is above 0")

    def update(self, amax: float) -> float:
        """Takes the largest magnitude of this step; the scale from now on."""
        if amax == 0:
            return self.scale
        self._seen = [*self._seen, amax][-self.length :]
        largest = math.nan if any(math.isnan(each) for each in self._seen) else max(self._seen)
        if math.isfinite(largest) and largest > 0:
            self.scale = min(self.top / largest / 2**self.margin, _LARGEST)
        return self.scale
