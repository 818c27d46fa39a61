"""Which GGUF type says what a format of ours says, value for value.

GGUF scales are fp16 per 32 or 256 weights, its levels integers. So:

| format | type | because |
|---|---|---|
| q4_0 ... q6_k, iq4_nl, tq1_0, tq2_0, mxfp4 | the same | |
| intB-gN, N a multiple of 32, or per channel or tensor | Q4_0, Q5_0, Q8_0 | its levels hold theirs; scales repeat |
| intB-asym-gN | Q4_0, Q5_0, Q8_0, one bit wider | (q - zero) is an integer of B + 1 bits; no minimum needs rounding |
| intB-min-gN | Q4_1, Q5_1 | level * scale - minimum |
| ternary-gN, N a multiple of 256 | TQ2_0, else Q4_0 | |

The scale must be an fp16 number for that, as bf16 scales between 2**-14 and 65504 are; each tensor is compared, bit for
bit, before it is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.core.errors import Unsupported
from fewbits.formats import Format, Quantized, parse_format
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.kquant import BlockFormat
from fewbits.formats.scales import PlainScale, PowerScale

_SYMMETRIC = ("q4_0", "q5_0", "q8_0")
_AFFINE = ("q4_1", "q5_1")


def exact_type(format: Format, shape: tuple[int, int]) -> str | None:
    """The name of a format with a GGUF type that holds every value of a matrix in `format`, scales permitting."""
    columns = shape[1]
    if isinstance(format, BlockFormat):
        return format.name if columns % format.block == 0 else None
    if is_mxfp4(format):
        return "mxfp4" if columns % 32 == 0 else None
    scaling, levels = format.scaling, format.grid.levels
    whole = all(level == round(level) for level in levels)
    if not whole or format.fit or not isinstance(scaling.store, PlainScale) or scaling.block == "tile" or columns % 32:
        return None
    size = scaling.group_size if scaling.block == "group" else columns
    assert size is not None
    if format.grid == ELEMENTS["ternary"] and size % 256 == 0 and columns % 256 == 0:
        return "tq2_0"
    if size % 32:
        return None
    reach = levels[-1] - levels[0] if scaling.zero_point else 0.0
    low, high = (-reach, reach) if scaling.zero_point else (levels[0], levels[-1])
    names = _AFFINE if scaling.minimum else _SYMMETRIC
    return next((name for name in names if _holds(parse_format(name), low, high)), None)


def is_mxfp4(format: Format) -> bool:
    scaling = format.scaling
    return (
        format.grid == ELEMENTS["fp4_e2m1"]
        and isinstance(scaling.store, PowerScale)
        and (scaling.block, scaling.group_size) == ("group", 32)
    )


def _holds(target: Format, low: float, high: float) -> bool:
    return target.grid.levels[0] <= low and high <= target.grid.levels[-1]


def restate(weight: Quantized, name: str, where: str) -> Quantized:
    """`weight` in the format called `name`, which `exact_type` gave; Unsupported where a value would change."""
    if weight.format.name == name:
        return weight
    target = parse_format(name)
    if name == "mxfp4":
        return Quantized(format=target, codes=weight.codes, scale=weight.scale, zero=None)
    found = _restated(weight, target)
    if not torch.equal(found.dequantize(), weight.dequantize()):
        raise Unsupported(
            f"{where}: some of its scales are no fp16 numbers, which {name.upper()} stores; choose a GGUF type to "
            f"quantize to instead"
        )
    return found


def _restated(weight: Quantized, target: Format) -> Quantized:
    levels = torch.tensor(weight.format.grid.levels)[weight.codes.long()]
    rows, columns = weight.shape
    size = target.scaling.group_size
    assert size is not None
    scale, zero = weight.format.expand(weight.scale.float(), _float(weight.zero), weight.shape)
    if weight.format.scaling.zero_point:
        assert zero is not None
        levels = levels - zero
    codes = (levels - target.grid.levels[0]).to(torch.uint8)
    units = scale.expand(rows, columns)[:, ::size].half().clone(memory_format=torch.contiguous_format)
    state = {"scale": units}
    if target.scaling.minimum:
        assert zero is not None
        state["minimum"] = zero.expand(rows, columns)[:, ::size].half().clone(memory_format=torch.contiguous_format)
    settled, minimum = target.unsettle((rows, columns), state)
    return Quantized(format=target, codes=codes, scale=settled, zero=minimum, stored=state)


def _float(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else zero.float()
