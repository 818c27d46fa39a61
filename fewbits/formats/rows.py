"""Activations: rows that come as the model runs, each rounded as if it were alone.

    x' = round_rows(x, format)          x [tokens, in]

What a token is rounded to must not depend on which other tokens share its batch. Scales per token and per group of a
token are such as they are. E4M3 scales under an outer float32 (NVFP4) get an outer scale per token here, where a weight
has one per tensor; checkpoints of the ecosystem fix one per layer by calibration, which this is never worse than by
range. Formats whose blocks reach over rows, or whose levels are fitted to a tensor, are for weights only.
"""

from __future__ import annotations

from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats.base import Format
from fewbits.formats.scales import FloatScale


def check_rows(format: Format) -> None:
    """BadInput where activations cannot be rounded to `format`."""
    scaling = format.scaling
    if scaling.block not in ("token", "group") or format.fit:
        raise BadInput(
            f"activations as {format.name}; their scales are per token or per group of a token, "
            "e.g. int8-token, fp8_e4m3-g128, mxfp4"
        )
    plain = type(scaling.store) is FloatScale and type(format) is Format
    if scaling.store.nested and not plain:
        raise BadInput(f"activations as {format.name}: its scales are decided for a whole tensor; use nvfp4 or mxfp4")


def round_rows(x: Tensor, format: Format) -> Tensor:
    """`x` [rows, in] moved to what `format` can say, float32; each row alone. BadInput for NaN or infinity."""
    x = x.float()
    if not x.shape[0]:
        return x
    format.check(x, "activations")
    scale, zero = format.params(x)
    if isinstance(format.scaling.store, FloatScale):
        scale = format.scaling.store.by_row(scale)
    return format.snap(x, *format.expand(scale, zero, (x.shape[0], x.shape[1])))
