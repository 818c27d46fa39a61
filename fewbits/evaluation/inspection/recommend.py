"""From figures to commands: which scheme to take for which purpose.

A scheme is recommended on its measured KL under round-to-nearest and its size. GPTQ, the default of
`fewbits quantize`, does better than that below 8 bits (docs/studies.md has by how much), so the figure is on the safe
side where the command runs GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewbits.core.units import bytes_text

NEAR_FOUR = (3.5, 4.6)  # bits per weight

Row = dict[str, Any]


def recommend(rows: Sequence[Row], *, max_loss: float, memory: int | None) -> list[Row]:
    """[{"purpose", "scheme", "why"}] from the rows of schemes; a purpose that no scheme serves says so."""
    writable = [row for row in rows if row["command"]]
    found = []
    if memory is not None:
        fitting = [row for row in writable if row["bytes"] <= memory]
        purpose = f"fits in {bytes_text(memory)}"
        smallest = min(writable, key=lambda row: row["bytes"], default=None)
        none = f"nothing: the smallest tried takes {bytes_text(smallest['bytes'])}" if smallest else "nothing was tried"
        found.append(_pick(purpose, _least_loss(fitting), "least loss among those whose weights fit", none))
    close = [row for row in writable if row["kl"]["mean"] <= max_loss]
    none = f"nothing tried stays below a KL of {max_loss:g}: raise --max-loss, or take the 8-bit scheme of least loss"
    found.append(_pick("little loss", _smallest(close), f"smallest with a KL of at most {max_loss:g}", none))
    near = [row for row in writable if NEAR_FOUR[0] <= row["bits_per_weight"] <= NEAR_FOUR[1]]
    found.append(_pick("about 4 bits", _least_loss(near), "least loss at about 4 bits", "no 4-bit scheme was tried"))
    packed = [row for row in writable if row["packed"]]
    quick = _least_loss([row for row in packed if row in near]) or _smallest(packed)
    found.append(
        _pick(
            "fast here",
            quick,
            "a kernel of this machine multiplies its weights as they are stored",
            "no kernel of this machine multiplies any of these as they are stored; they are decoded first",
        )
    )
    portable = [row for row in near if "vLLM" in row["readers"]]
    found.append(
        _pick(
            "loads anywhere",
            _least_loss(portable),
            "least loss at about 4 bits among what transformers and vLLM load",
            "transformers and vLLM load none of the 4-bit schemes on this model's shapes",
        )
    )
    return found


def _pick(purpose: str, row: Row | None, why: str, none: str) -> Row:
    if row is None:
        return {"purpose": purpose, "scheme": None, "why": none, "command": None}
    return {"purpose": purpose, "scheme": row["label"], "why": why, "command": row["command"]}


def _least_loss(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: (row["kl"]["mean"], row["bytes"]), default=None)


def _smallest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: (row["bytes"], row["kl"]["mean"]), default=None)
