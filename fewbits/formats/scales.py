"""How the scale of a block is stored.

A block's scale costs bits too: 16 per group of 64 are 0.25 per weight, per group of 16 a whole one. So small
blocks store their scales in few bits:

| store | stored form | value | bits each | used by |
|---|---|---|---|---|
| `PlainScale` | float32, float16 or bfloat16 | itself | 32 or 16 | most |
| `PowerScale` | E8M0: a biased exponent | 2**(e - 127) | 8 | MXFP4, MXFP6, MXFP8 |
| `FloatScale` | E4M3 under one float32 per tensor | e4m3 * outer | 8 | NVFP4 |
| `DividedScale` | the same with the reciprocal of the outer one | e4m3 / divisor | 8 | NVFP4 of compressed-tensors |
| `DoubleScale` | 8-bit dynamic code, per 256 a float32 range, one mean | map[code] * range + mean | 8.125 | QLoRA |

A store does two things. `round` is elementwise and runs on every candidate scale of a range search. `settle`
runs once, on all scales of a tensor: it decides what is shared (the outer scale, the ranges, the mean) and
gives the scales as they will be read back, beside the tensors to write. Whatever is snapped afterwards is
snapped with scales that exist on disk.

Sources: OCP Microscaling Formats 1.0 (E8M0, and scale = 2**(floor(log2 amax) - emax)); NVIDIA's NVFP4
recipe (outer = amax / (6 * 448)); QLoRA, arXiv 2305.14314, and bitsandbytes for the order of its steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats.elements import ELEMENTS

State = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

_DYNAMIC = ELEMENTS["dynamic8"]
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # smallest subnormal: a block scale below it would become 0 and the block 0/0
_EXPONENT_BIAS = 127


class ScaleStore(Protocol):
    """One way to keep the scales [rows, G] of a tensor. `nested`: scales share something, see `settle`."""

    nested: bool

    def round(self, raw: Tensor, top: float) -> Tensor:
        """raw = absmax / top per block (float32, positive) -> the nearest scale this store can say alone."""
        ...

    def settle(self, scale: Tensor) -> tuple[Tensor, State]:
        """Scales as they will be read back, and the tensors that say so (`value` inverts exactly)."""
        ...

    def layout(self, rows: int, groups: int) -> Layout:
        """Name -> (shape, dtype) of the tensors `settle` gives."""
        ...

    def value(self, state: State, rows: int, groups: int) -> Tensor:
        """The scales [rows, G] that the stored tensors stand for."""
        ...


@dataclass(frozen=True)
class PlainScale:
    """Scales in a float dtype of their own."""

    dtype: torch.dtype = torch.float32
    nested = False

    def round(self, raw: Tensor, top: float) -> Tensor:
        # A block too small for the stored dtype would get scale 0 and decode to 0/0.
        scale = raw.clamp(min=torch.finfo(self.dtype).tiny).to(self.dtype)
        if not bool(torch.isfinite(scale).all()):
            largest = float(raw.max())
            raise BadInput(f"a scale of {largest:.3g} overflows {self.dtype}: store scales as bfloat16 or float32")
        return scale

    def settle(self, scale: Tensor) -> tuple[Tensor, State]:
        return scale, {"scale": scale}

    def layout(self, rows: int, groups: int) -> Layout:
        return {"scale": ((rows, groups), self.dtype)}

    def value(self, state: State, rows: int, groups: int) -> Tensor:
        return state["scale"]


@dataclass(frozen=True)
class PowerScale:
    """E8M0: powers of two from 2**-127 to 2**127.

    `floor`, OCP's rule, takes the exponent of the block's absmax less that of the format's top, so the largest
    element may saturate (by at most the format's last binade); otherwise the exponent is rounded up and nothing
    ever clips, at up to twice the step.
    """

    floor: bool = True
    nested = False

    def round(self, raw: Tensor, top: float) -> Tensor:
        # frexp gives a mantissa in [0.5, 1), so floor(log2 x) is its exponent less one, exactly.
        if self.floor:
            exponent = torch.frexp(raw * top).exponent - 1 - math.floor(math.log2(top))
        else:
            mantissa, exponent = torch.frexp(raw)
            exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        exponent = exponent.clamp(-_EXPONENT_BIAS, _EXPONENT_BIAS)
        return torch.ldexp(torch.ones_like(raw), exponent)

    def settle(self, scale: Tensor) -> tuple[Tensor, State]:
        exponent = torch.frexp(scale).exponent - 1 + _EXPONENT_BIAS
        return scale, {"scale": exponent.to(torch.uint8)}

    def layout(self, rows: int, groups: int) -> Layout:
        return {"scale": ((rows, groups), torch.uint8)}

    def value(self, state: State, rows: int, groups: int) -> Tensor:
        exponent = state["scale"].int() - _EXPONENT_BIAS
        return torch.ldexp(torch.ones(exponent.shape, device=exponent.device), exponent)


@dataclass(frozen=True)
class FloatScale:
    """E4M3 block scales under one float32 scale per tensor.

    outer = largest raw scale / `limit`: with 448 the largest block uses E4M3's whole range; four-over-six
    asks for 256, which leaves room for its candidate 1.5 times larger. Block scales that would round to zero
    take E4M3's smallest subnormal. With `fixed` the outer scale is decided already and `round` is exact.
    """

    limit: float = E4M3_MAX
    fixed: float | None = None
    nested = True

    def round(self, raw: Tensor, top: float) -> Tensor:
        if self.fixed is None:
            return raw
        outer = self.outer(raw)
        return self.under(raw, outer).float() * outer

    def outer(self, raw: Tensor) -> Tensor:
        """The tensor's own scale, float32 [1], from raw block scales; 1 for a tensor of zeros."""
        if self.fixed is not None:
            return raw.new_full((1,), self.fixed)
        outer = raw.max().reshape(1)
        outer = outer / torch.full_like(outer, self.limit)
        return torch.where(outer > 0, outer, torch.ones_like(outer))

    def by_row(self, raw: Tensor) -> Tensor:
        """Scales as they are read back when every row of them [rows, G] has an outer scale of its own."""
        outer = raw.amax(1, keepdim=True)
        outer = outer / torch.full_like(outer, self.limit)
        outer = torch.where(outer > 0, outer, torch.ones_like(outer))
        return self.under(raw, outer).float() * outer

    def under(self, raw: Tensor, outer: Tensor) -> Tensor:
        """Block scales as E4M3 multiples of `outer`."""
        return (raw / outer).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)

    def settle(self, scale: Tensor) -> tuple[Tensor, State]:
        outer = self.outer(scale)
        state = {"scale": self.under(scale, outer), "scale_outer": outer}
        return self.value(state, *scale.shape), state

    def layout(self, rows: int, groups: int) -> Layout:
        return {"scale": ((rows, groups), torch.float8_e4m3fn), "scale_outer": ((1,), torch.float32)}

    def value(self, state: State, rows: int, groups: int) -> Tensor:
        return state["scale"].float() * state["scale_outer"]


