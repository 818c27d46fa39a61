"""What rounding the inputs costs, layer by layer, which channels are to blame and what would help most.

Read from the certificate (algorithms/diagnosis.py put it there); "" where inputs are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewbits.report.certificate import Certificate, number, text
from fewbits.report.tables import table
from fewbits.report.words import DASH, esc, percent

_MOST = 12
_LEAST = 0.01  # share of an error that a channel is blamed for
_CALLED = {
    "token": "token scales",
    "sinks": "sinks apart",
    "llm_int8": "LLM.int8()",
    "smoothquant": "SmoothQuant",
    "rotate": "rotation",
}


@dataclass(frozen=True, kw_only=True)
class Diagnosed:
    """error: share of the outputs lost by rounding to nearest on both sides; inputs: on the input side alone; channels:
    (number, share of inputs), worst first; remedies: name -> error with it; sinks: share of the tokens."""

    name: str
    error: float
    inputs: float
    channels: tuple[tuple[int, float], ...]
    remedies: dict[str, float]
    sinks: float = 0.0


def diagnosed(certificate: Certificate) -> list[Diagnosed]:
    """Layers that were looked at, worst first."""
    entries = certificate.raw.get("layers")
    found = [_diagnosed(entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return sorted((each for each in found if each is not None), key=lambda each: -each.error)


def _diagnosed(entry: dict[str, Any]) -> Diagnosed | None:
    name, raw = text(entry.get("name")), entry.get("rounding")
    if name is None or not isinstance(raw, dict):
        return None
    error, inputs = number(raw.get("error")), number(raw.get("inputs"))
    if error is None or inputs is None:
        return None
    pairs = [each for each in _list(raw.get("channels")) if isinstance(each, list) and len(each) == 2]
    channels = [(number(channel), number(share)) for channel, share in pairs]
    remedies = raw.get("remedies")
    tried = {key: number(remedies.get(key)) for key in _CALLED} if isinstance(remedies, dict) else {}
    return Diagnosed(
        name=name,
        error=error,
        inputs=inputs,
        channels=tuple((int(c), s) for c, s in channels if c is not None and s is not None),
        remedies={key: value for key, value in tried.items() if value is not None},
        sinks=number(raw.get("sinks")) or 0.0,
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def lead(certificate: Certificate) -> str:
    """What would help most, over all layers."""
    layers = diagnosed(certificate)
    total = sum(layer.error for layer in layers)
    if not total:
        return ""
    left = {
        key: sum(layer.remedies[key] for layer in layers) / total
        for key in _CALLED
        if all(key in layer.remedies for layer in layers)
    }
    said = ", ".join(
        f"{_CALLED[key]} {percent(value)}" for key, value in sorted(left.items(), key=lambda each: each[1])
    )
    best = min(left.values(), default=1.0)
    advice = f"Of the sum of these errors would be left with {said}. " if left else ""
    advice += "Nothing here would help much. " if left and best > 0.8 else ""
    towering = [layer for layer in layers if layer.sinks]
    if towering:
        most = max(layer.sinks for layer in towering)
        advice += (
            f"In {len(towering)} of {len(layers)} inputs some tokens (at most {percent(most)} of them) tower over the "
            "others: sinks, mostly the first of a text. What is lost of them is not counted. "
        )
    return (
        f"{advice}Errors are shares of the square of a layer's outputs, rounded to nearest on both sides, as they are "
        "and with each remedy, on a sample of held-out text behind the transforms that were made; layers that share an "
        "input are looked at together."
    )


def layers(certificate: Certificate) -> str:
    """The worst layers."""
    found = diagnosed(certificate)
    keys = [key for key in _CALLED if any(key in layer.remedies for layer in found)]
    rows = [
        [
            f"<code>{esc(layer.name)}</code>",
            percent(layer.error),
            percent(layer.inputs),
            ", ".join(f"{channel} ({percent(share)})" for channel, share in layer.channels if share > _LEAST) or DASH,
            *(_left(layer, key) for key in keys),
        ]
        for layer in found[:_MOST]
    ]
    heads = [
        "Layer",
        "Error",
        "By inputs",
        "Channels to blame",
        *(_CALLED[key][0].upper() + _CALLED[key][1:] for key in keys),
    ]
    return table(heads, rows) if rows else ""


def _left(layer: Diagnosed, key: str) -> str:
    value = layer.remedies.get(key)
    if value is None:
        return DASH
    shown = percent(value)
    return f"<strong>{shown}</strong>" if value == min(layer.remedies.values()) and value < layer.error else shown
