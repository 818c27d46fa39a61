"""Static ranges of activations: what calibration text says a linear's input will reach.

    scale = range / levels, one per tensor or per group of channels, for all tokens to come

The range is seen from a stream: every estimator of ranges.py reads it off a histogram, and `moving_average` follows the
absmax of each batch,

    m <- m + 0.01 (absmax(batch) - m),

which forgets a rare extreme where absmax keeps the largest ever seen (TensorFlow's and PyTorch's observers). `delayed`
is the largest of the last 16 batches (calibration/amax_history.py).

A *sink* is a token that towers over the others (formats/rows.py): in nearly every text the first, and in a few blocks a
delimiter, where the model parks attention it has no use for. With formats that keep sinks apart (`-sinks`) they are
left out of the range; without, they are part of it, and the estimator has to decide. They are counted either way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.algorithms.ranges import RANGES, Range
from fewbits.calibration.amax_history import AmaxHistory
from fewbits.calibration.histogram import Histogram
from fewbits.core.errors import FewbitsError, unknown
from fewbits.formats import Format
from fewbits.formats.rows import sinks
from fewbits.formats.scales import State

MOVING_AVERAGE = "moving_average"
DELAYED = "delayed"
_MOMENTUM = 0.01
_HISTORY = 16
# Other names for the same.
ALIASES = {"entropy": "kl", "minmax": "absmax", "ema": MOVING_AVERAGE}


def estimator_called(name: str) -> str:
    """The estimator of that name or alias; BadInput lists what there is."""
    known = [*RANGES.names(), MOVING_AVERAGE, DELAYED]
    found = ALIASES.get(name, name)
    if found not in known:
        raise unknown("range of activations", name, [*known, *ALIASES])
    return found


@dataclass(kw_only=True)
class InputRange:
    """The static range of one input in `format`, by the estimator called `estimator`; text comes by `add`."""

    format: Format
    estimator: str
    tokens: int = 0
    sinks: int = 0
    largest_sink: float = 0.0
    finite: bool = True
    _device: torch.device | None = None  # of the text; histograms and histories are on the CPU
    _low: Tensor | None = None
    _high: Tensor | None = None
    _histograms: list[Histogram] = field(default_factory=list)
    _histories: list[AmaxHistory] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Sees inputs `x` [..., in] of one batch."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self._device = x.device
        self.finite &= bool(torch.isfinite(x).all())
        apart = sinks(x)
        self.tokens += len(x)
        self.sinks += int(apart.sum())
        if bool(apart.any()):
            self.largest_sink = max(self.largest_sink, float(x[apart].abs().max()))
        if self.format.scaling.sinks:
            x = x[~apart]
        groups = x.split(self.format.scaling.width(x.shape[1]), dim=1)
        if self.estimator in ("absmax", MOVING_AVERAGE):
            self._extremes(groups)
            return
        if self.estimator == DELAYED:
            self._histories = self._histories or [AmaxHistory(length=_HISTORY, top=1.0) for _ in groups]
            for history, part in zip(self._histories, groups, strict=True):
                history.update(float(part.abs().max()))
            return
        self._histograms = self._histograms or [Histogram() for _ in groups]
        for histogram, part in zip(self._histograms, groups, strict=True):
            histogram.add(part)

    def _extremes(self, groups: tuple[Tensor, ...]) -> None:
        low = torch.stack([part.min() for part in groups])
        high = torch.stack([part.max() for part in groups])
        if self._low is None or self._high is None:
            self._low, self._high = low, high
        elif self.estimator == MOVING_AVERAGE:
            self._low = self._low + _MOMENTUM * (low - self._low)
            self._high = self._high + _MOMENTUM * (high - self._high)
        else:
            self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)

    def state(self, name: str, dtype: torch.dtype = torch.float32) -> State:
        """The parameters, by the names of `formats.rows.input_layout`; the scale rounded to what `dtype` can hold."""
        if not self.tokens:
            raise FewbitsError(
                f"{name}: no calibration text reached it, so its inputs have no range; use a dynamic one"
            )
        if not self.finite:
            raise FewbitsError(f"{name}: calibration inputs are NaN or infinite; calibrate in float32 or bfloat16")
        low, high = (end.to(self._device) for end in self._range())
        scale, zero = self.format.with_scale_dtype(dtype).params_from_range(low[None], high[None])
        found = {"input_scale": scale.float()}
        return found if zero is None else {**found, "input_zero": zero}

    def _range(self) -> Range:
        if self._low is not None and self._high is not None:
            return self._low, self._high
        if self._histories:
            reach = torch.tensor([1 / history.scale for history in self._histories])
            return -reach, reach
        method = RANGES.get(self.estimator)()
        ends = [method.of_histogram(histogram, self.format) for histogram in self._histograms]
        return torch.stack([low for low, _ in ends]).float(), torch.stack([high for _, high in ends]).float()

    def describe(self) -> dict[str, float | str]:
        """What is recorded of it."""
        return {
            "estimator": self.estimator,
            "sinks": self.sinks,
            "tokens": self.tokens,
            "largest_sink": self.largest_sink,
        }