@dataclass(frozen=True)
class DividedScale(FloatScale):
    """E4M3 block scales over one float32 divisor per tensor, as compressed-tensors stores NVFP4.

    The divisor is the reciprocal of `FloatScale`'s outer scale. Each rounds to float32 in its own way, so the two
    differ in the last bit of a scale, and a file is only read exactly in the form it has.
    """

    def round(self, raw: Tensor, top: float) -> Tensor:
        if self.fixed is None:
            return raw
        divisor = 1 / self.outer(raw)
        return self.over(raw, divisor).float() / divisor

    def by_row(self, raw: Tensor) -> Tensor:
        outer = raw.amax(1, keepdim=True) / self.limit
        divisor = 1 / torch.where(outer > 0, outer, torch.ones_like(outer))
        return self.over(raw, divisor).float() / divisor

    def over(self, raw: Tensor, divisor: Tensor) -> Tensor:
        """Block scales as E4M3 numbers to be divided by `divisor`."""
        return (raw * divisor).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)

    def settle(self, scale: Tensor) -> tuple[Tensor, State]:
        divisor = 1 / self.outer(scale)
        state = {"scale": self.over(scale, divisor), "scale_divisor": divisor}
        return self.value(state, *scale.shape), state

    def layout(self, rows: int, groups: int) -> Layout:
        return {"scale": ((rows, groups), torch.float8_e4m3fn), "scale_divisor": ((1,), torch.float32)}

    def value(self, state: State, rows: int, groups: int) -> Tensor:
        return state["scale"].float() / state["scale_divisor"]


@dataclass(frozen=True)
class DoubleScale:
    """QLoRA's double quantization: scales less their mean, in bitsandbytes' 8-bit dynamic map, per 256 a range.

    The blocks of 256 run over the flattened scales, row after row. 0.127 bit per weight at groups of 64 in
    place of 0.5 for float32 scales.
    """

    block: int = 256
    nested = True

    def round(self, raw: Tensor, top: float) -> Tensor:
        return raw

    def settle(self, scale: Tensor) -> tuple[Tensor, State]:
        flat = scale.float().flatten()
        # A block of zeros has no scale of its own and is right with any: it takes the mean of the others.
        live = flat > 0
        usual = flat[live].mean() if bool(live.any()) else flat.new_ones(())
        flat = torch.where(live, flat, usual)
        mean = flat.mean().reshape(1)
        centred = flat - mean
        blocks = torch.nn.functional.pad(centred, (0, -len(flat) % self.block)).view(-1, self.block)
        ranges = blocks.abs().amax(dim=1)
        safe = torch.where(ranges > 0, ranges, torch.ones_like(ranges))
        codes = _DYNAMIC.nearest(blocks / safe[:, None]).flatten()[: len(flat)]
        state = {"scale": codes.view(scale.shape), "scale_range": ranges, "scale_mean": mean}
        value = self.value(state, *scale.shape)
        if not bool((value > 0).all()):
            # A block far smaller than the rest of the tensor can land on 0 or below, where nothing could be encoded.
            lifted = torch.where(value > 0, codes.view(scale.shape), self._least_positive(state, scale.shape))
            state["scale"] = lifted
            value = self.value(state, *scale.shape)
        return value, state

    def _least_positive(self, state: State, shape: torch.Size) -> Tensor:
        """The smallest code of each scale's block that decodes to a positive value."""
        levels = _DYNAMIC.value(torch.arange(256, device=state["scale"].device))
        positive = levels[None] * state["scale_range"][:, None] + state["scale_mean"] > 0
        least = positive.int().argmax(dim=1).to(torch.uint8)
        return least.repeat_interleave(self.block)[: shape.numel()].view(shape)

    def layout(self, rows: int, groups: int) -> Layout:
        return {
            "scale": ((rows, groups), torch.uint8),
            "scale_range": ((-(-rows * groups // self.block),), torch.float32),
            "scale_mean": ((1,), torch.float32),
        }

    def value(self, state: State, rows: int, groups: int) -> Tensor:
        levels = _DYNAMIC.value(state["scale"]).flatten()
        ranges = state["scale_range"].repeat_interleave(self.block)[: len(levels)]
        return (levels * ranges + state["scale_mean"]).view(rows, groups)
