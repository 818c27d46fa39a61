"""What in the activations makes some schemes fail: `observe`, fed from the pass that measures the schemes.

One scale per token has to stretch to the outlier dimensions, so everything else is rounded coarsely; one scale for all
tokens has to stretch to the massive activations and what they turn into behind a norm. Definitions and sources are in
`fewbits.evaluation.observe`.

The peak of a linear's input is max |x| / root mean square: about 5 for Gaussian values, and its square is what a scale
per tensor loses in signal to noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fewbits.calibration.activations import THRESHOLD, TOKEN_SHARE
from fewbits.evaluation.inspection.inputs import Inputs
from fewbits.evaluation.observe import (
    CLASSES,
    Observed,
    Place,
    massive_activations,
    massive_values,
    outlier_features,
    reads_stream,
    token_classes,
)
from fewbits.models.walk import Ref


class Outliers:
    """Collects block by block over the windows `ids` [S, T]; `results` is JSON-ready."""

    def __init__(self, ids: Tensor, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.observed = Observed(ids=ids, classes=token_classes(ids, tokenizer))
        self._peaks: list[dict[str, float]] = []  # by block, by kind of linear

    def hidden(self, block: int, name: str, hidden: Tensor) -> None:
        """`hidden` [S, T, H] leave `block` (-1: the embeddings)."""
        place = Place(name, block, "hidden", hidden.shape[-1])
        self.observed.hidden.append(place)
        for window, (ids, classes) in enumerate(zip(self.observed.ids, self.observed.classes, strict=True)):
            place.see(hidden[window : window + 1], classes)
            self.observed.massive += massive_values(block, window, ids, hidden[window], place)
        place.check(name)

    def see(self, block: int, prefix: str, hidden: Tensor, refs: Sequence[Ref], inputs: dict[str, Inputs]) -> None:
        """`hidden` [S, T, H] leave `block`, of which each ref received `inputs` by its name."""
        self.hidden(block, prefix, hidden)
        members: dict[int, list[Ref]] = {}
        for ref in refs:
            if ref.name in inputs:
                members.setdefault(id(inputs[ref.name]), []).append(ref)
        peaks: dict[str, float] = {}
        for sharing in members.values():
            head = sharing[0]
            place = self._input(block, prefix, head, inputs[head.name].x, hidden.shape[-1])
            peak = float(place.absmax.max()) / place.rms if place.rms else 0.0
            for ref in sharing:
                peaks[ref.kind] = max(peaks.get(ref.kind, 0.0), peak)
        self._peaks.append(peaks)

    def _input(self, block: int, prefix: str, head: Ref, x: Tensor, width: int) -> Place:
        name = f"{prefix}.{head.name}"
        place = Place(name, block, head.kind, x.shape[-1], residual=reads_stream(head, width))
        self.observed.inputs.append(place)
        whole = len(x) == self.observed.ids.numel()  # an expert receives some of the tokens
        parts = x.unflatten(0, tuple(self.observed.ids.shape)) if whole else [x]
        for rows, classes in zip(parts, self.observed.classes, strict=False):
            place.see(rows[None] if whole else rows, classes)
        place.check(name)
        return place

    def results(self) -> dict[str, Any]:
        observed = self.observed
        blocks = observed.hidden[1:]
        return {
            "width": len(blocks[0].absmax),
            "dimensions": outlier_features(observed),
            "inputs": len(observed.inputs),
            "large": sum(float(place.absmax.max()) >= THRESHOLD for place in observed.inputs),
            "large_tokens": sum(float(place.large_share.max()) >= TOKEN_SHARE for place in observed.inputs),
            "largest": {
                name: [float(place.class_absmax[number].max()) for place in blocks]
                for number, name in enumerate(CLASSES)
            },
            "median": [place.median for place in blocks],
            "massive": massive_activations(observed, self.tokenizer),
            "peaks": {
                kind: [peaks.get(kind) for peaks in self._peaks]
                for kind in dict.fromkeys(kind for peaks in self._peaks for kind in peaks)
            },
        }
