"""`convert --to gguf`: quantized modules of any checkpoint as one file for llama.cpp.

Modules keep their values where a GGUF type can say them (checkpoints/gguf_exact.py). With `requantize` the others are
rounded to the K-quant of as many bits (4-bit tables to IQ4_NL, 8 bits and what has no format to Q8_0).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import QuantizedModules, Stored
from fewbits.checkpoints.gguf_exact import exact_type
from fewbits.checkpoints.gguf_export import FILE, Packed, Written, dense_kind, write_gguf
from fewbits.core.errors import Unsupported
from fewbits.core.progress import OnProgress, Progress
from fewbits.formats import Format, Quantized

_NEAREST = {1: "q2_k", 2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one module: see `convert.Converted`."""

    name: str
    before: str
    after: str
    reason: str
    sqnr_db: float | None


def write(
    source: Source, packed: QuantizedModules, directory: Path, name: str, *, requantize: bool, dtype: torch.dtype,
    progress: OnProgress,
) -> tuple[list[Outcome], list[str], int]:  # fmt: skip
    """Writes `directory`/model.gguf; the account of the modules, notes, and the size in bytes."""
    modules, before, reasons, notes = {}, {}, {}, dict.fromkeys(packed.notes)
    for module, entry in packed.entries.items():
        found = packed.read(module)
        reason = _refuses(found.format, found) if isinstance(found, Stored) else found.note
        if isinstance(found, Stored) and found.activations is not None:
            notes[f"activations are no longer rounded to {found.activations.name}"] = None
        if reason is not None and not requantize:
            raise Unsupported(
                f"{module}: gguf cannot hold it as it is: {reason}. --requantize rounds such layers again and states "
                f"the error"
            )
        value = found.dense() if not isinstance(found, Stored) else None
        shape = found.shape if value is None else (value.shape[0], value.shape[1])
        format = found.format if isinstance(found, Stored) else None
        before[module], reasons[module] = "decoded" if format is None else format.name, reason or ""
        modules[entry.tensor.removesuffix(".weight")] = Packed(
            format=format if reason is None else None,
            shape=shape,
            read=_reader(packed, module, exact=reason is None),
            target=nearest(format) if requantize else None,
        )
    written = write_gguf(
        source, directory / FILE, modules, dense=dense_kind(dtype), name=name,
        on_tensor=lambda done, total, tensor: progress(Progress("to gguf", done, total, tensor)),
    )  # fmt: skip
    found_names = {entry.tensor: module for module, entry in packed.entries.items()}
    account = [_outcome(each, found_names[each.name], before, reasons) for each in written if each.quantized]
    return account, list(notes), (directory / FILE).stat().st_size


def _outcome(each: Written, module: str, before: dict[str, str], reasons: dict[str, str]) -> Outcome:
    error = -20 * math.log10(each.error) if each.error else None
    return Outcome(
        name=module, before=before[module], after=each.kind.lower(), reason=reasons[module] or each.note, sqnr_db=error
    )


def _refuses(format: Format, stored: Stored) -> str | None:
    """Why the values would change, or None."""
    if not dataclasses.replace(stored, activations=None).plain:
        return "GGUF has no reordered or transformed inputs and no residuals"
    if exact_type(format, stored.shape) is None:
        return f"no GGUF type has the values of {format.name}"
    return None


def nearest(format: Format | None) -> str:
    """The GGUF type to round to again."""
    if format is None or format.bits > max(_NEAREST):
        return "q8_0"
    return "iq4_nl" if format.bits == 4 and format.grid.kind != "integer" else _NEAREST[format.bits]


def _reader(packed: QuantizedModules, module: str, *, exact: bool) -> Callable[[], Quantized | Tensor]:
    def read() -> Quantized | Tensor:
        found = packed.read(module)
        return found.quantized() if exact and isinstance(found, Stored) else found.dense()

    return read
