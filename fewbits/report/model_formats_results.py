"""What the record of `fewbits study formats MODEL` says: the questions its figures and its page ask of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Entry = Mapping[str, Any]
# Each operand with one scale for all of it, clipped for least error.
OPERANDS = (("weights", "tensor"), ("activations", "static"))


def of_bits(results: Results, bits: int) -> list[str]:
    """The formats of that many bits, in the record's order."""
    return [name for name, width in results["formats"].items() if width == bits]


def sqnr(results: Results, entry: Entry, scale: str, format: str) -> float:
    """SQNR in dB of one operand."""
    value: float = entry["sqnr_db"][scale][list(results["formats"]).index(format)]
    return value


def winner(results: Results, entry: Entry, scale: str, bits: int) -> str:
    """The best format of that many bits, the first on a tie."""
    return max(of_bits(results, bits), key=lambda format: sqnr(results, entry, scale, format))


def gain(results: Results, entry: Entry, scale: str) -> float:
    """How far E4M3 is ahead of INT8, dB."""
    return sqnr(results, entry, scale, "fp8_e4m3") - sqnr(results, entry, scale, "int8")


def points(results: Results) -> list[tuple[float, float]]:
    """(largest magnitude over rms, gain) of every operand of both networks."""
    return [
        (entry["peak"], gain(results, entry, scale))
        for role in ("model", "contrast")
        for operand, scale in OPERANDS
        for entry in results[role][operand]
    ]


def peaks(results: Results) -> list[float]:
    """Largest magnitude over rms of every operand of both networks."""
    return [peak for peak, _ in points(results)]


def unclipped(results: Results, peak: float) -> float:
    """The gain where INT8 clips nothing: its step is the largest magnitude / 127.5, its squared error step**2 / 12."""
    exact: float = results["gaussian"]["fp8_e4m3"]  # E4M3 hardly depends on the values
    return exact - 10 * math.log10(12 * 127.5**2 / peak**2)


def crossing(results: Results) -> float | None:
    """The peak (largest magnitude over rms) from which E4M3 is ahead, true of the most points; None if all are on one
    side."""
    found = sorted(points(results))
    ahead = [gain > 0 for _, gain in found]
    if all(ahead) or not any(ahead):
        return None
    right = [(ahead[:at].count(False) + ahead[at:].count(True), at) for at in range(1, len(found))]
    _, at = max(right, key=lambda pair: pair[0])
    return float((found[at - 1][0] * found[at][0]) ** 0.5)


def common(results: Results, entries: Sequence[Entry], scale: str, bits: int) -> tuple[str, int]:
    """The format that is best most often, and how often."""
    return Counter(winner(results, entry, scale, bits) for entry in entries).most_common(1)[0]


def short(kind: str) -> str:
    """'q_proj, k_proj, v_proj' -> 'q, k, v'."""
    return kind.replace("_proj", "")


def kinds_of(entries: Sequence[Entry]) -> list[str]:
    """The kinds of layer, in the order in which the model has them."""
    return list(dict.fromkeys(entry["kind"] for entry in entries))
